"""A slot on a virtual clock: the planner's own code, and a model of an engine's speed.

The engine takes a step of `step_s + each_s · n` for n running requests, and gives each of them a
token. It reads the prompts of new requests first. A swap takes `swap_s`. Loading weights to host
memory takes `fill_s`, beside the running requests.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtests.mixed.traffic_trace import Ask
from service.pool.swap_planner import (
    SlotView,
    Stay,
    SwapIn,
    SwapPolicy,
    UnitView,
    bounded,
    next_fetch,
    next_step,
    units_to_evict,
)
from service.types import Residency

_HALF_S = 30.0
_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations in s; `capacity`: concurrent requests."""

    step_s: float
    each_s: float
    read_s: float
    swap_s: float
    fill_s: float
    unit_bytes: int
    capacity: int = 32

    def tokens_per_s(self) -> float:
        """With every place taken."""
        return self.capacity / (self.step_s + self.each_s * self.capacity)


@dataclass(slots=True)
class _Unit:
    waiting: deque[Ask] = field(default_factory=deque)
    tier: Residency = Residency.DISK
    demand: float = 0.0
    demand_at: float = 0.0


@dataclass(slots=True)
class SlotStatistics:
    """The results over all slots."""

    waits: list[float] = field(default_factory=list)
    at_device: int = 0
    at_host: int = 0
    switches: int = 0
    fills: int = 0
    tokens: int = 0
    ended_s: float = 0.0
    plan_s: list[float] = field(default_factory=list)


class SimSlot:
    """A simulated slot. `submit` arrivals, and `advance` it to the times that it returns."""

    def __init__(
        self, names: Sequence[str], costs: Costs, policy: SwapPolicy, seen: SlotStatistics
    ) -> None:
        self._units = {name: _Unit() for name in names}
        self._costs = costs
        self._policy = policy
        self._seen = seen
        self._unit = names[0]
        self._units[self._unit].tier = Residency.DEVICE
        self._left: list[int] = []
        self._since_s = 0.0
        self._closed_s: float | None = None
        self._drain_s = 0.0
        self._step_until = self._swap_until = self._fill_until = _NEVER
        self._swap_to = self._filling = ""
        self.queued_tokens = 0

    def cost_s(self, name: str) -> float:
        """About how long a request for this unit would wait: for a gateway to choose by."""
        costs, unit = self._costs, self._units[name]
        wait_s = self.queued_tokens / costs.tokens_per_s()
        if unit.tier is not Residency.DEVICE:
            wait_s += costs.swap_s
        if unit.tier is Residency.DISK:
            # Fetched one after the other.
            before = sum(
                other.tier in (Residency.DISK, Residency.LOADING) and bool(other.waiting)
                for other in self._units.values()
                if other is not unit
            )
            wait_s += costs.fill_s * (1 + before)
        return wait_s

    def submit(self, ask: Ask) -> bool:
        """A request arrives. True where the slot stands still and has to be advanced now."""
        unit = self._units[ask.expert]
        self._seen.at_device += unit.tier is Residency.DEVICE
        self._seen.at_host += unit.tier is Residency.HOST
        unit.waiting.append(ask)
        unit.demand = self._faded(unit, ask.at_s) + 1.0
        unit.demand_at = ask.at_s
        self.queued_tokens += ask.tokens
        return self._step_until == _NEVER and self._swap_until == _NEVER

    def advance(self, now_s: float) -> float:
        """Do what is due; returns when to come again."""
        if now_s >= self._fill_until:
            self._units[self._filling].tier = Residency.HOST
            self._fill_until, self._filling = _NEVER, ""
        if now_s >= self._swap_until:
            self._units[self._unit].tier = Residency.HOST
            self._unit = self._swap_to
            self._units[self._unit].tier = Residency.DEVICE
            self._swap_until, self._since_s, self._closed_s = _NEVER, now_s, None
        if now_s >= self._step_until:
            self._step_until = _NEVER
            self._seen.tokens += len(self._left)
            self.queued_tokens -= len(self._left)
            self._left = [left - 1 for left in self._left if left > 1]
            self._seen.ended_s = max(self._seen.ended_s, now_s)
        if self._step_until == _NEVER and self._swap_until == _NEVER:
            self._decide(now_s)
        return min(self._step_until, self._swap_until, self._fill_until)

    def _decide(self, now_s: float) -> None:
        began = time.perf_counter()
        to = self._plan(now_s)
        self._seen.plan_s.append(time.perf_counter() - began)
        if to is not None:
            self._swap_to = to
            self._swap_until = now_s + self._costs.swap_s
            self._seen.switches += 1
            return
        read = 0
        waiting = self._units[self._unit].waiting
        while (
            self._closed_s is None
            and waiting
            and self._next_is(waiting[0])
            and len(self._left) < self._costs.capacity
        ):
            ask = self._took(waiting.popleft(), now_s)
            self._left.append(ask.tokens)
            read += ask.prompt_tokens
        if self._left:
            costs = self._costs
            took_s = costs.step_s + costs.each_s * len(self._left) + costs.read_s * read
            self._step_until = now_s + took_s

    def _next_is(self, ask: Ask) -> bool:
        """Return whether this request, the oldest of the running unit, may run now."""
        del ask
        return True

    def _took(self, ask: Ask, now_s: float) -> Ask:
        self._seen.waits.append(now_s - ask.at_s)
        return ask

    def _plan(self, now_s: float) -> str | None:
        """Plan as the pool's slot does; return the unit to swap to, if any."""
        slot = SlotView(
            self._unit,
            now_s - self._since_s,
            len(self._left),
            len(self._units[self._unit].waiting),
            self._drain_s,
            closing=self._closed_s is not None,
        )
        units = bounded(slot, self._views(now_s), self._policy)
        step = next_step(slot, units, self._policy)
        if isinstance(step, SwapIn):
            if self._closed_s is not None:
                drain_s = now_s - self._closed_s
                self._drain_s = max(drain_s, self._drain_s + 0.3 * (drain_s - self._drain_s))
            return step.unit
        if isinstance(step, Stay):
            self._closed_s = None
        elif self._closed_s is None:
            self._closed_s = now_s
        if not self._filling and (coming := next_fetch(slot, units, self._policy)) is not None:
            for name in units_to_evict(slot, units, self._policy, coming):
                self._units[name].tier = Residency.DISK
            self._filling, self._fill_until = coming, now_s + self._costs.fill_s
            self._units[coming].tier = Residency.LOADING
            self._seen.fills += 1
        return None

    def _views(self, now_s: float) -> list[UnitView]:
        costs = self._costs
        return [
            UnitView(
                name=name,
                tier=unit.tier,
                waiting=len(unit.waiting),
                waiting_tokens=sum(ask.tokens for ask in unit.waiting),
                oldest_s=now_s - unit.waiting[0].at_s if unit.waiting else 0.0,
                demand_per_s=self._faded(unit, now_s) * math.log(2) / _HALF_S,
                host_bytes=costs.unit_bytes,
                fill_s=costs.fill_s,
                swap_s=costs.swap_s + (costs.fill_s if unit.tier is Residency.DISK else 0.0),
                pinned=False,
                start_s=_NEVER,
            )
            for name, unit in self._units.items()
        ]

    @staticmethod
    def _faded(unit: _Unit, now_s: float) -> float:
        return unit.demand * float(0.5 ** ((now_s - unit.demand_at) / _HALF_S))


