"""A model of an engine that swaps weights, for a virtual clock.

A step of n running requests takes `step_s + each_s · n`, and gives each of them a token. A prompt
is read first, and holds the steps up by `read_s` for each of its tokens. Loading weights to host
memory takes `fill_s` beside the steps; a swap takes `swap_s`.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Collection
from dataclasses import dataclass

from service.engine.engine_interface import (
    EngineReport,
    EngineRequest,
    LoadResult,
    Send,
    SwapResult,
)
from service.errors import EngineDeadError

ENDPOINT = "/v1/chat/completions"
_HEADERS = [(b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Durations in s.

    Attributes:
        step_s: A step without requests.
        each_s: What each running request adds to it.
        read_s: Time of a prompt's token.
        swap_s: A swap from host memory.
        fill_s: Loading weights to host memory.
        start_s: The start of an engine.
        unit_bytes: Bytes of an expert's weights.
        capacity: Requests that run at once.
    """

    step_s: float = 0.02
    each_s: float = 0.0005
    read_s: float = 0.0001
    swap_s: float = 0.6
    fill_s: float = 7.0
    start_s: float = 0.0
    unit_bytes: int = 14 * 1024**3
    capacity: int = 32


# A 7 B model in bfloat16: from NVMe at 2 GB/s, from pinned memory at 25 GB/s.
DEFAULT_COSTS = EngineCosts()


@dataclass(slots=True)
class FirstToken:
    """When a request got its first token; 0 before. The engine writes it."""

    at_s: float = 0.0


class ModelledEngine:
    """A `SwappingEngine` whose times are those of `EngineCosts`.

    The body of a request is its number of prompt tokens and of answer tokens: `b"200 100"`.

    Args:
        experts: The experts that it can run.
        costs: Its times.
        firsts: By request id, where to write the time of the first token.
    """

    def __init__(
        self, experts: Collection[str], costs: EngineCosts, firsts: dict[str, FirstToken]
    ) -> None:
        self._experts = frozenset(experts)
        self._costs = costs
        self._firsts = firsts
        self._dead: str | None = None
        self._loop = asyncio.get_running_loop()
        # Steps done so far, as of `_at_s`. They stand still until `_reading_s`.
        self._steps = 0.0
        self._at_s = self._reading_s = self._loop.time()
        # The running requests by the number of the step that ends them.
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- the interface of an engine

    async def start(self) -> EngineReport:
        """Wait for `start_s`."""
        await asyncio.sleep(self._costs.start_s)
        return EngineReport("modelled", 8192, frozenset({ENDPOINT}))

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Do nothing: the first expert came with the start."""

    async def unload(self, expert: str) -> None:
        """Do nothing: there are no adapters."""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """All of them: one family."""
        return self._experts

    async def load_to_host(self, expert: str) -> LoadResult:
        """Wait for `fill_s`."""
        await asyncio.sleep(self._costs.fill_s)
        return LoadResult(self._costs.unit_bytes, self._costs.fill_s)

    async def swap_in(self, expert: str) -> SwapResult:
        """Wait for `swap_s`.

        Raises:
            EngineDeadError: Requests run.
        """
        if self._running:
            raise EngineDeadError(f"{self._running} requests run during a swap")
        await asyncio.sleep(self._costs.swap_s)
        return SwapResult(self._costs.swap_s, ok=True)

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Free the memory at once."""

    def failure(self) -> str | None:
        """Return why it is dead, or None."""
        return self._dead

    def kill(self, why: str) -> None:
        """Let it die. Running requests never end."""
        self._dead = why
        if self._timer is not None:
            self._timer.cancel()

    async def stop(self) -> None:
        """End it."""
        self.kill(self._dead or "stopped")

    async def run(self, request: EngineRequest, send: Send) -> None:
        """Answer a request: wait for its turns, and send the whole answer.

        Raises:
            EngineDeadError: The engine is dead.
        """
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        prompt, answer = map(int, request.body.split())
        self._running += 1
        try:
            self._advance()
            now_s = self._loop.time()
            self._reading_s = max(now_s, self._reading_s) + self._costs.read_s * prompt
            await self._until_step(self._steps + 1)
            self._firsts[request.request_id].at_s = self._loop.time()
            if answer > 1:
                await self._until_step(self._steps + answer - 1)
        finally:
            self._advance()
            self._running -= 1
            self._arm()
        body = b'{"usage":{"prompt_tokens":%d,"completion_tokens":%d}}' % (prompt, answer)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": body})

    # --- steps

    def _advance(self) -> None:
        """Count the steps since the last look."""
        now_s = self._loop.time()
        computing_s = now_s - max(self._at_s, min(self._reading_s, now_s))
        if self._running:
            self._steps += computing_s / self._step_s()
        self._at_s = now_s

    def _step_s(self) -> float:
        return self._costs.step_s + self._costs.each_s * self._running

    async def _until_step(self, step: float) -> None:
        end: asyncio.Future[None] = self._loop.create_future()
        self._count += 1
        heapq.heappush(self._ends, (step, self._count, end))
        self._arm()
        await end

    def _arm(self) -> None:
        """Set the timer for the next step that ends something."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and self._ends[0][2].done():
            heapq.heappop(self._ends)
        if self._ends and self._running and self._dead is None:
            left_s = max(0.0, self._ends[0][0] - self._steps) * self._step_s()
            at_s = max(self._reading_s, self._loop.time()) + left_s
            self._timer = self._loop.call_at(at_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        while self._ends and self._ends[0][0] <= self._steps + 1e-6:
            end = heapq.heappop(self._ends)[2]
            if not end.done():
                end.set_result(None)
        self._arm()
