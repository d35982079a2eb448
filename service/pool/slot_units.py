"""The units of a shared slot, and their measured sizes and times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.types import Residency

_HALF_LIFE_S = 30.0
# In the long run, one request per second adds up to this decayed sum: the integral of the weights.
_MEAN_LIFE_S = _HALF_LIFE_S / math.log(2)
_EWMA = 0.3


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that a slot holds as one: an expert, and the adapters that come with it.

    Attributes:
        name: The name of the expert with the weights.
        experts: The names of that expert and its adapters.
        pinned: Whether the weights stay in host memory.
        size_bytes: Bytes of the weights in memory, computed from their files; 0 where unknown.
        needs: The unit whose weights this unit shares, or None where it has its own weights. Both
            units are in the same slot.
    """

    name: str
    experts: tuple[str, ...]
    pinned: bool = False
    size_bytes: int = 0
    needs: str | None = None


@dataclass(slots=True)
class UnitState:
    """The residency and the measurements of one unit. Times and sizes are guesses at first.

    Attributes:
        host_bytes: Bytes of the weights in host memory.
        fill_s: Seconds to load the weights from disk to host memory.
        swap_s: Seconds to swap the unit in from host memory.
        pinned: Whether the unit stays in host memory.
        tier: Where the weights are.
        demand: The decayed demand as of `demand_at`.
        demand_at: When demand was last recorded.
        failed_until: When a unit that failed may be tried again.
        deaths: How often in a row the engine died while the unit was loaded or swapped in.
        wanted: Whether an operator asked to load the unit and it has not been loaded since.
        start_s: Seconds that an engine takes to start with the unit; 0 where not measured.
        stop_s: Seconds that an engine takes to stop after it started with the unit; 0 where not
            measured.
        stall_s: Longest time for which the last load may have kept a GPU's kernels waiting.
        measured: Whether `swap_s` was measured.
        starts: Whether the unit's next swap has to start an engine.
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
    stall_s: float = 0.0
    measured: bool = False
    starts: bool = False

    def record_swap(self, swap_s: float, *, started: bool) -> None:
        """Record how long a swap took.

        The first measurement replaces the guess. Later measurements are averaged.

        Args:
            swap_s: The duration of the swap in seconds.
            started: Whether the swap had to start an engine.
        """
        self.starts = False
        if started:
            self.start_s = swap_s
        elif self.measured:
            self.swap_s += _EWMA * (swap_s - self.swap_s)
        else:
            self.swap_s, self.measured = swap_s, True

    def record_demand(self, amount: float, now_s: float) -> None:
        """Add demand, measured as utility."""
        self.demand = self.decayed_demand(now_s) + amount
        self.demand_at = now_s

    def decayed_demand(self, now_s: float) -> float:
        """Return the demand so far. It halves every 30 s."""
        if not self.demand:
            return 0.0
        decayed: float = self.demand * 0.5 ** ((now_s - self.demand_at) / _HALF_LIFE_S)
        return decayed

    def demand_per_s(self, now_s: float) -> float:
        """Return the moving average of requests per second."""
        return self.decayed_demand(now_s) / _MEAN_LIFE_S

    def reset_residency(self) -> None:
        """Keep the measurements of a unit that moves to another slot, and reset its residency."""
        self.tier = Residency.DISK
        self.deaths = 0
        self.starts = False


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap that happened. `began_s` is a `time.monotonic` time in seconds."""

    unit: str
    method: str
    reason: str
    began_s: float
    swap_s: float
