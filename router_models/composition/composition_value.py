"""A composition: what is bought, where it runs, and what it gives. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from router_models.composition.composition_problem import (
    Accelerators,
    Floats,
    Problem,
    SwapMethod,
    Tier,
    Unit,
)
from router_models.composition.engine_packings import Pattern, pack
from router_models.composition.mixed_integer_program import Packing, Place, Program, clusters
from service.types import Recipe


@dataclass(frozen=True, slots=True)
class Holding:
    """What one accelerator, or several alike, hold.

    Attributes:
        kind: The kind of accelerators.
        replicas: How many hold the same.
        slots: Number of slots in which units take turns; 0: each unit has an engine of its own.
        residents: The units that are at home, or have an engine of their own.
        guests: Units that take turns in the slots, with their tier.
    """

    kind: Accelerators
    replicas: int
    slots: int
    residents: tuple[Unit, ...]
    guests: tuple[tuple[Unit, Tier], ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units that run there."""
        return (*self.residents, *(unit for unit, _ in self.guests))

    @property
    def is_sound(self) -> bool:
        """Whether every unit has what it needs here: another expert, or a home of its family."""
        experts = {expert for unit in self.units for expert in unit.experts}
        if any(unit.needs is not None and unit.needs not in experts for unit in self.units):
            return False
        families = {unit.family for unit in self.residents}
        inplace = self.kind.method is SwapMethod.INPLACE
        return all(
            tier is Tier.RESPAWN or not inplace or unit.family in families
            for unit, tier in self.guests
        )

    @property
    def pinned(self) -> tuple[Unit, ...]:
        """The units that stay in host memory."""
        if not self.slots or self.kind.method is SwapMethod.RESPAWN:
            return ()
        return (*self.residents, *(unit for unit, tier in self.guests if tier is Tier.WARM))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for weights, of one replica."""
        spare = self.slots * max((unit.adapter_bytes for unit in self._loose), default=0)
        return self.host_weight_bytes + spare + sum(unit.adapter_bytes for unit in self._kept)

    @property
    def host_weight_bytes(self) -> int:
        """Bytes of host memory for weights without adapters: the config's `swap.host_bytes`."""
        spare = self.slots * max((unit.weight_bytes for unit in self._loose), default=0)
        return sum(unit.weight_bytes for unit in self._kept) + spare

    @property
    def _kept(self) -> tuple[Unit, ...]:
        """The units that stay in host memory; on a unified machine those that run, too."""
        return self.residents if self.kind.unified and not self.pinned else self.pinned

    @property
    def _loose(self) -> tuple[Unit, ...]:
        """The guests that come into host memory for their turn only."""
        if not self.kind.unified:
            return ()
        return tuple(u for u, tier in self.guests if tier in (Tier.COLD, Tier.RESPAWN))

    @property
    def device_bytes(self) -> int:
        """Bytes that one replica uses of its accelerator."""
        kind = self.kind
        if not self.slots:
            sizes = sum(unit.size_bytes + kind.engine_bytes for unit in self.residents)
            return kind.replica_bytes + sizes
        if kind.unified:
            return kind.replica_bytes + self.slots * kind.engine_bytes + self.host_bytes
        largest = max(unit.size_bytes for unit in self.units)
        return kind.replica_bytes + self.slots * (largest + kind.engine_bytes)


