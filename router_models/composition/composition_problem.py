"""The composition problem: experts, their units of weights, accelerators, recipes and bounds. Pure.

A *unit* is weights that an engine holds as one, and may serve several experts: a base and its
adapters. An expert may have several units, such as a merged form beside an adapter, and quantised
alternatives are experts of their own of which at most one is bought.

An accelerator either gives each of its units an engine of its own, or has some number of equal
slots in which units take turns. In a slot one unit is at home, and the others are its guests. A
request for a guest waits for a swap, and the swap back home counts with it. Every swap is one way
into or out of a guest, so that for any order of requests

    Σ swaps ≤ Σ over requests for guests of (swap in + swap back),

which is the linear bound on the wait that the problem uses. It is the time of swaps, not of queues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from service.types import Recipe

Floats = NDArray[np.float64]


class SwapMethod(StrEnum):
    """How a slot exchanges units: the config's `swap.method`, with `auto` resolved."""

    INPLACE = "inplace"
    SLEEP = "sleep"
    RESPAWN = "respawn"


class Tier(StrEnum):
    """Where a placed unit waits for requests.

    OWN: in an engine of its own. HOME: in its slot, unless a guest runs there. WARM: a guest in
    host memory. COLD: a guest on disk, for an engine of its family. RESPAWN: a guest on disk, for
    which an engine starts.
    """

    OWN = "own"
    HOME = "home"
    WARM = "warm"
    COLD = "cold"
    RESPAWN = "respawn"


RESIDENT = (Tier.OWN, Tier.HOME)


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that an engine holds as one.

    Attributes:
        name: The unit's name, unique in the problem.
        experts: The experts that it serves.
        size_bytes: Bytes of the weights and adapters in memory.
        adapter_bytes: The part of them that adapters take.
        family: Units of one family can be exchanged in a running engine.
        swap_s: Seconds to swap it in from host memory.
        load_s: Seconds to load it from disk to host memory.
        start_s: Seconds to start an engine with it.
        needs: An expert that must be held on the same machine, as a base of merged weights is.
    """

    name: str
    experts: tuple[str, ...]
    size_bytes: int
    family: str = ""
    swap_s: float = 0.05
    load_s: float = 5.0
    start_s: float = 40.0
    needs: str | None = None
    adapter_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes without the adapters."""
        return self.size_bytes - self.adapter_bytes


