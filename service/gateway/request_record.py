"""What became of one request: for headers, `usage.coe`, metrics and the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.broker.prices import Price, cost

if TYPE_CHECKING:
    from service.telemetry.tracing import Trace


@dataclass(slots=True)
class CallCost:
    """One call of an expert. Times in ms. `tokens` are None until the reply told them.

    `estimated`: the call was cut short, and its tokens are by the clock. `answers`: how many are
    asked for at once, each of `most_tokens` at most where there is a bound. `ended`: false where
    it was stopped before its end.
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
        told: dict[str, Any] = {
            "expert": self.expert,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": round(self.cost, 9),
        }
        return {**told, "estimated": True} if self.estimated else told


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A call that was given up while an expert worked on it.

    Attributes:
        asks: Asks the pool for the prompt's and the answer's tokens, as its engine counted
            them; None where it can't tell, or nobody can.
        guess: The same by the clock.
    """

    asks: Callable[[], Awaitable[tuple[int, int] | None]] | None
    guess: tuple[int, int]

    async def used(self) -> tuple[int, int, bool]:
        """Tokens of its prompt, of its answer as far as it was made, and whether an engine has
        counted them."""
        told = await self.asks() if self.asks is not None else None
        return (*self.guess, False) if told is None else (*told, True)


@dataclass(slots=True)
class RequestRecord:
    """Filled in as a request goes its way.

    `predicted_s`: the wait that was expected of the option that answered. `..._at_s`: by
    `time.monotonic`; 0: never. `failed`: attempts that did before the first byte, as
    (expert, code). `losses`: boot ids of the pools that died, or whose engine did, while they
    had the request; all calls of one request share the list. `engine_ms`: until the engine's
    first byte, as the pool measured it.
    `route_ms`: to understand the request once its body is there, and to choose who answers.
    `clipped`: what its answer was cut to, in tokens, where that is less than was asked for.
    `own_deadline`: its client has set one. `unfinished`: calls that were given up because the
    client left, or its own deadline passed.
    """

    expert: str = ""
    recipe: str = ""
    pool: str = ""
    local: bool = False
    status: int = 0
    route_ms: float = 0.0
    queue_ms: float = 0.0
    swap_ms: float = 0.0
    predicted_s: float = 0.0
    predicted_cost: float = 0.0
    engine_ms: float = 0.0
    began_at_s: float = 0.0
    sent_at_s: float = 0.0
    first_byte_at_s: float = 0.0
    attempts: int = 0
    escalations: int = 0
    outcome: str = "ok"
    clipped: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    trace: Trace | None = None
    own_deadline: bool = False
    calls: list[CallCost] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Of all calls, in the unit of prices."""
        return sum(call.cost for call in self.calls)

    @property
    def route_header(self) -> tuple[bytes, bytes]:
        """What the reply tells of its routing."""
        return b"x-coe-route-ms", f"{self.route_ms:.2f}".encode()

    @property
    def prefill_ms(self) -> float:
        """From the engine's start on it to the first byte: of the call that answered."""
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
