"""Lets a batch's lines start: they fill what people leave idle, and give way to people.

The pools' snapshots tell gateways what runs and waits in each slot, lines of batches apart. A line
starts where all of this holds:

- Nobody waits in the slot.
- There is room in the engine's batch, beside as many requests of people as ran there at once in
  the last half minute, and one more. So the next person starts at once.
- The expert is resident, or no earlier expert of the plan is in the slot. Then a few lines, and at
  most half of those that the gateway has under way, wait in the pool, which swaps for them only
  where people don't need the running expert (`service/pool/swap_planner.py`). Meanwhile lines for
  the resident expert go on, whatever their place in the plan is: they need no load.

A line whose expert is gone since it was planned, or that recruits its experts, is routed when it
runs. It starts where any resident expert has room.

Where an engine takes one request at a time, a line runs while it is idle, and a person waits for
the rest of that line at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from service.broker.pool_state import PoolView
from service.rpc.snapshot import Queue, Snapshot
from service.types import Residency

# People's requests of this time count for the room that is left to them, in s.
_REMEMBERED_S = 30.0
# The part of an engine's batch that may wait for a cold expert.
_COLD_PART = 4
# Lines of other gateways count by the least of this time, so that a snapshot that still has lines
# of this gateway that have just ended does not count them as others'.
_SETTLED_S = 1.0
# Time between two looks at the snapshots, in s.
_LOOK_S = 0.02

_NO_QUEUE = Queue()


class _Extreme:
    """The greatest value of the last seconds, in amortised constant time."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, value: int, keep_s: float) -> None:
        """Add a value, and forget those that are older than `keep_s`."""
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now_s, value))
        while self._values[0][0] < now_s - keep_s:
            self._values.popleft()

    def greatest(self, since_s: float) -> int:
        """The greatest value since a time; 0 without one."""
        return next((value for at_s, value in self._values if at_s >= since_s), 0)


@dataclass(slots=True)
class _SlotMemory:
    people: _Extreme = field(default_factory=_Extreme)
    # Negated, because the least of them counts.
    others: _Extreme = field(default_factory=_Extreme)


@dataclass(frozen=True, slots=True)
class _Slot:
    """One slot now.

    Attributes:
        place: The pool's boot id and the slot's number.
        experts: The names of its experts.
        capacity: Requests that may run at once.
        waiting: Requests of people that wait.
        people: Requests of people, waiting and running.
        batch: Lines of batches, waiting and running.
        resident: Whether the expert in question can answer at once.
        alike: The slot's experts that are resident, or not, like the expert in question.
    """

    place: tuple[str | None, int]
    experts: tuple[str, ...]
    alike: tuple[str, ...]
    capacity: int
    waiting: int
    people: int
    batch: int
    resident: bool