class FcfsSlot(SimSlot):
    """The same engine with first-come-first-served scheduling and LRU in host memory."""

    def __init__(
        self, names: Sequence[str], costs: Costs, policy: SwapPolicy, seen: SlotStatistics
    ) -> None:
        super().__init__(names, costs, policy, seen)
        self._order: deque[Ask] = deque()
        self._used: OrderedDict[str, None] = OrderedDict({self._unit: None})

    def submit(self, ask: Ask) -> bool:
        """See `SimSlot.submit`."""
        self._order.append(ask)
        return super().submit(ask)

    def _next_is(self, ask: Ask) -> bool:
        return self._order[0] is ask

    def _took(self, ask: Ask, now_s: float) -> Ask:
        self._order.popleft()
        return super()._took(ask, now_s)

    def _plan(self, now_s: float) -> str | None:
        self._closed_s = None
        if not self._order:
            return None
        wanted = self._order[0].expert
        if wanted == self._unit:
            return None
        # Whoever is behind the head waits for it, even for the unit that runs.
        self._closed_s = now_s
        if self._left:
            return None
        tier = self._units[wanted].tier
        if tier is Residency.HOST:
            self._used.move_to_end(wanted)
            return wanted
        if tier is Residency.DISK:
            room = self._policy.host_bytes
            while room is not None and (len(self._used) + 1) * self._costs.unit_bytes > room:
                oldest = next(name for name in self._used if name != self._unit)
                self._units[oldest].tier = Residency.DISK
                del self._used[oldest]
            self._used[wanted] = None
            self._filling, self._fill_until = wanted, now_s + self._costs.fill_s
            self._units[wanted].tier = Residency.LOADING
            self._seen.fills += 1
        return None
