"""The best composition of a small problem, by trying all of them.

It shares no code with the program: it fills each accelerator in every way, and keeps of equally
filled ones what no other is better than.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router_models.composition.composition_problem import (
    Accelerators,
    Problem,
    SwapMethod,
    Tier,
    Unit,
)


@dataclass(frozen=True, slots=True)
class _Filled:
    """What matters of filled accelerators: waits, host bytes, copies by unit, and how many."""

    waits: tuple[float, ...]
    host_bytes: int
    copies: tuple[float, ...]
    used: int


def best_value(problem: Problem) -> float | None:
    """Return the greatest quality less the price of waiting; None where nothing fits."""
    names = sorted(problem.local)
    nothing = tuple([0.0] * len(problem.units))
    states = [_Filled(tuple([float("inf")] * len(names)), 0, nothing, 0)]
    for kind in problem.accelerators:
        options = _pareto([_of(problem, kind, names, *way) for way in _ways(problem, kind)])
        for _ in range(kind.count):
            states = _pareto([_joined(a, b) for a in states for b in options])
    best: float | None = None
    for state in states:
        if state.host_bytes > problem.bounds.host_bytes:
            continue
        waits = dict(zip(names, state.waits, strict=True)) | dict.fromkeys(problem.remote, 0.0)
        if any(waits[e] > min(problem.bounds.wait_s, 1e300) for e in problem.required):
            continue
        found = _best_recipes(problem, waits, state)
        if found is not None and (best is None or found > best):
            best = found
    return best


def _ways(
    problem: Problem, kind: Accelerators
) -> Iterator[tuple[int, tuple[Unit, ...], tuple[tuple[Unit, Tier], ...]]]:
    units = problem.units
    room = kind.memory_bytes - kind.replica_bytes
    for count in range(len(units) + 1):
        for own in itertools.combinations(units, count):
            fits = sum(u.size_bytes + kind.engine_bytes for u in own) <= room
            if fits and _has_needed(own):
                yield 0, own, ()
    tiers = (None, *problem.tiers(kind))
    for slots in range(1, kind.most_slots + 1):
        if not kind.unified and room // slots < kind.engine_bytes:
            continue
        for count in range(slots + 1):
            for homes in itertools.combinations(units, count):
                for given in itertools.product(tiers, repeat=len(units)):
                    guests = tuple(
                        (u, t) for u, t in zip(units, given, strict=True) if t is not None
                    )
                    if any(u in homes for u, _ in guests) or not guests:
                        continue
                    if _fits(kind, slots, homes, guests, room):
                        yield slots, homes, guests


def _has_needed(held: Sequence[Unit]) -> bool:
    experts = {expert for unit in held for expert in unit.experts}
    return all(unit.needs is None or unit.needs in experts for unit in held)


def _fits(
    kind: Accelerators,
    slots: int,
    homes: tuple[Unit, ...],
    guests: tuple[tuple[Unit, Tier], ...],
    room: int,
) -> bool:
    held = [*homes, *(u for u, _ in guests)]
    if not _has_needed(held):
        return False
    for unit, tier in guests:
        same = any(h.family == unit.family for h in homes)
        if tier is not Tier.RESPAWN and kind.method is SwapMethod.INPLACE and not same:
            return False
    if not kind.unified:
        return slots * (max(u.size_bytes for u in held) + kind.engine_bytes) <= room
    kept = [*homes, *(u for u, t in guests if t is Tier.WARM)]
    loose = [u for u, t in guests if t is not Tier.WARM]
    largest = max((u.size_bytes - u.adapter_bytes for u in loose), default=0)
    beside = max((u.adapter_bytes for u in loose), default=0)
    weights = sum(u.size_bytes for u in kept) + slots * (largest + beside)
    return slots * kind.engine_bytes + weights <= room


def _of(
    problem: Problem,
    kind: Accelerators,
    names: list[str],
    slots: int,
    homes: tuple[Unit, ...],
    guests: tuple[tuple[Unit, Tier], ...],
) -> _Filled:
    waits = dict.fromkeys(names, float("inf"))
    copies = dict.fromkeys(problem.units, 0.0)
    for unit, tier in (*((h, Tier.HOME) for h in homes), *guests):
        lost_s = problem.wait_s(unit, tier, kind)
        copies[unit] = min(
            1.0 if not lost_s else (b := problem.busy_s.get(e, 0.0)) / (b + lost_s)
            for e in unit.experts
        )
        for expert in unit.experts:
            waits[expert] = min(waits[expert], lost_s)
    held = [*homes, *(u for u, _ in guests)]
    caches = slots and not kind.unified and kind.method is not SwapMethod.RESPAWN
    return _Filled(
        tuple(waits.values()),
        sum(u.size_bytes for u in held) if caches else 0,
        tuple(copies.values()),
        int(bool(held)),
    )


def _joined(a: _Filled, b: _Filled) -> _Filled:
    return _Filled(
        tuple(map(min, a.waits, b.waits)),
        a.host_bytes + b.host_bytes,
        tuple(x + y for x, y in zip(a.copies, b.copies, strict=True)),
        a.used + b.used,
    )


def _pareto(states: list[_Filled]) -> list[_Filled]:
    kept: list[_Filled] = []
    for one in sorted(set(states), key=lambda s: (sum(min(w, 1e9) for w in s.waits), s.host_bytes)):
        if not any(
            all(x <= y for x, y in zip(k.waits, one.waits, strict=True))
            and k.host_bytes <= one.host_bytes
            and all(x >= y for x, y in zip(k.copies, one.copies, strict=True))
            and k.used >= one.used
            for k in kept
        ):
            kept.append(one)
    return kept


def _best_recipes(problem: Problem, waits: dict[str, float], state: _Filled) -> float | None:
    options: list[list[int]] = []
    for c in range(len(problem.categories)):
        options.append(
            [
                r
                for r, recipe in enumerate(problem.recipes)
                if all(waits[e] < float("inf") for e in recipe.experts)
                and _wait(problem, waits, c, r) <= problem.bounds.wait_s + 1e-9
            ]
        )
    best = None
    share = problem.share
    for chosen in itertools.product(*options):
        used = {e for r in chosen for e in problem.recipes[r].experts}
        used |= problem.required
        if any(len(group & used) > 1 for group in problem.exclusive):
            continue
        cost = sum(share[c] * problem.cost[c, r] for c, r in enumerate(chosen))
        if cost > problem.bounds.cost + 1e-9 or not _keeps_up(problem, chosen, state):
            continue
        value = sum(
            share[c] * (problem.quality[c, r] - problem.time_price * _wait(problem, waits, c, r))
            for c, r in enumerate(chosen)
        )
        best = value if best is None else max(best, value)
    return None if best is None else float(best)


def _wait(problem: Problem, waits: dict[str, float], c: int, r: int) -> float:
    asked = zip(problem.recipes[r].experts, problem.reach[c, r], strict=False)
    return float(sum(reach * waits[e] for e, reach in asked if reach))


def _keeps_up(problem: Problem, chosen: tuple[int, ...], state: _Filled) -> bool:
    rate = problem.bounds.rate_per_s
    if not rate:
        return True
    busy = dict.fromkeys(problem.local, 0.0)
    for c, r in enumerate(chosen):
        for i, expert in enumerate(problem.recipes[r].experts):
            load = rate * problem.share[c] * problem.reach[c, r, i]
            busy[expert] += load * problem.busy_s[expert]
    most = problem.bounds.utilisation
    if sum(busy.values()) > most * state.used + 1e-9:
        return False
    # Experts that are served by the same units share their copies.
    groups: list[set[str]] = []
    for unit in problem.units:
        touching = [g for g in groups if g & set(unit.experts)]
        groups = [g for g in groups if g not in touching]
        groups.append(set(unit.experts).union(*touching))
    for group in groups:
        copies = sum(
            n for u, n in zip(problem.units, state.copies, strict=True) if set(u.experts) & group
        )
        if sum(busy[e] for e in group) > most * copies + 1e-9:
            return False
    return True