class BatchPacer:
    """Lets the lines of one gateway's batches start. It outlives the gateway's configs.

    Args:
        views: Returns the state of every pool.
        members: Returns by name of a recipe of the present config the experts that it asks first.
        most: Lines of all batches that the gateway has under way at once.
        clock: Returns seconds.
        knows: Returns whether the present config has an expert of this name.
    """

    def __init__(
        self,
        views: Callable[[], Sequence[PoolView]],
        members: Callable[[], Mapping[str, tuple[str, ...]]],
        most: int,
        clock: Callable[[], float] = time.monotonic,
        knows: Callable[[str], bool] = lambda _expert: True,
    ) -> None:
        self._views = views
        self._knows = knows
        self._members = members
        self._most = most
        self._clock = clock
        # This gateway's lines under way, by expert.
        self._own: Counter[str] = Counter()
        # By model, the experts of each line that has its turn: a recipe may change meanwhile.
        self._held: dict[str, list[tuple[str, ...]]] = {}
        self._memory: dict[tuple[str | None, int], _SlotMemory] = {}
        self._changed = asyncio.Event()

    async def turn(self, models: Sequence[str]) -> str:
        """Wait until a line for one of several models may start, and return the model.

        Args:
            models: The experts and recipes with lines that are left, in the order of the plan.
        """
        while (model := self.next_model(models)) is None:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
        experts = self._experts(model)
        self._own.update(experts)
        self._held.setdefault(model, []).append(experts)
        return model

    def next_model(self, models: Sequence[str]) -> str | None:
        """Return the first model of which a line may start now; None where no line may.

        Args:
            models: The experts and recipes with lines that are left, in the order of the plan.
        """
        views = self._views()
        claimed: set[tuple[str | None, int]] = set()
        for model in models:
            slots = {expert: self._slots(views, expert) for expert in self._experts(model)}
            if not slots:
                if self._may_start_anywhere(views, model):
                    return model
                continue
            may_wait = self._may_wait(views)
            if all(
                self._may_start(expert, held, claimed, may_wait=may_wait)
                for expert, held in slots.items()
            ):
                return model
            claimed.update(slot.place for held in slots.values() for slot in held)
        return None

    def _experts(self, model: str) -> tuple[str, ...]:
        """The experts that a line asks first; none where that is decided when it runs."""
        members = self._members().get(model)
        if members is None:
            return (model,) if self._knows(model) else ()
        return members

    def ended(self, model: str) -> None:
        """Free the place of a line that had its turn."""
        if held := self._held.get(model):
            self._own.subtract(held.pop())
            if not held:
                del self._held[model]
        self._changed.set()

    def _slots(self, views: Sequence[PoolView], expert: str) -> list[_Slot]:
        now_s = self._clock()
        slots = [slot for view in views if (slot := self._slot(view, expert))]
        for slot in slots:
            self._remember(slot, now_s)
        return slots

    def _may_start_anywhere(self, views: Sequence[PoolView], model: str) -> bool:
        """Whether a line may start that any expert may answer."""
        resident = _resident(views)
        if not resident:
            return not self._held.get(model)
        now_s = self._clock()
        held = (self._slots(views, expert) for expert in sorted(resident))
        return any(
            self._has_room(slot, slots, now_s) for slots in held for slot in slots if slot.resident
        )

    def _may_wait(self, views: Sequence[PoolView]) -> bool:
        """Whether one more line may wait for an expert that is not resident.

        Half of the lines under way may, so that they never hold up those that can be answered.
        """
        resident = _resident(views)
        waiting = sum(count for name, count in self._own.items() if name not in resident)
        return waiting < max(1, self._most // 2)

    def _may_start(
        self,
        expert: str,
        slots: Sequence[_Slot],
        claimed: set[tuple[str | None, int]],
        *,
        may_wait: bool,
    ) -> bool:
        """Whether one more line for an expert may start now.

        Args:
            expert: The expert.
            slots: The slots that can have it.
            claimed: The slots of models that come earlier in the plan.
            may_wait: Whether it may wait for an expert that is not resident.
        """
        if not slots:
            # One line makes the service start a pool for the expert.
            return may_wait and self._own[expert] < 1
        now_s = self._clock()
        resident = [slot for slot in slots if slot.resident]
        free = [slot for slot in slots if may_wait and slot.place not in claimed]
        return any(self._has_room(slot, slots, now_s) for slot in resident or free)

    def _has_room(self, slot: _Slot, slots: Sequence[_Slot], now_s: float) -> bool:
        if slot.waiting:
            return False
        # Lines under way may be in any slot that has their expert.
        alike = sum(one.experts == slot.experts for one in slots)
        own = sum(self._own[name] for name in slot.alike) / max(1, alike)
        if not slot.resident:
            return own < max(1, slot.capacity // _COLD_PART)
        memory = self._memory[slot.place]
        lines = own - memory.others.greatest(now_s - _SETTLED_S)
        if not lines:
            return slot.people < slot.capacity
        peak = memory.people.greatest(now_s - _REMEMBERED_S)
        return lines + (peak + 1 if peak else 0) < slot.capacity

    def _remember(self, slot: _Slot, now_s: float) -> None:
        if len(self._memory) > 1000:
            self._memory.clear()
        memory = self._memory.setdefault(slot.place, _SlotMemory())
        memory.people.add(now_s, slot.people, _REMEMBERED_S)
        own = sum(self._own[name] for name in slot.experts)
        memory.others.add(now_s, -max(0, slot.batch - own), _SETTLED_S)

    @staticmethod
    def _slot(view: PoolView, expert: str) -> _Slot | None:
        """The slot of an expert in a pool; None where the pool can't serve it."""
        snapshot: Snapshot = view.snapshot
        state = snapshot.experts.get(expert)
        if state is None or snapshot.draining or state.state is Residency.FAILED:
            return None
        resident = state.state is Residency.DEVICE
        names = tuple(name for name, other in snapshot.experts.items() if other.slot == state.slot)
        queues = [snapshot.queues.get(name, _NO_QUEUE) for name in names]
        return _Slot(
            (view.boot, state.slot),
            names,
            tuple(
                name
                for name in names
                if (snapshot.experts[name].state is Residency.DEVICE) == resident
            ),
            max(1, snapshot.capacity.get(expert, 1)),
            sum(queue.waiting - queue.batch_waiting for queue in queues),
            sum(queue.people for queue in queues),
            sum(queue.batch_waiting + queue.batch_running for queue in queues),
            resident,
        )


def _resident(views: Sequence[PoolView]) -> set[str]:
    """The experts that can answer at once in some pool."""
    return {
        name
        for view in views
        for name, state in view.snapshot.experts.items()
        if state.state is Residency.DEVICE
    }
