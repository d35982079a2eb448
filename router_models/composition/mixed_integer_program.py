"""The composition problem as a mixed-integer linear program.

Equal accelerators have no index of their own. The program counts how many have which layout:
patterns of engines of their own (`patterns`), or a number of equal slots in which units take turns.
Symmetric solutions, which would make the search hopeless, therefore do not exist.

    max  Σ_c p_c (Σ_r Q[c,r]·x[c,r] − price · wait[c])
    s.t. Σ_r x[c,r] = 1                                     a recipe for each category
         Σ_{r asks e} x[c,r] ≤ y[e]                         for each category and expert
         y[e] ≤ Σ places of units that serve e
         Σ_{units ≥ s} own ≤ Σ patterns · slots ≥ s         for each size s (Hall's condition)
         Σ home[k] ≤ k · layouts[k],  guests ≤ layouts or homes of their family
         d_j[c,e] ≥ Σ_r reach·x[c,r] − Σ places of e with a wait below level j
         wait[c] = Σ_e Σ_j (level_j − level_{j−1}) · d_j[c,e]
         Σ layouts ≤ accelerators;  host bytes, mean cost and wait within their bounds
         load[u] ≤ 0.7 · copies of u,  Σ load ≤ 0.7 · Σ layouts    with a rate

x, y and the places are binary, and the layouts are integers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from router_models.composition.composition_problem import (
    RESIDENT,
    Accelerators,
    Problem,
    SwapMethod,
    Tier,
    Unit,
)
from router_models.composition.engine_packings import Pattern

Floats = NDArray[np.float64]

# Of two equally good compositions, the one that uses less memory and costs less is better by this.
THRIFT = 1e-6
# Categories without traffic count as little as this, so that they get a good recipe all the same.
_LEAST_SHARE = 1e-7
_GIB = 1024**3
# Σ of sizes above this part of an accelerator, for the counting cuts of a relaxed packing.
_MOST_COUNTED = 8


@dataclass(frozen=True, slots=True)
class Packing:
    """How an accelerator kind's engines of their own units are packed.

    Attributes:
        sizes: By unit, the bytes that it counts with, with its engine.
        patterns: The patterns; None: only the sum of sizes and counts of large units are bounded.
        indexed: Whether each accelerator has an index instead. Copies of a unit, which must be on
            different accelerators, may need it.
    """

    sizes: Mapping[str, int]
    patterns: Sequence[Pattern] | None
    indexed: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A variable that says whether a unit has a place: by kind of accelerator, slots and tier."""

    unit: Unit
    kind: Accelerators
    tier: Tier
    slots: int
    column: int
    wait_s: float