@dataclass(frozen=True, slots=True)
class Composition:
    """A solution of a composition problem.

    Attributes:
        recipes: The recipe of each category.
        experts: The experts that are bought, in the order of the problem.
        holdings: What the accelerators hold.
        quality: Expected quality of a request.
        cost: Expected cost of a request.
        wait_s: For each category, the bound on its expected wait for swaps, in s.
        mean_wait_s: The same over all traffic.
        value: Quality less the price of waiting.
        gap: By how much another composition could be better in `value`, at most.
        exact: Whether it is proven that none is, but for rounding.
        seconds: How long the search took.
    """

    recipes: Mapping[str, Recipe]
    experts: tuple[str, ...]
    holdings: tuple[Holding, ...]
    quality: float
    cost: float
    wait_s: Mapping[str, float]
    mean_wait_s: float
    value: float
    gap: float
    exact: bool
    seconds: float

    @property
    def used_bytes(self) -> int:
        """Bytes used on all accelerators."""
        return sum(one.replicas * one.device_bytes for one in self.holdings)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory beside accelerators."""
        apart = (h for h in self.holdings if not h.kind.unified)
        return sum(one.replicas * one.host_bytes for one in apart)


def shortest_waits(problem: Problem, holdings: Sequence[Holding]) -> dict[str, float]:
    """Return for each expert that is held the least bound on its wait for swaps, in s."""
    found = dict.fromkeys(problem.remote, 0.0)
    for held in holdings:
        tiers = [(unit, Tier.HOME) for unit in held.residents]
        for unit, tier in (*tiers, *held.guests):
            wait = problem.wait_s(unit, tier, held.kind)
            for expert in unit.experts:
                found[expert] = min(found.get(expert, wait), wait)
    return found


def use_idle_accelerators(problem: Problem, found: Composition) -> Composition:
    """Return a composition in which accelerators that are left over run more of the same.

    Each goes to the holding that gets the most traffic for each of its replicas. Weights in host
    memory bound them.
    """
    holdings = list(found.holdings)
    for kind in problem.accelerators:
        mine = [i for i, held in enumerate(holdings) if held.kind is kind]
        left = kind.count - sum(holdings[i].replicas for i in mine)
        while left > 0:
            free_bytes = (
                problem.bounds.host_bytes - replace(found, holdings=tuple(holdings)).pinned_bytes
            )
            traffic = _traffic(problem, found.recipes, holdings)
            fitting = [i for i in mine if holdings[i].host_bytes <= free_bytes]
            if not fitting:
                break
            most = max(fitting, key=lambda i: traffic[i] / holdings[i].replicas)
            holdings[most] = replace(holdings[most], replicas=holdings[most].replicas + 1)
            left -= 1
    return replace(found, holdings=tuple(holdings))


def _traffic(
    problem: Problem, recipes: Mapping[str, Recipe], holdings: Sequence[Holding]
) -> list[float]:
    """Return the share of the traffic that reaches each holding, spread over equal replicas."""
    asked: dict[str, float] = {}
    for c, category in enumerate(problem.categories):
        recipe = recipes[category]
        r = problem.recipes.index(recipe)
        for i, expert in enumerate(recipe.experts):
            share = float(problem.share[c] * problem.reach[c, r, i])
            asked[expert] = asked.get(expert, 0.0) + share
    experts = [{expert for unit in held.units for expert in unit.experts} for held in holdings]
    copies = {
        expert: sum(
            held.replicas for held, own in zip(holdings, experts, strict=True) if expert in own
        )
        for expert in asked
    }
    return [
        sum(asked[expert] * held.replicas / copies[expert] for expert in own if expert in asked)
        for held, own in zip(holdings, experts, strict=True)
    ]


def evaluate(
    problem: Problem, chosen: Sequence[int], waits: Mapping[str, float]
) -> tuple[float, float, Floats]:
    """Return quality, cost, and each category's wait, for the index of each category's recipe."""
    at = np.arange(len(problem.categories)), np.array(chosen)
    each = np.zeros(len(problem.categories))
    for c, r in enumerate(chosen):
        for i, expert in enumerate(problem.recipes[r].experts):
            each[c] += problem.reach[c, r, i] * waits[expert]
    share = problem.share
    return float(share @ problem.quality[at]), float(share @ problem.cost[at]), each


def read_holdings(
    problem: Problem, program: Program, values: Floats, packings: Mapping[str, Packing]
) -> list[Holding] | None:
    """Read the holdings from the columns' values.

    Returns:
        The holdings, or None where the engines of a relaxed packing fit no accelerators.
    """
    found: list[Holding] = []
    taken = [p for p in program.places if values[p.column] > 0.5]
    for kind in problem.accelerators:
        here = [p for p in taken if p.kind is kind]
        bins = _own_bins(problem, kind, packings[kind.name], program, values, here)
        if bins is None:
            return None
        held = [Holding(kind, 1, 0, tuple(units)) for units in bins]
        for slots in range(1, kind.most_slots + 1):
            column = program.layouts.get((kind.name, slots))
            count = round(values[column]) if column is not None else 0
            if count:
                held += _shared(kind, slots, count, [p for p in here if p.slots == slots], values)
        found += held
    return _merged(found)


def _own_bins(
    problem: Problem,
    kind: Accelerators,
    packing: Packing,
    program: Program,
    values: Floats,
    here: Sequence[Place],
) -> list[list[Unit]] | None:
    if packing.indexed:
        indexed: list[list[Unit]] = [[] for _ in range(kind.count)]
        for unit, b, column in program.assigned[kind.name]:
            if values[column] > 0.5:
                indexed[b].append(unit)
        return [units for units in indexed if units]
    own = [
        place.unit
        for place in here
        if place.tier is Tier.OWN
        for _ in range(round(values[place.column]))
    ]
    if not own:
        return []
    columns = program.patterns[kind.name]
    if problem.bounds.rate_per_s:
        bins_used = sum(round(values[column]) for column in columns)
        spread = _spread(own, _loads(problem, program, values), kind, bins_used)
        if spread is not None:
            return spread
    if packing.patterns is not None:
        bins: list[Pattern] = []
        for column, pattern in zip(columns, packing.patterns, strict=True):
            bins += [pattern] * round(values[column])
        matched = _matched(own, packing, bins)
        if all(len({u.name for u in units}) == len(units) for units in matched):
            return [units for units in matched if units]
        count = len(bins)
    else:
        count = round(values[columns[0]])
    sizes = [unit.size_bytes + kind.engine_bytes for unit in own]
    packed = pack(sizes, count, kind.room_bytes, names=[unit.name for unit in own])
    return None if packed is None else [[own[i] for i in items] for items in packed if items]


def _loads(problem: Problem, program: Program, values: Floats) -> dict[str, float]:
    """Return the load of each copy of a unit, by the unit's name: that of its experts, shared."""
    asked, bounds = problem.asked(), problem.bounds
    chosen = values[program.choices] > 0.5
    found: dict[str, float] = {}
    for experts, units in clusters(problem):
        load = sum(
            bounds.rate_per_s
            * problem.busy_s[expert]
            * float((problem.share[:, None] * asked[expert])[chosen].sum())
            for expert in experts
            if expert in asked
        )
        copies = sum(round(values[p.column]) for p in program.places if p.unit.name in units)
        found |= dict.fromkeys(units, load / max(1, copies))
    return found


