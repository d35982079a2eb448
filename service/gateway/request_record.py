"""The record of one request, and the scope that accounts for it and answers its errors.

Headers, `usage.coe`, metrics, traces, the console and the access log are views of the record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from service.broker.pool_state import BootId, Place
from service.broker.savings import Comparison
from service.broker.session_terms import SessionOutcome
from service.broker.token_prices import Price, cost
from service.engine.engine_interface import Send
from service.errors import CoeError
from service.http.asgi_helpers import ClientDisconnectedError, send_response
from service.http.openai_errors import codes_of_ours, dialect_of, error_response
from service.rpc.call_headers import trace_of
from service.telemetry.json_logging import log_fields

if TYPE_CHECKING:
    from service.gateway.console.request_history import RequestHistory
    from service.gateway.guard.guard import GuardResult
    from service.gateway.request.parsing import InferenceRequest
    from service.gateway.request_metrics import GatewayMetrics
    from service.gateway.routing.route_plan import RoutePlan
    from service.telemetry.tracing import Trace, Traces

log = logging.getLogger("coe.api")
access = logging.getLogger("coe.access")

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class ExpertCall:
    """One call of an expert.

    Attributes:
        expert: The expert that was called.
        price: Its price.
        prompt_tokens: Tokens of the prompt; None until they are known.
        completion_tokens: Tokens of all answers together; None until they are known.
        estimated: Whether the call was cut short, so that its tokens are estimated by the clock.
        answers: How many answers are asked for at once.
        most_tokens: The bound of each answer, if there is one.
        ended: False where the call was stopped before its end.
    """

    expert: str
    price: Price
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    estimated: bool = False
    answers: int = 1
    most_tokens: int | None = None
    ended: bool = True

    @property
    def length(self) -> int:
        """Tokens of each answer, on average; 0 until they are known."""
        return (self.completion_tokens or 0) // self.answers

    @property
    def cut(self) -> bool:
        """Whether its answers would have gone on, had they not been stopped or bounded."""
        bounded = self.most_tokens is not None and self.length >= self.most_tokens
        return bounded or not self.ended

    @property
    def cost(self) -> float:
        """In the unit of prices; 0 until the tokens are known."""
        return cost(self.price, self.prompt_tokens or 0, self.completion_tokens or 0)

    def to_json(self) -> dict[str, Any]:
        """For `usage.coe`."""
        call: dict[str, Any] = {
            "expert": self.expert,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": round(self.cost, 9),
        }
        return {**call, "estimated": True} if self.estimated else call


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A call that was given up while an expert worked on it.

    Attributes:
        asks: Asks the pool for the prompt's and the answer's tokens, as its engine counted
            them; None where it can't tell, or nobody can.
        guess: Prompt and answer tokens, estimated from the time that passed.
    """

    asks: Callable[[], Awaitable[tuple[int, int] | None]] | None
    guess: tuple[int, int]

    async def used(self) -> tuple[int, int, bool]:
        """Tokens of the prompt, of the answer so far, and whether an engine has counted them."""
        counted = await self.asks() if self.asks is not None else None
        return (*self.guess, False) if counted is None else (*counted, True)


