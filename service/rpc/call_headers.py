"""A call from a gateway to a pool, and its HTTP headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.errors import InvalidRequestError
from service.types import NOBODY, Tenant

EXPERT = "x-coe-expert"
REQUEST_ID = "x-coe-request-id"
DEADLINE_MS = "x-coe-deadline-ms"
STREAM = "x-coe-stream"
GATEWAY = "x-coe-gateway"
SEQ = "x-coe-seq"
TENANT = "x-coe-tenant"
PRIORITY = "x-coe-priority"
WEIGHT = "x-coe-weight"
CACHE_SALT = "x-coe-cache-salt"
PROMPT_TOKENS = "x-coe-prompt-tokens"
PLACES = "x-coe-places"
PREFIX = "x-coe-prefix"
QUEUE_MS = "x-coe-queue-ms"
SWAP_MS = "x-coe-swap-ms"
ENGINE_MS = "x-coe-engine-ms"
# W3C trace context.
TRACE = ("traceparent", "tracestate")
_MOST = 512
_MOST_PREFIX = 32


@dataclass(frozen=True, slots=True)
class Call:
    """Metadata of a call, which a pool needs in addition to the body.

    Attributes:
        endpoint: Path of the endpoint.
        expert: The expert that answers.
        request_id: Id of this call: the client's request, and the number of the attempt.
        deadline_ms: Time left in ms, to the first byte if `stream`, else to the end.
        stream: Whether the answer is streamed.
        gateway: The gateway's id.
        seq: Number of the call among this gateway's calls to this pool. Snapshots acknowledge it.
        tenant: The tenant. Its name, priority, weight and cache salt are sent.
        trace: W3C trace context; empty if the request is not traced.
        prompt_tokens: Estimated total length of its prompts.
        places: Number of sequences that it takes in the engine: its answers, or its prompts if it
            generates no answer.
        prefix: Digest of the conversation, by which the next turn finds this one's prefix cache;
            empty for none.
    """

    endpoint: str
    expert: str
    request_id: str
    deadline_ms: int
    stream: bool
    gateway: str
    seq: int
    tenant: Tenant = NOBODY
    trace: Mapping[str, str] = field(default_factory=dict)
    prompt_tokens: int = 1
    places: int = 1
    prefix: str = ""

    def headers(self) -> dict[str, str]:
        """Serialize as HTTP headers."""
        return {
            **self.trace,
            EXPERT: self.expert,
            REQUEST_ID: self.request_id,
            DEADLINE_MS: str(self.deadline_ms),
            STREAM: "1" if self.stream else "0",
            GATEWAY: self.gateway,
            SEQ: str(self.seq),
            PROMPT_TOKENS: str(self.prompt_tokens),
            PLACES: str(self.places),
            TENANT: self.tenant.name,
            PRIORITY: self.tenant.priority,
            WEIGHT: str(self.tenant.weight),
            **({CACHE_SALT: self.tenant.cache_salt} if self.tenant.cache_salt else {}),
            **({PREFIX: self.prefix} if self.prefix else {}),
        }


@dataclass(frozen=True, slots=True)
class Times:
    """Times of a request in a pool, in `time.monotonic` seconds; 0 for events that did not happen.

    Attributes:
        arrived_s: When it arrived.
        began_s: When the engine received it.
        first_s: When its first byte was sent.
        ended_s: When it ended.
        queue_s: Seconds in the queue, before `began_s`.
        swap_s: Seconds of `queue_s` during which a swap was running.
    """

    arrived_s: float
    began_s: float
    first_s: float
    ended_s: float
    queue_s: float
    swap_s: float


def trace_of(headers: Mapping[bytes, bytes]) -> Mapping[str, str]:
    """Extract the W3C trace context of a request; empty if it has none."""
    if b"traceparent" not in headers:
        return {}
    given = {name: headers.get(name.encode(), b"") for name in TRACE}
    # Values other than printable ASCII are not valid, and could not be forwarded as headers.
    return {
        name: value.decode()
        for name, value in given.items()
        if 0 < len(value) <= _MOST and value.isascii() and value.decode().isprintable()
    }


def parse_call(endpoint: str, headers: dict[bytes, bytes]) -> Call:
    """Parse headers in the form of `Call.headers`.

    Raises:
        InvalidRequestError: A header is missing or not valid.
    """

    def text(name: str) -> str:
        value = headers.get(name.encode())
        if value is None:
            raise InvalidRequestError(f"a pool needs the header {name}")
        return value.decode("latin-1")

    try:
        return Call(
            endpoint=endpoint,
            expert=text(EXPERT),
            request_id=text(REQUEST_ID),
            deadline_ms=int(text(DEADLINE_MS)),
            stream=text(STREAM) == "1",
            gateway=text(GATEWAY),
            seq=int(text(SEQ)),
            tenant=Tenant(
                text(TENANT),
                priority=text(PRIORITY),
                weight=float(text(WEIGHT)),
                cache_salt=headers.get(CACHE_SALT.encode(), b"").decode("latin-1"),
            ),
            trace=trace_of(headers),
            prompt_tokens=max(1, int(text(PROMPT_TOKENS))),
            places=max(1, int(text(PLACES))),
            prefix=headers.get(PREFIX.encode(), b"").decode("latin-1")[:_MOST_PREFIX],
        )
    except ValueError as error:
        raise InvalidRequestError(f"a pool's header is not a number: {error}") from None