def _spread(
    own: Sequence[Unit], loads: Mapping[str, float], kind: Accelerators, bins: int
) -> list[list[Unit]] | None:
    """Spread engines over accelerators by their load: the hottest first, each where least is.

    A hot expert so gets accelerators of its own where there is room for it (Graham's rule of the
    longest processing time first).

    Returns:
        The units of each accelerator; None where they don't fit in this order.
    """
    held: list[list[Unit]] = [[] for _ in range(bins)]
    load = [0.0] * bins
    left = [kind.room_bytes] * bins
    order = sorted(own, key=lambda unit: (-loads[unit.name], -unit.size_bytes, unit.name))
    for unit in order:
        size = unit.size_bytes + kind.engine_bytes
        open_ = [b for b in range(bins) if left[b] >= size and unit not in held[b]]
        if not open_:
            return None
        b = min(open_, key=lambda b: (load[b], left[b], b))
        held[b].append(unit)
        load[b] += loads[unit.name]
        left[b] -= size
    return held if all(held) else None


def _matched(own: Sequence[Unit], packing: Packing, bins: Sequence[Pattern]) -> list[list[Unit]]:
    """Give the largest units the largest slots, which fits whenever anything does."""
    slots = sorted(
        ((size, nth, b) for b, pattern in enumerate(bins) for nth, size in enumerate(pattern)),
        key=lambda one: (-one[0], one[1], one[2]),
    )
    units = sorted(own, key=lambda unit: (-packing.sizes[unit.name], unit.name))
    held: list[list[Unit]] = [[] for _ in bins]
    for unit, (_, _, b) in zip(units, slots, strict=False):
        held[b].append(unit)
    return held