@dataclass(slots=True)
class RequestRecord:
    """One request, from its arrival to its end.

    `arrived_s`, `ended_s` and the moments `..._at_s` are of `time.monotonic`; 0 means never.

    Attributes:
        arrived_s: When the request arrived. Its deadline counts from here.
        path: The path that was asked.
        client_id: The request's id, as the client knows it.
        model: The model that the client named.
        streamed: Whether the answer is a stream.
        own_deadline: Whether the client has set a deadline of its own.
        category: The category of its prompt; empty until it was classified.
        confidence: How sure the classifier is, in [0, 1].
        routed: Whether candidates were found for it.
        expert: The expert that answered, or was asked last.
        recipe: The recipe that was chosen.
        pool: The boot id of the pool that answered; None of a remote expert.
        local: Whether a pool answers, rather than a remote endpoint.
        status: The HTTP status that was sent; 0 until then.
        outcome: `ok`, `client_gone`, or the code of the error that ended it.
        fault: The code of the error that ended it before its answer began; else empty.
        route_ms: Time to understand the request once its body is there, and to choose.
        queue_ms: Time in the pool's queue, swaps included.
        swap_ms: Time of these swaps.
        engine_ms: Until the engine's first byte, as the pool measured it.
        predicted_s: The wait in seconds that was expected of the candidate that answered.
        predicted_cost: Its expected cost, in the unit of prices.
        began_at_s: When choosing began.
        sent_at_s: When the call that answered was sent.
        first_byte_at_s: When the first byte went to the client.
        ended_s: When the request ended.
        attempts: Calls of experts that were tried.
        escalations: How often a cascade asked its later members.
        clipped: What the answer was clipped to, in tokens, where that is less than asked for.
        failed: Attempts that failed before the first byte, as (expert, code).
        trace: Its trace, where requests are traced.
        calls: Its calls of experts.
        comparison: What it is compared with in the savings ledger; None where it is not.
        unfinished: Calls that were given up because the client left or its deadline passed.
        tried: How often each place, as (expert, pool), was tried.
        session: How the conversation's session took part in the choice; None without one.
        losses: Boot ids of pools that died, or whose engine did, while they had the request.
            All calls of one request share the list.
    """

    arrived_s: float = field(default_factory=time.monotonic)
    path: str = ""
    client_id: str = ""
    model: str = ""
    streamed: bool = False
    own_deadline: bool = False
    category: str = ""
    confidence: float = 0.0
    routed: bool = False
    expert: str = ""
    recipe: str = ""
    pool: BootId = None
    local: bool = False
    status: int = 0
    outcome: str = "ok"
    fault: str = ""
    route_ms: float = 0.0
    queue_ms: float = 0.0
    swap_ms: float = 0.0
    engine_ms: float = 0.0
    predicted_s: float = 0.0
    predicted_cost: float = 0.0
    began_at_s: float = 0.0
    sent_at_s: float = 0.0
    first_byte_at_s: float = 0.0
    ended_s: float = 0.0
    attempts: int = 0
    escalations: int = 0
    clipped: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    trace: Trace | None = None
    calls: list[ExpertCall] = field(default_factory=list)
    comparison: Comparison | None = None
    unfinished: list[Unfinished] = field(default_factory=list)
    tried: Counter[Place] = field(default_factory=Counter)
    session: SessionOutcome | None = None
    losses: list[BootId] = field(default_factory=list)

    def finish(self) -> None:
        """Note the end, and the outcome of a reply that was an error."""
        self.ended_s = time.monotonic()
        if self.outcome == "ok" and self.status >= 400:
            self.outcome = "client_error" if self.status < 500 else "server_error"

    @property
    def ours(self) -> bool:
        """Whether the request failed by the service's fault."""
        return self.status >= 500 or self.outcome in codes_of_ours()

    @property
    def recipe_label(self) -> str:
        """The recipe as metrics and traces name it: all single experts are `single`."""
        return "single" if self.recipe == self.expert else self.recipe

    @property
    def first_byte_s(self) -> float:
        """Seconds from arrival to the first byte; 0 where nothing was sent."""
        return max(0.0, self.first_byte_at_s - self.arrived_s) if self.first_byte_at_s else 0.0

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the end."""
        return self.ended_s - self.arrived_s

    @property
    def cost(self) -> float:
        """The cost of all calls, in the unit of prices."""
        return sum(call.cost for call in self.calls)

    @property
    def route_header(self) -> tuple[bytes, bytes]:
        """The header with the time of routing."""
        return b"x-coe-route-ms", f"{self.route_ms:.2f}".encode()

    @property
    def session_headers(self) -> Headers:
        """The header that says what the conversation's session did; empty without one."""
        if (outcome := self.session) is None:
            return []
        reason = "" if outcome.reason is None else f"; why={outcome.reason}"
        return [(b"x-coe-session", f"{outcome.decision}{reason}".encode())]

    @property
    def prefill_ms(self) -> float:
        """Time from the engine's start to the first byte, of the call that answered."""
        if self.local:
            return self.engine_ms
        return max(0.0, (self.first_byte_at_s - self.sent_at_s) * 1000)

    def to_json(self, decode_ms: float) -> dict[str, Any]:
        """`usage.coe` of the reply."""
        return {
            "expert": self.expert,
            "recipe": self.recipe,
            "cost": round(self.cost, 9),
            "route_ms": round(self.route_ms, 2),
            "queue_ms": round(self.queue_ms, 1),
            "swap_ms": round(self.swap_ms, 1),
            "prefill_ms": round(self.prefill_ms, 1),
            "decode_ms": round(decode_ms, 1),
            "calls": [call.to_json() for call in self.calls],
        }


@dataclass(frozen=True, slots=True)
class RequestObservers:
    """Where every request is reported.

    Attributes:
        metrics: The gateway's metrics.
        history: The console's list of requests.
        traces: Records traces; None where requests are not traced.
        access_log: Whether each request gets a log line, without its prompt.
        sends_request_id: Whether the gateway puts `x-request-id` into replies.
    """

    metrics: GatewayMetrics
    history: RequestHistory
    traces: Traces | None
    access_log: bool
    sends_request_id: bool