@dataclass(slots=True)
class Program:
    """A mixed-integer linear program, and what its columns mean.

    Attributes:
        objective: To minimise, (columns,).
        lower: Least values, (columns,).
        upper: Greatest values, (columns,).
        integer: 1 where a column is an integer, (columns,).
        rows: Coefficients of the rows, with their bounds.
        choices: (C, R), the columns of x.
        bought: The columns of y by expert.
        places: All places.
        patterns: For each kind's name, the columns of its patterns.
        layouts: For each kind's name and number of slots, the column.
        used: The columns that count used accelerators.
        assigned: For each kind's name whose accelerators are indexed, the accelerator and the
            column of each of a unit's engines.
    """

    objective: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[int] = field(default_factory=list)
    rows: list[tuple[list[int], list[float], float, float]] = field(default_factory=list)
    choices: NDArray[np.intp] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.intp))
    bought: dict[str, int] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    patterns: dict[str, list[int]] = field(default_factory=dict)
    layouts: dict[tuple[str, int], int] = field(default_factory=dict)
    used: list[int] = field(default_factory=list)
    assigned: dict[str, list[tuple[Unit, int, int]]] = field(default_factory=dict)

    def column(
        self, upper: float = 1.0, *, value: float = 0.0, lower: float = 0.0, integer: bool = True
    ) -> int:
        """Add a column; `value` is its part of the objective that is minimised."""
        self.objective.append(value)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(int(integer))
        return len(self.objective) - 1

    def row(
        self, terms: Sequence[tuple[int, float]], low: float = -math.inf, high: float = math.inf
    ) -> None:
        """Add low ≤ Σ terms ≤ high."""
        if terms:
            self.rows.append(([c for c, _ in terms], [v for _, v in terms], low, high))

    def matrix(self) -> tuple[sparse.csr_matrix, Floats, Floats]:
        """Return the coefficients, and the rows' lower and upper bounds."""
        lengths = [len(columns) for columns, _, _, _ in self.rows]
        rows = np.repeat(np.arange(len(self.rows)), lengths)
        columns = np.concatenate([columns for columns, _, _, _ in self.rows])
        values = np.concatenate([values for _, values, _, _ in self.rows])
        shape = (len(self.rows), len(self.objective))
        low = np.array([low for _, _, low, _ in self.rows])
        high = np.array([high for _, _, _, high in self.rows])
        return sparse.csr_matrix((values, (rows, columns)), shape=shape), low, high

    def places_of(self, expert: str) -> list[Place]:
        """Return the places of all units that serve an expert."""
        return [place for place in self.places if expert in place.unit.experts]


def engine_sizes(problem: Problem, kind: Accelerators) -> dict[str, int]:
    """Return each unit's bytes with an engine of its own, for units that fit an accelerator."""
    sizes = {u.name: u.size_bytes + kind.engine_bytes for u in problem.units}
    return {name: size for name, size in sizes.items() if size <= kind.room_bytes}


def most_copies(problem: Problem, kind: Accelerators) -> int:
    """Return the most engines of one unit on a kind of accelerators."""
    return kind.count if problem.bounds.rate_per_s and not kind.unified else 1


def undominated(problem: Problem) -> NDArray[np.bool_]:
    """Return which recipes may be worth choosing, (C, R).

    A recipe of several experts is never better than one of its members alone where that member is
    always asked, is at least as good and costs no more.
    """
    single = {
        recipe.members[0]: r for r, recipe in enumerate(problem.recipes) if recipe.kind == "single"
    }
    kept = np.ones(problem.cost.shape, dtype=bool)
    for r, recipe in enumerate(problem.recipes):
        for member in recipe.members if recipe.kind != "single" else ():
            if (alone := single.get(member)) is None:
                continue
            as_good = problem.quality[:, alone] >= problem.quality[:, r]
            kept[:, r] &= ~(as_good & (problem.cost[:, alone] <= problem.cost[:, r]))
    return kept


def formulate(problem: Problem, packings: Mapping[str, Packing]) -> Program:
    """Write the problem as a program. `packings` has one entry for each kind of accelerators."""
    program = Program()
    weight = np.maximum(problem.share, _LEAST_SHARE)
    most_cost = max(float(problem.cost.max(initial=0.0)), 1e-12)
    value = weight[:, None] * (-problem.quality + THRIFT * problem.cost / most_cost)
    open_ = undominated(problem)
    program.choices = np.array(
        [
            [program.column(float(open_[c, r]), value=value[c, r]) for r in range(value.shape[1])]
            for c in range(value.shape[0])
        ],
        dtype=np.intp,
    )
    for row in program.choices:
        program.row([(int(x), 1.0) for x in row], 1, 1)
    _add_places(program, problem, packings)
    _add_experts(program, problem)
    _add_waits(program, problem, weight)
    if math.isfinite(problem.bounds.cost):
        spent = problem.share[:, None] * problem.cost
        cells = zip(program.choices.ravel(), spent.ravel(), strict=True)
        terms = [(int(x), float(v)) for x, v in cells]
        program.row([term for term in terms if term[1]], high=problem.bounds.cost)
    if problem.bounds.rate_per_s:
        _add_load(program, problem)
    return program