def _shared(
    kind: Accelerators, slots: int, count: int, here: Sequence[Place], values: Floats
) -> list[Holding]:
    homes = sorted(
        (p.unit for p in here if p.tier is Tier.HOME for _ in range(round(values[p.column]))),
        key=lambda unit: (unit.family, unit.name),
    )
    residents = [homes[i::count] for i in range(count)]
    guests: list[list[tuple[Unit, Tier]]] = [[] for _ in range(count)]
    best: dict[str, Place] = {}
    for place in here:
        if place.tier is not Tier.HOME:
            known = best.get(place.unit.name)
            if known is None or place.wait_s < known.wait_s:
                best[place.unit.name] = place
    for place in best.values():
        inplace = place.tier is not Tier.RESPAWN and kind.method is SwapMethod.INPLACE
        hosts = [
            i
            for i in range(count)
            if place.unit not in residents[i]
            and (not inplace or any(u.family == place.unit.family for u in residents[i]))
        ]
        if hosts:
            least = min(hosts, key=lambda i: (len(guests[i]), i))
            guests[least].append((place.unit, place.tier))
    return [
        Holding(kind, 1, slots, tuple(residents[i]), tuple(guests[i]))
        for i in range(count)
        if residents[i] or guests[i]
    ]


def _merged(holdings: Sequence[Holding]) -> list[Holding]:
    """Make accelerators that hold the same replicas of one."""
    groups: Counter[Holding] = Counter()
    for held in holdings:
        residents = tuple(sorted(held.residents, key=lambda unit: unit.name))
        # Slots without guests are engines of their own, where no more than they are resident.
        slots = held.slots if held.guests else 0
        groups[Holding(held.kind, 1, slots, residents, held.guests)] += 1
    return [
        Holding(one.kind, count, one.slots, one.residents, one.guests)
        for one, count in groups.items()
    ]


def by_expert(holdings: Sequence[Holding]) -> dict[str, list[Holding]]:
    """Return where each expert is held."""
    found: dict[str, list[Holding]] = defaultdict(list)
    for held in holdings:
        for expert in dict.fromkeys(e for unit in held.units for e in unit.experts):
            found[expert].append(held)
    return dict(found)


def pruned(problem: Problem, holdings: Sequence[Holding], needed: Collection[str]) -> list[Holding]:
    """Leave out units without which no expert that is needed waits longer.

    The program prefers less memory by so little that its tolerance may hide it. With a rate every
    copy counts, and nothing is left out.
    """
    held = list(holdings)
    if problem.bounds.rate_per_s:
        return held

    def waits(some: Sequence[Holding]) -> dict[str, float]:
        found = shortest_waits(problem, some)
        return {expert: found[expert] for expert in needed if expert in found}

    least = waits(held)
    for at in range(len(held)):
        for unit in sorted(held[at].units, key=lambda unit: -unit.size_bytes):
            one = held[at]
            less = replace(
                one,
                residents=tuple(u for u in one.residents if u != unit),
                guests=tuple(guest for guest in one.guests if guest[0] != unit),
            )
            if less.is_sound and waits([*held[:at], less, *held[at + 1 :]]) == least:
                held[at] = less
    return _merged([replace(h, replicas=1) for h in held for _ in range(h.replicas) if h.units])