class RequestScope:
    """Owns the record of one request, accounts for it however it ends, and answers its errors.

    As a context manager it answers a `CoeError` in the client's dialect and any other exception
    with 500, and lets cancellation through.

    Args:
        observers: Where the request is reported.
        scope: The request's ASGI scope.
        send: The server's ASGI `send`.
    """

    def __init__(
        self, observers: RequestObservers, scope: MutableMapping[str, Any], send: Send
    ) -> None:
        self.record = RequestRecord(path=scope["path"])
        self.headers: Headers = []
        self._observers = observers
        self._asgi = scope
        self._send = send

    async def __aenter__(self) -> RequestScope:
        record = self.record
        self._observers.metrics.request_started()
        if (traces := self._observers.traces) is not None:
            parent = trace_of(dict(self._asgi["headers"]))
            record.trace = traces.begin(parent, record.path, record.arrived_s)
            log_fields(trace_id=record.trace.trace_id)
        return self

    def add_request(self, validated: GuardResult) -> InferenceRequest:
        """Record the request once it is validated."""
        request, record = validated.request, self.record
        record.client_id, record.model = request.client_id, request.model
        record.streamed, record.own_deadline = request.stream, request.own_deadline
        log_fields(request_id=request.client_id)
        if record.trace is not None:
            record.trace.set_request(
                request.request_id, request.model, request.stream, request.data
            )
        self.headers += self._id_header() + validated.headers
        if request.left_out:
            self.headers.append((b"x-coe-tools-left-out", ", ".join(request.left_out).encode()))
        return request

    def add_plan(self, plan: RoutePlan, began_s: float, ended_s: float) -> RoutePlan:
        """Record the candidates, which were found between two times of `time.monotonic`."""
        record = self.record
        record.routed = True
        record.category, record.confidence = plan.category, plan.confidence
        record.route_ms = (ended_s - began_s) * 1000
        if record.trace is not None:
            record.trace.routed(plan.category, plan.confidence, began_s, ended_s - began_s)
        if plan.category:
            self.headers.append((b"x-coe-category", plan.category.encode()))
            self.headers.append((b"x-coe-confidence", f"{plan.confidence:.3f}".encode()))
        if plan.stage:
            self.headers.append((b"x-coe-router-stage", plan.stage.encode()))
        return plan

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        record = self.record
        try:
            if error is None:
                return True
            if isinstance(error, (ClientDisconnectedError, asyncio.CancelledError)):
                record.outcome = "client_gone"
                return False
            if isinstance(error, CoeError):
                await self._send_error(error)
                return True
            if isinstance(error, Exception):
                log.error("unhandled exception in the inference handler", exc_info=error)
                await self._send_error(
                    CoeError("internal error; the log holds its type and traceback")
                )
                return True
            return False
        finally:
            self._account()

    async def _send_error(self, error: CoeError) -> None:
        record = self.record
        record.outcome = record.fault = error.code
        if record.status:
            # The reply has begun and is not a stream, so it can only be cut short.
            raise ConnectionResetError(error.code)
        response = error_response(error, dialect_of(record.path))
        record.status = response.status
        headers = [*response.headers, *self._id_header()]
        await send_response(self._send, response.status, headers, response.body)

    def _id_header(self) -> Headers:
        if not self._observers.sends_request_id:
            return []
        return [(b"x-request-id", self.record.client_id.encode())]

    def _account(self) -> None:
        record, observers = self.record, self._observers
        record.finish()
        observers.metrics.request_finished(record)
        if record.trace is not None:
            record.trace.end(
                _span_attributes(record), "" if record.outcome == "ok" else record.outcome
            )
        if record.routed:
            observers.history.add_record(record)
        if observers.access_log:
            access.info("request", extra=_access_fields(record))


def _span_attributes(record: RequestRecord) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "http.response.status_code": record.status,
        "gen_ai.response.model": record.expert,
        "coe.recipe": record.recipe_label,
    }
    if any(call.prompt_tokens or call.completion_tokens for call in record.calls):
        # The sums cover all calls; a stream without usage has none.
        attributes["gen_ai.usage.input_tokens"] = sum(c.prompt_tokens or 0 for c in record.calls)
        attributes["gen_ai.usage.output_tokens"] = sum(
            call.completion_tokens or 0 for call in record.calls
        )
        attributes["coe.cost"] = record.cost
    if record.streamed and record.first_byte_s:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_byte_s
    return attributes


def _access_fields(record: RequestRecord) -> dict[str, Any]:
    return {
        "request_id": record.client_id,
        "path": record.path,
        "status": record.status,
        "expert": record.expert,
        "category": record.category,
        "ms": round(record.total_s * 1000, 1),
        "outcome": record.outcome,
    }