def _add_experts(program: Program, problem: Problem) -> None:
    for expert in sorted(problem.local):
        needed = 1.0 if expert in problem.required else 0.0
        program.bought[expert] = program.column(lower=needed, integer=False)
        terms = [(place.column, -1.0) for place in program.places_of(expert)]
        program.row([(program.bought[expert], 1.0), *terms], high=0)
    for group in problem.exclusive:
        program.row(
            [(program.bought[e], 1.0) for e in sorted(group) if e in program.bought], high=1
        )
    using: dict[str, list[int]] = defaultdict(list)
    for r, recipe in enumerate(problem.recipes):
        for expert in recipe.experts:
            using[expert].append(r)
    for expert, recipes in using.items():
        if expert in problem.remote and expert not in problem.local:
            continue
        for row in program.choices:
            terms = [(int(row[r]), 1.0) for r in recipes if program.upper[row[r]]]
            program.row([*terms, (program.bought[expert], -1.0)] if terms else [], high=0)
    for expert in sorted(problem.required & problem.local):
        quick = [
            (place.column, 1.0)
            for place in program.places_of(expert)
            if place.wait_s <= problem.bounds.wait_s
        ]
        # Without any quick place, a column of 0 makes the program infeasible, as it is.
        program.row(quick or [(program.column(0.0), 1.0)], low=1)


def _add_places(program: Program, problem: Problem, packings: Mapping[str, Packing]) -> None:
    every_byte = max(sum(unit.size_bytes for unit in problem.units), 1)
    host: list[tuple[int, float]] = []

    def place(unit: Unit, kind: Accelerators, tier: Tier, slots: int, copies: int = 1) -> Place:
        column = program.column(copies, value=THRIFT * (unit.size_bytes + 1) / every_byte)
        made = Place(unit, kind, tier, slots, column, problem.wait_s(unit, tier, kind))
        program.places.append(made)
        return made

    for kind in problem.accelerators:
        packing = packings[kind.name]
        copies = most_copies(problem, kind)
        own = [
            place(unit, kind, Tier.OWN, 0, copies)
            for unit in problem.units
            if unit.name in packing.sizes
        ]
        _add_needs(program, own)
        used = _add_own(program, kind, packing, own, copies)
        if problem.bounds.rate_per_s:
            # An accelerator that holds nothing bears no load.
            program.row([*((c, 1.0) for c in used), *((p.column, -1.0) for p in own)], high=0)
        for slots in range(1, kind.most_slots + 1):
            room = kind.slot_bytes(slots)
            fits = [unit for unit in problem.units if unit.size_bytes <= room]
            if len(fits) < 2:
                break
            layout = program.column(kind.count)
            program.layouts[kind.name, slots] = layout
            used.append(layout)
            homes = [place(unit, kind, Tier.HOME, slots, copies) for unit in fits]
            program.row([*((h.column, 1.0) for h in homes), (layout, -float(slots))], high=0)
            guests = [place(u, kind, tier, slots) for tier in problem.tiers(kind) for u in fits]
            for unit in fits:  # at most once on each accelerator
                here = [(p.column, 1.0) for p in (*homes, *guests) if p.unit is unit]
                program.row([*here, (layout, -1.0)], high=0)
            if problem.bounds.rate_per_s:
                held = [(p.column, -1.0) for p in (*homes, *guests)]
                program.row([(layout, 1.0), *held], high=0)
            _add_guests(program, kind, layout, homes, guests)
            _add_needs(program, [*homes, *guests])
            if kind.unified:
                _add_unified(program, kind, slots, homes, guests)
            elif kind.method is not SwapMethod.RESPAWN:
                host += [(p.column, p.unit.size_bytes / _GIB) for p in (*homes, *guests)]
        program.row([(column, 1.0) for column in used], high=kind.count)
        program.used += used
    if math.isfinite(problem.bounds.host_bytes):
        program.row(host, high=problem.bounds.host_bytes / _GIB)


