"""The errors that this service raises, as one tree.

Every message names the fault and the allowed values. Only `service.http.error_formats` maps the
classes to HTTP statuses.
"""

from __future__ import annotations

from collections.abc import Mapping


class CoeError(Exception):
    """Base class of all errors of this service.

    Attributes:
        message: A text for the user; it never holds a prompt or a key.
        param: The request's field at fault, if there is one.
        code: The machine-readable reason in OpenAI's error format.
        final: Whether a retry is useless, although the status makes clients retry.
    """

    code = "internal_error"
    final = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigError(CoeError):
    """A config file is invalid. The message names file, path, fault and the allowed values."""

    code = "invalid_config"


class InvalidProfileError(ConfigError):
    """A steering profile is damaged, or made for another base model."""

    code = "invalid_profile"


class ArtifactError(CoeError):
    """A router artifact or model folder is missing, damaged or of another version."""

    code = "invalid_artifact"


class ModelStoreError(CoeError):
    """A model could not be fetched: no network, no space, or a wrong checksum."""

    code = "model_unavailable"


class InvalidRequestError(CoeError):
    """The request is invalid (400)."""

    code = "invalid_request_error"


class InfeasibleBoundsError(InvalidRequestError):
    """No candidate keeps the request's bounds of quality, cost, time and experts (400).

    Attributes:
        nearest: The nearest bounds that a candidate keeps, by name, each beside the other bounds of
            the request. `together` holds bounds that have to change at the same time.
    """

    code = "infeasible_bounds"

    def __init__(
        self, message: str, *, param: str | None = None, nearest: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.nearest = nearest or {}


class PromptTooLongError(InvalidRequestError):
    """Prompt and answer do not fit into the expert's context (400)."""

    code = "context_length_exceeded"


class BodyTooLargeError(InvalidRequestError):
    """The request body is larger than the configured limit (413)."""

    code = "request_too_large"


class HeadersTooLargeError(InvalidRequestError):
    """The request headers are larger than the configured limits (431)."""

    code = "headers_too_large"


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive within the configured time (408)."""

    code = "request_timeout"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body of a request is not declared as JSON, or a form, or is compressed (415)."""

    code = "unsupported_media_type"


class DisallowedFieldError(InvalidRequestError):
    """A field would make the service open files or URLs, or run code (400)."""

    code = "not_allowed"


class GuardRefusedError(InvalidRequestError):
    """The tenant's guard refused the prompt (400)."""

    code = "guard_refused"

    def __init__(self, message: str, *, screen: str = "", param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.screen = screen


class UnknownModelError(CoeError):
    """There is no expert, or no other named object, of that name (404)."""

    code = "model_not_found"


class ReplyNotFoundError(CoeError):
    """There is no reply of that id that accepts votes (404)."""

    code = "reply_not_found"


class UnknownEndpointError(CoeError):
    """There is no such endpoint (404)."""

    code = "not_found"


class UnauthorizedError(CoeError):
    """The API key is missing or invalid (401)."""

    code = "invalid_api_key"


class ForbiddenError(CoeError):
    """The API key lacks the permission (403)."""

    code = "permission_denied"


class RateLimitExceededError(CoeError):
    """A limit of the key or the tenant is reached (429).

    Attributes:
        retry_after_s: When there surely is room again; None: never for so large a request.
        final: Whether a retry is useless for now, as with a budget that is used up. The default is
            true where `retry_after_s` is None.
    """

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        param: str | None = None,
        code: str | None = None,
        final: bool | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s
        self.final = retry_after_s is None if final is None else final


class ConflictError(CoeError):
    """The operation is not possible in the present state (409)."""

    code = "conflict"


class UnavailableError(CoeError):
    """The service can't answer now, but may soon (503). `retry_after_s` is an estimate."""

    code = "unavailable"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class OverCapacityError(UnavailableError):
    """A bounded queue is full (503)."""

    code = "over_capacity"


class ExpertFailedError(UnavailableError):
    """The expert could not be loaded; the message gives the reason (503)."""

    code = "expert_failed"


class CircuitOpenError(UnavailableError):
    """The circuit breaker is open after too many failures (503)."""

    code = "circuit_open"


class PoolDrainingError(UnavailableError):
    """The pool is stopping and takes no new requests; the gateway selects again (503)."""

    code = "draining"


class StoreUnavailableError(UnavailableError):
    """The store of limits and budgets can't be reached (503)."""

    code = "store_unavailable"


class StorageFullError(CoeError):
    """The disk of files, batches and responses is full; nothing was kept (507)."""

    code = "storage_full"


class PoolUnavailableError(UnavailableError):
    """The connection to the pool was lost before the first byte of the answer (503)."""

    code = "pool_gone"


class PoolUnreachableError(PoolUnavailableError):
    """No connection to the pool could be made: it never got the request (503)."""

    code = "pool_unreachable"


class PoolStoppedError(PoolUnavailableError):
    """The pool was drained and stopped before it answered (503)."""

    code = "pool_stopped"


class PoolReplacedError(UnavailableError):
    """Another pool is about to answer for this one; the gateway waits for it (503)."""

    code = "pool_replaced"


class EngineDeadError(UnavailableError):
    """The engine died during the request (503, or an SSE error after the first byte)."""

    code = "engine_dead"


class EngineRestartingError(EngineDeadError):
    """The engine died before it got the request, and is being restarted (503)."""

    code = "engine_restarting"


class EngineDiedTwiceError(CoeError):
    """Two engines or pools died during this request; it is not tried a third time (500)."""

    code = "engine_died_twice"
    final = True


class DeadlineExceededError(UnavailableError):
    """The deadline passed before the answer began (504).

    Attributes:
        silent: Whether an engine had the request for most of that time.
    """

    code = "deadline_exceeded"
    silent = False


class EngineTimeoutError(DeadlineExceededError):
    """The deadline passed while an engine had the request and sent nothing (504)."""

    code = "engine_silent"
    silent = True


class UpstreamError(CoeError):
    """A remote expert answered with an error, or not at all; its status is passed on.

    Attributes:
        status: The HTTP status for the client.
        retry_after_s: When a retry may succeed.
        limited: Whether the remote server limits the rate or is overloaded.
        unreachable: Whether it gave no answer.
    """

    code = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        retry_after_s: float = 1.0,
        limited: bool = False,
        unreachable: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.limited = limited
        self.unreachable = unreachable
