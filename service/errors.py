"""The errors this service raises, as one tree.

Every error says what was wrong and what is allowed. `service.http.openai_errors` maps
each class to an HTTP status in one table; nothing else does.
"""

from __future__ import annotations


class CoeError(Exception):
    """Root of the tree. `message` is for the user and never holds a prompt or a key.

    `param` names the request field at fault, where there is one. `code` is the
    machine-readable reason of OpenAI's error shape. `final`: the same request will fail again,
    although its status makes clients retry.
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
    """A config file is wrong. The message names file, path, fault and what is allowed."""

    code = "invalid_config"


class InvalidProfileError(ConfigError):
    """A steering profile is damaged or fits another base; the message names layer and numbers."""

    code = "invalid_profile"


class ArtifactError(CoeError):
    """A router artifact or model folder is missing, damaged or of another version."""

    code = "invalid_artifact"


class ModelStoreError(CoeError):
    """Getting a model failed: no network, no space, wrong checksum."""

    code = "model_unavailable"


class InvalidRequestError(CoeError):
    """The client's request can't be served as written (400)."""

    code = "invalid_request_error"


class PromptTooLongError(InvalidRequestError):
    """The prompt and the answer asked for do not fit the expert's context (400)."""

    code = "context_length_exceeded"


class BodyTooLargeError(InvalidRequestError):
    """The request body is over the configured bound (413)."""

    code = "request_too_large"


class HeadersTooLargeError(InvalidRequestError):
    """The request's headers are over the configured bounds (431)."""

    code = "headers_too_large"


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive within the configured time (408)."""

    code = "request_timeout"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body of a request is not declared as JSON (415)."""

    code = "unsupported_media_type"


class DisallowedFieldError(InvalidRequestError):
    """A field that would make us open files or URLs, or run code (400)."""

    code = "not_allowed"


class GuardRefusedError(InvalidRequestError):
    """The tenant's guard lets no such prompt through (400)."""

    code = "guard_refused"

    def __init__(self, message: str, *, screen: str = "", param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.screen = screen


class UnknownModelError(CoeError):
    """No expert of that name (404)."""

    code = "model_not_found"


class ReplyNotFoundError(CoeError):
    """No reply of that id that could be voted on (404)."""

    code = "reply_not_found"


class UnknownEndpointError(CoeError):
    """No such path (404)."""

    code = "not_found"


class UnauthorizedError(CoeError):
    """No key or a wrong one (401)."""

    code = "invalid_api_key"


class ForbiddenError(CoeError):
    """This key may not do that (403)."""

    code = "permission_denied"


class RateLimitExceededError(CoeError):
    """A tenant's own limit is reached (429).

    `retry_after_s`: when there surely is room again; None: never for so large a request. `final`:
    to try again soon is vain, as with a budget that is used up; by default, where it is never.
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
    """What was asked for can't be done in the present state (409)."""

    code = "conflict"


class UnavailableError(CoeError):
    """We can't serve this now, but may soon (503). `retry_after_s` is our honest guess."""

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
    """The expert could not be loaded; the message carries the reason (503)."""

    code = "expert_failed"


class CircuitOpenError(UnavailableError):
    """It failed too often of late and is left alone for a while (503)."""

    code = "circuit_open"


class PoolDrainingError(UnavailableError):
    """This pool is stopping and takes no new work: the gateway chooses again (503)."""

    code = "draining"


class StoreUnavailableError(UnavailableError):
    """The store of limits and budgets can't be reached (503)."""

    code = "store_unavailable"


class PoolUnavailableError(UnavailableError):
    """The pool went away while it had the request, before the first byte (503)."""

    code = "pool_gone"


class PoolUnreachableError(PoolUnavailableError):
    """No connection to the pool was made: the request never got there (503)."""

    code = "pool_unreachable"


class PoolStoppedError(PoolUnavailableError):
    """The pool stopped, as it had told that it would, before it had answered (503)."""

    code = "pool_stopped"


class EngineDeadError(UnavailableError):
    """The engine died under the request (503, or an SSE error once bytes have gone out)."""

    code = "engine_dead"


class EngineRestartingError(EngineDeadError):
    """The engine had died before the request reached it, and another is starting (503)."""

    code = "engine_restarting"


class EngineDiedTwiceError(CoeError):
    """Two engines or pools died while they had this request; no third is given it (500)."""

    code = "engine_died_twice"
    final = True


class DeadlineExceededError(UnavailableError):
    """The request's deadline passed before an answer began (504).

    `silent`: somebody had the request all that time and said nothing.
    """

    code = "deadline_exceeded"
    silent = False


class EngineTimeoutError(DeadlineExceededError):
    """The deadline passed while an engine had the request and said nothing (504)."""

    code = "engine_silent"
    silent = True


class UpstreamError(CoeError):
    """A remote expert answered with an error of its own (its status is passed on).

    `limited`: it has too much to do, or we asked too often. `unreachable`: it gave no answer.
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