def _add_own(
    program: Program, kind: Accelerators, packing: Packing, own: Sequence[Place], most: int
) -> list[int]:
    """Add the packing of engines of their own units, of each at most `most`.

    Returns:
        The columns that use accelerators.
    """
    sizes = {place.column: packing.sizes[place.unit.name] for place in own}
    if packing.indexed:
        return _add_indexed(program, kind, packing, own)
    if packing.patterns is not None:
        columns = [program.column(kind.count) for _ in packing.patterns]
        program.patterns[kind.name] = columns
        for size in sorted(set(sizes.values())):
            slots = [
                (column, -float(sum(one >= size for one in pattern)))
                for column, pattern in zip(columns, packing.patterns, strict=True)
            ]
            units = [(place, 1.0) for place, bytes_ in sizes.items() if bytes_ >= size]
            program.row([*units, *(term for term in slots if term[1])], high=0)
        # Copies of a unit stand on different accelerators.
        for place in own if most > 1 else ():
            size = sizes[place.column]
            hosts = [
                (column, -1.0)
                for column, pattern in zip(columns, packing.patterns, strict=True)
                if pattern[0] >= size
            ]
            program.row([(place.column, 1.0), *hosts], high=0)
        return list(columns)
    bins = program.column(kind.count)
    program.patterns[kind.name] = [bins]
    filled = [(place, bytes_ / _GIB) for place, bytes_ in sizes.items()]
    program.row([*filled, (bins, -kind.room_bytes / _GIB)], high=0)
    for few in range(1, _MOST_COUNTED) if not kind.unified else ():
        large = [(p, 1.0) for p, bytes_ in sizes.items() if bytes_ * (few + 1) > kind.room_bytes]
        program.row([*large, (bins, -float(few))] if large else [], high=0)
    for column in sizes:
        program.row([(column, 1.0), (bins, -1.0)] if kind.count == 1 or most > 1 else [], high=0)
    return [bins]


def _add_indexed(
    program: Program, kind: Accelerators, packing: Packing, own: Sequence[Place]
) -> list[int]:
    used = [program.column() for _ in range(kind.count)]
    for first, second in pairwise(used):
        program.row([(second, 1.0), (first, -1.0)], high=0)
    assigned = [(p, b, program.column()) for p in own for b in range(kind.count)]
    for place in own:
        here = [(column, 1.0) for p, _, column in assigned if p is place]
        program.row([*here, (place.column, -1.0)], 0, 0)
    for b, column in enumerate(used):
        filled = [(x, packing.sizes[p.unit.name] / _GIB) for p, at, x in assigned if at == b]
        program.row([*filled, (column, -kind.room_bytes / _GIB)], high=0)
        for x, _ in filled:
            program.row([(x, 1.0), (column, -1.0)], high=0)
    program.assigned[kind.name] = [(p.unit, b, column) for p, b, column in assigned]
    return used


def _add_needs(program: Program, places: Sequence[Place]) -> None:
    """A unit that needs an expert has a place only beside it. The places are of one layout."""
    for place in places:
        if (needs := place.unit.needs) is not None:
            beside = [(p.column, -1.0) for p in places if needs in p.unit.experts]
            program.row([(place.column, 1.0), *beside], high=0)


def _add_guests(
    program: Program,
    kind: Accelerators,
    layout: int,
    homes: Sequence[Place],
    guests: Sequence[Place],
) -> None:
    """A guest needs a slot, and one that is exchanged in place needs a home of its family."""
    for guest in guests:
        hosts = [(layout, -1.0)]
        if guest.tier is not Tier.RESPAWN and kind.method is SwapMethod.INPLACE:
            same = [h for h in homes if h.unit.family == guest.unit.family]
            hosts = [(h.column, -1.0) for h in same if h.unit is not guest.unit]
        program.row([(guest.column, 1.0), *hosts], high=0)