@dataclass(frozen=True, slots=True)
class Accelerators:
    """Equal accelerators.

    Attributes:
        name: A name for the config's pools.
        count: How many there are.
        memory_bytes: Memory of each.
        engine_bytes: Bytes of each engine beside the weights: its KV cache and its process.
        replica_bytes: Bytes of each pool's own process.
        unified: Whether weights run from host memory, so that `memory_bytes` is of the whole
            machine. There is then one accelerator.
        method: How its slots exchange units.
        most_slots: The most slots in which units take turns, for each accelerator.
    """

    name: str
    count: int
    memory_bytes: int
    engine_bytes: int = 0
    replica_bytes: int = 0
    unified: bool = False
    method: SwapMethod = SwapMethod.RESPAWN
    most_slots: int = 8

    @property
    def room_bytes(self) -> int:
        """Bytes for engines and weights."""
        return self.memory_bytes - self.replica_bytes

    def slot_bytes(self, slots: int) -> int:
        """Bytes of weights that each of this many equal slots can hold; may be negative."""
        if self.unified:
            return self.room_bytes - slots * self.engine_bytes
        return self.room_bytes // slots - self.engine_bytes


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a composition.

    Attributes:
        cost: Most expected cost of a request.
        wait_s: Most expected wait for swaps in any category, in s.
        host_bytes: Host memory for weights that wait beside accelerators.
        rate_per_s: Requests per second that the copies of experts must keep up with; 0: any.
        utilisation: The share of its time for which a copy may be busy.
    """

    cost: float = float("inf")
    wait_s: float = float("inf")
    host_bytes: float = float("inf")
    rate_per_s: float = 0.0
    utilisation: float = 0.7


@dataclass(frozen=True, slots=True)
class Problem:
    """A composition problem of C categories and R recipes.

    Attributes:
        categories: The categories.
        recipes: The recipes.
        share: (C,), each category's share of the traffic.
        quality: (C, R), expected quality in [0, 1].
        cost: (C, R), expected cost of a request.
        reach: (C, R, members and later experts of a recipe), probability that each of the recipe's
            experts is asked, in the order of `Recipe.experts`; padded with 0.
        units: The units to choose among.
        accelerators: The kinds of accelerators.
        bounds: The bounds.
        remote: Experts that need no memory here.
        required: Experts that must be bought, such as the general fallback.
        exclusive: Groups of experts that are alternatives of one: at most one of each is bought.
        busy_s: Seconds of an accelerator for one request of each expert; needed with a rate.
        time_price: Quality that one second of waiting for swaps is worth.
    """

    categories: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    share: Floats
    quality: Floats
    cost: Floats
    reach: Floats
    units: tuple[Unit, ...]
    accelerators: tuple[Accelerators, ...]
    bounds: Bounds = field(default_factory=Bounds)
    remote: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    exclusive: tuple[frozenset[str], ...] = ()
    busy_s: Mapping[str, float] = field(default_factory=dict)
    time_price: float = 0.0

    def __post_init__(self) -> None:
        """Check the shapes and names.

        Raises:
            ValueError: They do not fit together.
        """
        cells = (len(self.categories), len(self.recipes))
        for name in ("quality", "cost"):
            if (found := getattr(self, name).shape) != cells:
                raise ValueError(f"{name}: the shape {cells} is needed, not {found}")
        if self.share.shape != cells[:1] or (self.share < 0).any():
            raise ValueError(f"share: {cells[0]} numbers >= 0 are needed")
        if self.reach.shape[:2] != cells:
            raise ValueError(f"reach: the shape {cells} and experts is needed")
        names = [unit.name for unit in self.units]
        if len(set(names)) != len(names):
            raise ValueError("units: names must be unique")
        for one in self.accelerators:
            if one.unified and one.count != 1:
                raise ValueError(f"{one.name}: there is one machine, not {one.count}")
            if not one.unified and any(unit.needs for unit in self.units):
                raise ValueError(f"{one.name}: units that need others are for one machine")
        known = self.local | self.remote
        for expert in self.experts:
            if expert not in known:
                raise ValueError(f"no size is given for {expert}")
        for expert in sorted(self.required - known):
            raise ValueError(f"no size is given for {expert}, which is required")
        if self.bounds.rate_per_s:
            for expert in self.experts:
                if expert in self.local and expert not in self.busy_s:
                    raise ValueError(f"a rate is given, and no busy seconds of {expert}")

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of all recipes, in the order of their first recipe."""
        return tuple(dict.fromkeys(e for recipe in self.recipes for e in recipe.experts))

    @property
    def local(self) -> frozenset[str]:
        """The experts that have a unit."""
        return frozenset(expert for unit in self.units for expert in unit.experts)

    def asked(self) -> dict[str, Floats]:
        """For each expert, the probability (C, R) that a request with a recipe asks it."""
        found = {e: np.zeros(self.cost.shape) for e in self.experts}
        for r, recipe in enumerate(self.recipes):
            for i, expert in enumerate(recipe.experts):
                found[expert][:, r] = self.reach[:, r, i]
        return found

    def wait_s(self, unit: Unit, tier: Tier, kind: Accelerators) -> float:
        """The bound on swap seconds for a request to a unit that waits in this tier.

        It counts the swap in, and the swap back of whatever may be at home there.
        """
        if tier in RESIDENT:
            return 0.0
        fits = [u for u in self.units if u.size_bytes <= kind.slot_bytes(1)]
        if tier is Tier.RESPAWN:
            return unit.start_s + max((u.start_s for u in fits), default=0.0)
        same = [
            u.swap_s for u in fits if kind.method is SwapMethod.SLEEP or u.family == unit.family
        ]
        brought = unit.swap_s + (unit.load_s if tier is Tier.COLD else 0.0)
        return brought + max(same, default=0.0)

    def copies(self, unit: Unit, tier: Tier, kind: Accelerators) -> float:
        """How many copies of a unit one place is, for the load that it can bear.

        A guest loses the time of swaps: it is less than one copy.
        """
        wait_s = self.wait_s(unit, tier, kind)
        if wait_s <= 0:
            return 1.0
        busy = [self.busy_s.get(expert, 0.0) for expert in unit.experts]
        return min(one / (one + wait_s) for one in busy)

    def tiers(self, kind: Accelerators) -> tuple[Tier, ...]:
        """The tiers that guests may have on an accelerator.

        On accelerators with memory of their own guests are either all in host memory, or none is:
        the pool's bound on host memory would have to hold the largest of the others, too.
        """
        if kind.unified:
            if kind.method is SwapMethod.INPLACE:
                return (Tier.WARM, Tier.COLD, Tier.RESPAWN)
            return (Tier.RESPAWN,)
        return (Tier.RESPAWN,) if kind.method is SwapMethod.RESPAWN else (Tier.WARM,)
