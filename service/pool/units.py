"""The units of a shared slot, and what was measured of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.types import Residency

_HALF_LIFE_S = 30.0
# The decayed sum of one request per second, in the long run: the integral of the weights.
_MEAN_LIFE_S = _HALF_LIFE_S / math.log(2)
_EWMA = 0.3


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that a slot holds as one: an expert, and the adapters that come with it.

    Attributes:
        name: The name of the expert with the weights.
        experts: That expert and its adapters.
        pinned: Whether the weights stay in host memory.
        size_bytes: Bytes of the weights in memory, by their files; 0 where they are not known.
        needs: The unit whose weights this one shares; None where it has its own. Both are in
            one slot.
    """

    name: str
    experts: tuple[str, ...]
    pinned: bool = False
    size_bytes: int = 0
    needs: str | None = None


@dataclass(slots=True)
class UnitState:
    """What was measured of one unit, and where it is. Times and sizes are guesses at first.

    Attributes:
        host_bytes: Bytes of its weights in host memory.
        fill_s: How long loading it from disk to host memory takes.
        swap_s: How long swapping it in from host memory takes.
        pinned: Whether it stays in host memory.
        tier: Where its weights are.
        demand: Decayed demand as of `demand_at`.
        demand_at: When demand was last recorded.
        failed_until: Until when it is left alone after a failure.
        deaths: How often in a row the engine died while it was loaded or swapped in.
        wanted: Whether an operator asked for it to be loaded, and it was not since.
        start_s: How long an engine takes to start with it; 0: not measured.
        stop_s: How long an engine that started with it takes to stop; 0: not measured.
        measured: Whether `swap_s` was measured.
        starts: Whether its next swap has to start an engine.
    """

    host_bytes: int = 0
    fill_s: float = 0.0
    swap_s: float = 0.0
    pinned: bool = False
    tier: Residency = Residency.DISK
    demand: float = 0.0
    demand_at: float = 0.0
    failed_until: float = 0.0
    deaths: int = 0
    wanted: bool = False
    start_s: float = 0.0
    stop_s: float = 0.0
    measured: bool = False
    starts: bool = False

    def record_swap(self, swap_s: float, *, started: bool) -> None:
        """Record how long a swap took: the first replaces the guess, later ones are averaged.

        Args:
            swap_s: The time.
            started: Whether an engine had to be started for it.
        """
        self.starts = False
        if started:
            self.start_s = swap_s
        elif self.measured:
            self.swap_s += _EWMA * (swap_s - self.swap_s)
        else:
            self.swap_s, self.measured = swap_s, True

    def record_demand(self, amount: float, now_s: float) -> None:
        """Add demand, as a utility."""
        self.demand = self.decayed_demand(now_s) + amount
        self.demand_at = now_s

    def decayed_demand(self, now_s: float) -> float:
        """The demand so far, which halves every 30 s."""
        if not self.demand:
            return 0.0
        decayed: float = self.demand * 0.5 ** ((now_s - self.demand_at) / _HALF_LIFE_S)
        return decayed

    def demand_per_s(self, now_s: float) -> float:
        """Requests per second, as a moving average."""
        return self.decayed_demand(now_s) / _MEAN_LIFE_S

    def reset_residency(self) -> None:
        """Keep the measurements of a unit that moves to another slot, and reset its residency."""
        self.tier = Residency.DISK
        self.deaths = 0
        self.starts = False


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap that happened; `began_s` is `time.monotonic` seconds."""

    unit: str
    method: str
    reason: str
    began_s: float
    swap_s: float