def _add_unified(
    program: Program,
    kind: Accelerators,
    slots: int,
    homes: Sequence[Place],
    guests: Sequence[Place],
) -> None:
    """Bound the memory of a machine whose slots hold weights in host memory.

    Units at home and warm guests stay in memory. Each slot needs room for the largest weights and
    adapters of other guests.
    """
    weights = program.column(math.inf, integer=False)
    adapters = program.column(math.inf, integer=False)
    layout = program.layouts[kind.name, slots]
    kept = [p for p in (*homes, *guests) if p.tier in (Tier.HOME, Tier.WARM)]
    for guest in guests:
        if guest.tier is not Tier.WARM:
            unit = guest.unit
            program.row([(guest.column, unit.weight_bytes / _GIB), (weights, -1.0)], high=0)
            if unit.adapter_bytes:
                program.row([(guest.column, unit.adapter_bytes / _GIB), (adapters, -1.0)], high=0)
    program.row(
        [
            *((p.column, p.unit.size_bytes / _GIB) for p in kept),
            (weights, float(slots)),
            (adapters, float(slots)),
            (layout, -kind.slot_bytes(slots) / _GIB),
        ],
        high=0,
    )


def _add_waits(program: Program, problem: Problem, weight: Floats) -> None:
    bound, price = problem.bounds.wait_s, problem.time_price
    if not price and not math.isfinite(bound):
        return
    asked = problem.asked()
    waits: list[list[tuple[int, float]]] = [[] for _ in problem.categories]
    for expert in problem.experts:
        if expert in problem.remote:
            continue
        places = program.places_of(expert)
        levels = sorted({place.wait_s for place in places if place.wait_s > 0})
        for below, level in zip([0.0, *levels], levels, strict=False):
            sooner = [(p.column, 1.0) for p in places if p.wait_s < level]
            for c, row in enumerate(program.choices):
                terms = [
                    (int(x), -float(asked[expert][c, r]))
                    for r, x in enumerate(row)
                    if asked[expert][c, r] and program.upper[x]
                ]
                if not terms:
                    continue
                step = level - below
                late = program.column(value=price * step * weight[c], integer=False)
                program.row([(late, 1.0), *sooner, *terms], low=0)
                waits[c].append((late, step))
    if math.isfinite(bound):
        for terms in waits:
            program.row(terms, high=bound)


def _add_load(program: Program, problem: Problem) -> None:
    """Copies must keep up with the rate, and all together the used accelerators must."""
    rate, share = problem.bounds.rate_per_s, problem.share
    asked = problem.asked()
    total: list[tuple[int, float]] = []
    for experts, units in clusters(problem):
        terms = []
        for expert in experts:
            if expert in asked:
                busy = rate * problem.busy_s[expert] * share[:, None] * asked[expert]
                cells = zip(program.choices.ravel(), busy.ravel(), strict=True)
                terms += [(int(x), float(v)) for x, v in cells if v]
        total += terms
        copies = [
            (p.column, -problem.bounds.utilisation * problem.copies(p.unit, p.tier, p.kind))
            for p in program.places
            if p.unit.name in units
        ]
        program.row([*terms, *copies], high=0)
    used = [(column, -problem.bounds.utilisation) for column in program.used]
    program.row([*total, *used], high=0)


def clusters(problem: Problem) -> list[tuple[frozenset[str], frozenset[str]]]:
    """Return groups of experts that are served by the same units, each with its units' names."""
    groups: list[tuple[set[str], set[str]]] = []
    for unit in problem.units:
        experts, units = set(unit.experts), {unit.name}
        rest = []
        for group in groups:
            if group[0] & experts:
                experts |= group[0]
                units |= group[1]
            else:
                rest.append(group)
        groups = [*rest, (experts, units)]
    return [(frozenset(experts), frozenset(units)) for experts, units in groups]


def resident(places: Sequence[Place]) -> list[Place]:
    """Return the places in which units wait for nothing."""
    return [place for place in places if place.tier in RESIDENT]
