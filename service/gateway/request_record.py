"""The record of one request, from its arrival to its end. Its `RequestScope` fills it in.

Headers, `usage.coe`, metrics, traces, the console and the access log are views of the record.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from service.broker.model_aliases import AliasChoice
from service.broker.pool_state import BootId, Place
from service.broker.savings import Comparison
from service.broker.session_terms import SessionOutcome
from service.broker.token_prices import Price, cost
from service.classifier.topic_filter import Topics
from service.http.error_formats import codes_of_ours

if TYPE_CHECKING:
    from service.telemetry.tracing import Trace

log = logging.getLogger("coe.api")
access = logging.getLogger("coe.access")

Headers = list[tuple[bytes, bytes]]

CallRole = Literal["answer", "review", "aggregate"]


@dataclass(slots=True)
class ExpertCall:
    """One call of an expert, as it is counted and charged; `rpc.call_headers.Call` is what is sent.

    Attributes:
        expert: The expert that was called.
        price: Its price.
        prompt_tokens: Tokens of the prompt; None until they are known.
        completion_tokens: Tokens of all answers together; None until they are known.
        estimated: Whether the call was cut short, so that its tokens are estimated by the clock.
        answers: How many answers are asked for at once.
        most_tokens: The bound of each answer, if there is one.
        thinking_budget: The bound of each answer's thinking, if there is one.
        reasoning_tokens: The completion tokens that are thinking; None where nobody counts them.
        ended: False where the call was stopped before its end.
        role: What the call is for in a deliberation or a recruit; None elsewhere.
        round: The round of a deliberation; None elsewhere.
    """

    expert: str
    price: Price
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    estimated: bool = False
    answers: int = 1
    most_tokens: int | None = None
    thinking_budget: int | None = None
    reasoning_tokens: int | None = None
    ended: bool = True
    role: CallRole | None = None
    round: int | None = None

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
        if self.reasoning_tokens is not None:
            call["reasoning_tokens"] = self.reasoning_tokens
        if self.thinking_budget is not None:
            call["thinking_budget"] = self.thinking_budget
        if self.role is not None:
            call["role"] = self.role
        if self.round is not None:
            call["round"] = self.round
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
        model: The model that the client named, or what its alias stands for.
        alias: The alias that the client named; None if it named none.
        tenant: The tenant's name.
        refused: Whether the answer is a refusal; noted only where an alias shares requests.
        streamed: Whether the answer is a stream.
        own_deadline: Whether the client has set a deadline of its own.
        category: The category of its prompt; empty until it was classified.
        confidence: How sure the classifier is, in [0, 1].
        topics: What its conversation is about; empty where nothing was classified.
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
        predicted_wait_s: The wait in seconds that was expected of the expert that answered; None
            where several experts answered together.
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
        rounds: How many rounds of a deliberation were held; None for other recipes.
        stopped: Why a deliberation ended; None for other recipes.
        prefix_place: Whether the conversation's next turn went where its prefix is `cached`,
            `elsewhere`, or that is `unknown`; None for a first turn.
        losses: Boot ids of pools that died, or whose engine did, while they had the request.
            All calls of one request share the list.
    """

    arrived_s: float = field(default_factory=time.monotonic)
    path: str = ""
    client_id: str = ""
    model: str = ""
    alias: AliasChoice | None = None
    tenant: str = ""
    refused: bool = False
    streamed: bool = False
    own_deadline: bool = False
    category: str = ""
    confidence: float = 0.0
    topics: Topics = ()
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
    predicted_wait_s: float | None = None
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
    prefix_place: Literal["cached", "elsewhere", "unknown"] | None = None
    losses: list[BootId] = field(default_factory=list)
    rounds: int | None = None
    stopped: str | None = None

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
        held: dict[str, Any] = {}
        if self.rounds is not None:
            held = {"rounds": self.rounds, "stopped": self.stopped}
        return {
            "expert": self.expert,
            "recipe": self.recipe,
            **held,
            "cost": round(self.cost, 9),
            "route_ms": round(self.route_ms, 2),
            "queue_ms": round(self.queue_ms, 1),
            "swap_ms": round(self.swap_ms, 1),
            "prefill_ms": round(self.prefill_ms, 1),
            "decode_ms": round(decode_ms, 1),
            "calls": [call.to_json() for call in self.calls],
        }
