"""The units of a shared slot: who they are, and what is known of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.types import Residency

_HALF_S = 30.0
# The faded sum of one request per second, in the long run: the integral of its weights.
_MEAN_S = _HALF_S / math.log(2)
_EWMA = 0.3


@dataclass(frozen=True, slots=True)
class Unit:
    """An expert with full weights, and the adapters that come with it.

    size_bytes: of its weights in memory, as its files tell; 0 where they are not known.
    needs: the unit on whose weights this one runs, having none of its own; both are in one slot.
    """

    name: str
    experts: tuple[str, ...]
    pinned: bool = False
    size_bytes: int = 0
    needs: str = ""


@dataclass(slots=True)
class UnitState:
    """What is known of one unit. Times in s, sizes in bytes; guesses until it was measured.

    wanted: an operator asked for it to be held, and it has not been since. start_s: what another
    engine takes to start with it; stop_s: what an engine that did takes to end; 0: not measured.
    measured: `swap_s` is no guess any more. starts: its next exchange has to start an engine.
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
        """An exchange was measured: the first takes the guess's place, later ones are averaged.

        `started`: an engine had to be started for it.
        """
        self.starts = False
        if started:
            self.start_s = swap_s
        elif self.measured:
            self.swap_s += _EWMA * (swap_s - self.swap_s)
        else:
            self.swap_s, self.measured = swap_s, True

    def record_demand(self, amount: float, now_s: float) -> None:
        """Somebody wants it: utility."""
        self.demand = self.decayed_demand(now_s) + amount
        self.demand_at = now_s

    def decayed_demand(self, now_s: float) -> float:
        """What was asked, the weight of each asking halving every 30 s."""
        if not self.demand:
            return 0.0
        faded: float = self.demand * 0.5 ** ((now_s - self.demand_at) / _HALF_S)
        return faded

    def demand_per_s(self, now_s: float) -> float:
        """Requests per second, as a moving average."""
        return self.decayed_demand(now_s) / _MEAN_S

    def reset_residency(self) -> None:
        """It goes to another slot: what was measured stays, where it was does not."""
        self.tier = Residency.DISK
        self.deaths = 0
        self.starts = False


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap that happened: times are `time.monotonic` seconds."""

    unit: str
    method: str
    reason: str
    began_s: float
    swap_s: float
