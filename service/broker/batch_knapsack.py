"""The choice of an answerer for every line of a batch at once: a multiple-choice knapsack. Pure.

    max  Σ_l Q[l, r(l)]
    s.t. Σ_l c[l, r(l)] ≤ max_cost
         Σ_p z[p, e] ≥ Σ_l calls[r(l), e] · seconds[l, e]      for each expert e
         Σ_e (z[p, e] + load[p, e] · y[p, e]) ≤ deadline       for each engine p
         z[p, e] ≤ deadline · y[p, e],  y binary

r(l) is the recipe of line l. Engine p spends z seconds on the lines of expert e, and its load time
once, however many lines it answers. With a floor of quality the cost is minimised instead.

The bound on time is left out first. What remains has one bound, and is solved exactly: the best
price λ of the bound is found by halving, which gives an upper bound, Σ max(Q − λc) + λ · max_cost,
and a choice within the bound. A choice whose Q − λc is worse than the line's best one by more than
the gap of the two can't be part of a better solution (reduced-cost fixing; Kellerer, Pferschy,
Pisinger: Knapsack Problems, 2004, ch. 11). The few lines with several choices left go to HiGHS
(Huangfu and Hall, 2018) as a mixed-integer program. Where engines have time enough for that
solution, it solves the whole problem. Otherwise HiGHS gets the program above.

Lines with equal rows are one group with a count. Where a program with a bound on time has more than
`_MOST_COLUMNS` choices, a sample of its lines tells which experts are loaded, and a linear program
over all lines the rest. `BatchSolution.bound` then says how far it may be from the best solution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

# Halvings of λ, which find it to the last digits.
_HALVINGS = 64
# Most choices that a program with a bound on time holds.
_MOST_COLUMNS = 6000
# Choices of the sample that tells what engines load, where a program has more.
_SAMPLE_COLUMNS = 2000
# Most choices that are left to HiGHS where cost is the only bound.
_MOST_CORE = 6000
# Longest search of HiGHS, in s. A search that is cut short gives its best solution and its bound.
_SEARCH_S = 20.0
# Tries with less and less of a bound, where a solution is above it by the solver's rounding.
_TRIES = 6
# HiGHS lets a row be above its bound by this.
_TOLERANCE = 2e-6
# Sums in another order differ by less than this part.
_SUMMED = 1e-12
# A solution within this part of the bound counts as exact.
_ROUNDING = 1e-6
# Most pairs of engine and expert of which the shortest time is computed by HiGHS.
_MOST_PAIRS = 256


class BatchInfeasibleError(ValueError):
    """No choice keeps the bounds. The message says what is possible.

    Attributes:
        term: The bound that can't be kept: `lines`, `max_cost` or `deadline`.
        nearest: The least cost, in units, or the least time, in s; for `lines` the line's index.
    """

    def __init__(self, message: str, term: str, nearest: float) -> None:
        super().__init__(message)
        self.term = term
        self.nearest = nearest


@dataclass(frozen=True, slots=True, eq=False)
class BatchOptions:
    """What each recipe would do for each line, with L lines, R recipes and E experts.

    Attributes:
        quality: (L, R), expected quality in [0, 1].
        cost: (L, R), expected cost.
        possible: (L, R), whether the recipe may answer the line.
        seconds: (L, E), time of an engine for one call, when it works on a full batch.
        calls: (R, E), expected calls of each expert.
    """

    quality: Floats
    cost: Floats
    possible: Bools
    seconds: Floats
    calls: Floats

    def only(self, lines: Ints) -> BatchOptions:
        """Return the options of some lines."""
        return BatchOptions(
            self.quality[lines],
            self.cost[lines],
            self.possible[lines],
            self.seconds[lines],
            self.calls,
        )


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """The bounds of a batch.

    Attributes:
        max_cost: Most units of cost for all lines together.
        deadline_s: Time until the last line's answer, in s.
        quality_share: The part of the best total quality within the other bounds that is to be
            reached at the least cost, in (0, 1]; None for the best quality.
    """

    max_cost: float = math.inf
    deadline_s: float = math.inf
    quality_share: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchSolution:
    """The chosen recipes of all lines.

    Attributes:
        chosen: (L,), the recipe of each line.
        quality: Total expected quality.
        cost: Total expected cost.
        work_s: (E,), time of engines for the lines of each expert, in s.
        seconds: Expected time from the first line's start to the last line's end, in s.
        bound: No solution has a greater total quality; with `quality_share`, none that reaches it
            has a lower cost.
        exact: Whether the solution is the best one, but for rounding.
    """

    chosen: Ints
    quality: float
    cost: float
    work_s: Floats
    seconds: float
    bound: float
    exact: bool


def solve(
    options: BatchOptions, load_s: Floats, bounds: BatchBounds, *, exact: bool = True
) -> BatchSolution:
    """Choose the recipe of each line.

    Args:
        options: The options.
        load_s: (P, E), time until each engine can answer for each expert; infinite where it never
            can, and 0 where the expert is there.
        bounds: The bounds.
        exact: Whether to search for the best solution. Without it, the one that the best price
            gives is kept where cost is the only bound: it is worse by less than one line.

    Raises:
        BatchInfeasibleError: A line has no option, or no choice keeps the bounds.
    """
    held = np.isfinite(load_s).any(axis=0)
    possible = options.possible & ~(options.calls[:, ~held] > 0).any(axis=1)
    if not possible.any(axis=1).all():
        line = int(np.flatnonzero(~possible.any(axis=1))[0])
        raise BatchInfeasibleError(f"no recipe can answer line {line}", "lines", line)
    groups = _group(options, possible)
    best = _maximise(groups, groups.quality, groups.cost, bounds.max_cost, load_s, bounds, exact)
    if bounds.quality_share is None:
        return _solution(options, groups, best, load_s, maximised=True)
    floor = bounds.quality_share * best.value * (1 - 1e-12)
    # Σ (1 − Q) ≤ L − floor is the floor as a bound from above.
    lines = float(groups.count.sum())
    wrong = 1 - groups.quality
    least = _maximise(groups, -groups.cost, wrong, lines - floor, load_s, bounds, exact)
    best_cost = float((best.counts * np.where(groups.possible, groups.cost, 0.0)).sum())
    if -least.value > best_cost:  # a search that was cut short
        least = _Choice(best.counts, -best_cost, least.bound)
    return _solution(options, groups, least, load_s, maximised=False)


def least_cost(options: BatchOptions) -> float:
    """Return the cost of the cheapest possible recipe of each line, all together."""
    return float(np.where(options.possible, options.cost, np.inf).min(axis=1).sum())


def shortest_s(work_s: Floats, load_s: Floats) -> float:
    """Compute the time in which engines do the work, each expert loaded where that helps.

    Args:
        work_s: (E,), time of engines for each expert.
        load_s: (P, E), time to load; infinite where an engine can't hold the expert.

    Returns:
        The time in s; infinite where no engine holds an expert with work.
    """
    busy = np.flatnonzero(work_s > 0)
    if not len(busy):
        return 0.0
    if not np.isfinite(load_s[:, busy]).any(axis=0).all():
        return math.inf
    if len(load_s) == 1:
        return float(work_s.sum() + load_s[0, busy].sum())
    whole = _whole_experts_s(work_s, load_s, busy)
    if load_s.shape[0] * len(busy) > _MOST_PAIRS:
        return whole
    return min(whole, _divided_s(work_s[busy], load_s[:, busy]))


def _whole_experts_s(work_s: Floats, load_s: Floats, busy: Ints) -> float:
    """The time where one engine has all lines of an expert: the longest expert is placed first."""
    ends = np.zeros(len(load_s))
    for e in sorted(busy.tolist(), key=lambda e: (-work_s[e], e)):
        after = ends + load_s[:, e] + work_s[e]
        place = int(after.argmin())
        ends[place] = after[place]
    return float(ends.max())


def _divided_s(work_s: Floats, load_s: Floats) -> float:
    """The time where several engines may share the lines of an expert."""
    engines, experts = load_s.shape
    program = _Program(engines * experts * 2 + 1)
    last = 2 * engines * experts
    scale = float(work_s.sum() + load_s[np.isfinite(load_s)].max(initial=0.0)) * len(work_s)
    program.objective[last] = 1.0
    program.upper[last] = np.inf
    _add_engines(program, load_s, scale, 0, deadline=last)
    for e in range(experts):
        program.row([(p * experts + e, 1.0) for p in range(engines)], low=float(work_s[e]) / scale)
    found = program.minimise(gap=0.01, search_s=2.0)
    return math.inf if found.values is None else float(found.values[last]) * scale


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Lines with equal rows.

    Attributes:
        of_line: (L,), the group of each line.
        count: (G,), lines in each group.
        quality: (G, R).
        cost: (G, R).
        possible: (G, R).
        seconds: (G, E).
        calls: (R, E).
    """

    of_line: Ints
    count: NDArray[Any]
    quality: Floats
    cost: Floats
    possible: Bools
    seconds: Floats
    calls: Floats

    def work_s(self, counts: NDArray[Any]) -> Floats:
        """(E,), time of engines for a choice, (G, R) lines."""
        work: Floats = ((counts @ self.calls) * self.seconds).sum(axis=0)
        return work


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """How many lines of each group take each recipe, (G, R), the value, and a bound on values."""

    counts: Ints
    value: float
    bound: float


def _group(options: BatchOptions, possible: Bools) -> _Groups:
    rows = np.hstack(
        [
            np.where(possible, options.quality, 0.0),
            np.where(possible, options.cost, 0.0),
            possible.astype(float),
            options.seconds,
        ]
    )
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
    _, first, inverse, count = np.unique(
        keys.ravel(), return_index=True, return_inverse=True, return_counts=True
    )
    return _Groups(
        inverse.ravel().astype(np.intp),
        count.astype(np.intp),
        options.quality[first],
        options.cost[first],
        possible[first],
        options.seconds[first],
        options.calls,
    )


def _solution(
    options: BatchOptions, groups: _Groups, choice: _Choice, load_s: Floats, *, maximised: bool
) -> BatchSolution:
    chosen = _lines_of(groups, choice.counts)
    lines = np.arange(len(chosen))
    quality = float(options.quality[lines, chosen].sum())
    cost = float(options.cost[lines, chosen].sum())
    work_s = (options.calls[chosen] * options.seconds).sum(axis=0)
    value = quality if maximised else -cost
    size = max(abs(value), abs(choice.bound), 1e-300)
    exact = choice.bound - value <= _ROUNDING * size
    bound = max(choice.bound, value)
    return BatchSolution(
        chosen,
        quality,
        cost,
        work_s,
        shortest_s(work_s, load_s),
        bound if maximised else -bound,
        exact,
    )


def _lines_of(groups: _Groups, counts: Ints) -> Ints:
    """(L,), the recipe of each line, where each group has these counts."""
    order = np.argsort(groups.of_line, kind="stable")
    recipes = np.tile(np.arange(counts.shape[1], dtype=np.intp), len(counts))
    chosen = np.empty(len(groups.of_line), dtype=np.intp)
    chosen[order] = np.repeat(recipes, counts.ravel())
    return chosen


def _maximise(
    groups: _Groups,
    value: Floats,
    spend: Floats,
    most: float,
    load_s: Floats,
    bounds: BatchBounds,
    exact: bool,
) -> _Choice:
    """Maximise the value of all lines within a bound on what they spend, and the other bounds.

    `value` and `spend` are (G, R). Where the value is the cost, `max_cost` needs no bound of its
    own: the solution costs no more than the one of the best quality, which keeps it.
    """
    choice = _within_one_bound(groups, value, spend, most, exact=exact)
    if math.isinf(bounds.deadline_s):
        return choice
    if shortest_s(groups.work_s(choice.counts), load_s) <= bounds.deadline_s:
        return choice
    return _within_deadline(groups, value, spend, most, load_s, bounds.deadline_s, choice.bound)


# --- cost as the only bound


def _within_one_bound(
    groups: _Groups, value: Floats, spend: Floats, most: float, *, exact: bool
) -> _Choice:
    """Solve the multiple-choice knapsack with one bound, exactly or by the best price.

    Raises:
        BatchInfeasibleError: The least spending is above the bound.
    """
    count = groups.count
    rows = np.arange(len(count))
    most += _SUMMED * abs(most)
    worth = np.where(groups.possible, value, -np.inf)
    spends = np.where(groups.possible, spend, np.inf)

    def total(picked: Ints) -> float:
        return float(count @ spend[rows, picked])

    top = _first_of_best(worth, spends)
    if total(top) <= most:
        return _whole(groups, top, value, float(count @ value[rows, top]))
    cheapest = _first_of_best(-spends, -worth)
    if total(cheapest) > most:
        least = total(cheapest)
        raise BatchInfeasibleError(
            f"the cheapest choice costs {least:.6g}, and max_cost is {most:.6g}", "max_cost", least
        )
    low, high = 0.0, _steepest(worth, spends)
    bound, best_price = math.inf, high
    picked = cheapest
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        net = worth - price * np.where(groups.possible, spend, 0.0)
        at = _first_of_best(net, spends)
        dual = float(count @ net[rows, at]) + price * most
        if dual < bound:
            bound, best_price = dual, price
        if total(at) > most:
            low = price
        else:
            high, picked = price, at
        if high - low <= 1e-15 * high:
            break
    counts = _counts(groups, picked)
    net = worth - best_price * np.where(groups.possible, spend, 0.0)
    loss = net.max(axis=1, keepdims=True) - net
    _fill(groups, counts, value, spend, loss, most)
    reached = float((counts * np.where(groups.possible, value, 0.0)).sum())
    gap = bound - reached
    if not exact or gap <= 1e-12 * max(abs(bound), 1.0):
        return _Choice(counts, reached, bound)
    return _search_core(groups, value, spend, most, loss, _Choice(counts, reached, bound))


def _first_of_best(worth: Floats, spends: Floats) -> Ints:
    """(G,), the option of the greatest worth, and of equal ones that which spends least."""
    best = worth >= worth.max(axis=1, keepdims=True)
    picked: Ints = np.where(best, spends, np.inf).argmin(axis=1)
    # Where even the best spends infinitely much, the first of the best is as good.
    none = ~np.isfinite(np.where(best, spends, np.inf).min(axis=1))
    return np.where(none, best.argmax(axis=1), picked).astype(np.intp)


def _steepest(worth: Floats, spends: Floats) -> float:
    """A price at which every line takes an option that spends least."""
    steepest = 0.0
    finite = np.isfinite(worth)
    lowest = np.where(finite, worth, np.inf).min(axis=1)
    gain = np.where(finite, worth, -np.inf).max(axis=1) - lowest
    order = np.sort(spends, axis=1)
    with np.errstate(invalid="ignore"):
        gaps = np.diff(order, axis=1)
    gaps = np.where(np.isfinite(gaps) & (gaps > 0), gaps, np.inf).min(axis=1, initial=np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.isfinite(gaps), gain / gaps, 0.0)
    steepest = float(ratio.max(initial=0.0))
    return 2 * steepest + 1e-9 if steepest else 1.0


def _counts(groups: _Groups, picked: Ints) -> Ints:
    counts = np.zeros(groups.possible.shape, dtype=np.intp)
    counts[np.arange(len(picked)), picked] = groups.count
    return counts


def _whole(groups: _Groups, picked: Ints, value: Floats, bound: float) -> _Choice:
    return _Choice(_counts(groups, picked), bound, bound)


def _fill(
    groups: _Groups, counts: Ints, value: Floats, spend: Floats, loss: Floats, most: float
) -> None:
    """Spend what is left: the options that lose least at the best price come first."""
    left = most - float((counts * np.where(groups.possible, spend, 0.0)).sum())
    current = counts.argmax(axis=1)
    rows = np.arange(len(current))
    more = spend - spend[rows, current][:, None]
    better = groups.possible & (value > value[rows, current][:, None]) & (more > 0)
    places = np.argwhere(better & (more <= left))
    places = places[np.argsort(loss[places[:, 0], places[:, 1]], kind="stable")]
    used: set[int] = set()
    for g, r in places.tolist():
        if g in used or more[g, r] > left:
            continue
        moved = min(int(groups.count[g]), int(left / more[g, r]))
        if moved:
            counts[g, current[g]] -= moved
            counts[g, r] += moved
            left -= moved * float(more[g, r])
            used.add(g)


def _search_core(
    groups: _Groups, value: Floats, spend: Floats, most: float, loss: Floats, known: _Choice
) -> _Choice:
    """Leave the choices to HiGHS that may be part of a better solution than the known one."""
    gap = known.bound - known.value
    kept = groups.possible & (loss <= gap * (1 + 1e-9) + 1e-12)
    whole = True
    if int(kept.sum()) > _MOST_CORE:
        bar = float(np.partition(loss[kept], _MOST_CORE)[_MOST_CORE])
        kept &= loss < max(bar, 1e-15)
        kept[np.arange(len(kept)), loss.argmin(axis=1)] = True
        whole = False
    counts = np.where(kept & (kept.sum(axis=1) == 1)[:, None], groups.count[:, None], 0)
    core = np.flatnonzero(kept.sum(axis=1) > 1)
    if not len(core):
        return known
    counts[core] = 0
    left = most - float((counts * np.where(groups.possible, spend, 0.0)).sum())
    cells = np.argwhere(kept[core])
    cells[:, 0] = core[cells[:, 0]]
    v, s = value[cells[:, 0], cells[:, 1]], spend[cells[:, 0], cells[:, 1]]
    size = max(float(np.abs(s).max(initial=0.0)), 1e-300)
    found, dual = None, known.bound
    for k in range(_TRIES):
        program = _Program(len(cells))
        program.objective[:] = -v
        program.upper[:] = groups.count[cells[:, 0]]
        _add_groups(program, cells, groups.count)
        slack = 0.0 if not k else _TOLERANCE * 4.0**k
        program.row(list(enumerate((s / size).tolist())), high=left / size - slack)
        run = program.minimise(gap=0.0, search_s=_SEARCH_S)
        if k == 0 and whole and run.bound is not None:
            fixed = float((counts * np.where(groups.possible, value, 0.0)).sum())
            dual = min(known.bound, max(known.value, fixed - run.bound))
        if run.values is None:
            break
        trial = counts.copy()
        trial[cells[:, 0], cells[:, 1]] = np.rint(run.values).astype(np.intp)
        if float((trial * np.where(groups.possible, spend, 0.0)).sum()) <= most:
            found = trial
            break
    if found is None:
        return _Choice(known.counts, known.value, dual)
    reached = float((found * np.where(groups.possible, value, 0.0)).sum())
    if reached <= known.value:
        return _Choice(known.counts, known.value, dual)
    return _Choice(found, reached, max(dual, reached))


# --- with a bound on time


def _within_deadline(
    groups: _Groups,
    value: Floats,
    spend: Floats,
    most: float,
    load_s: Floats,
    deadline_s: float,
    bound: float,
) -> _Choice:
    """Solve the program with engines.

    Raises:
        BatchInfeasibleError: The engines can't do it in time.
    """
    limit, within_s, took_s = most, deadline_s, math.inf
    large = int(groups.possible.sum()) > _MOST_COLUMNS
    for _ in range(_TRIES):
        if large:
            counts, dual = _by_prices(groups, value, spend, limit, load_s, within_s)
        else:
            counts, dual = _run_with_engines(groups, value, spend, limit, load_s, within_s)
        if counts is None:
            break
        if limit == most and within_s == deadline_s and dual is not None:
            bound = min(bound, dual)
        spent = float((counts * np.where(groups.possible, spend, 0.0)).sum())
        took_s = shortest_s(groups.work_s(counts), load_s)
        if spent <= most * (1 + _SUMMED) and took_s <= deadline_s * (1 + 1e-9):
            reached = float((counts * np.where(groups.possible, value, 0.0)).sum())
            return _Choice(counts, reached, max(bound, reached))
        # The solver rounds: leave that much room.
        if spent > most:
            limit -= 1.5 * (spent - most) + _TOLERANCE * abs(most)
        if took_s > deadline_s:
            within_s -= 1.5 * (took_s - deadline_s) + _TOLERANCE * deadline_s
    sample = _sample(groups, _MOST_COLUMNS)
    least = _least_s(sample, value[sample.of_line], spend[sample.of_line], most, load_s)
    raise BatchInfeasibleError(
        f"the lines take about {least:.3g} s or more, and the deadline is {deadline_s:.3g} s",
        "deadline",
        least,
    )


def _sample(groups: _Groups, columns: int) -> _Groups:
    """Return evenly chosen groups that stand for all; `of_line` has their indices.

    Their counts are scaled to the number of all lines, and need not be whole.
    """
    size = len(groups.count)
    wanted = max(1, columns // groups.possible.shape[1])
    order = np.lexsort((groups.seconds.sum(axis=1), groups.quality.argmax(axis=1)))
    if wanted >= size:
        index = np.arange(size)
    else:
        index = order[np.linspace(0, size - 1, wanted).astype(np.intp)]
    count = groups.count[index] * (groups.count.sum() / groups.count[index].sum())
    return _Groups(
        index,
        count,
        groups.quality[index],
        groups.cost[index],
        groups.possible[index],
        groups.seconds[index],
        groups.calls,
    )


def _by_prices(
    groups: _Groups, value: Floats, spend: Floats, most: float, load_s: Floats, deadline_s: float
) -> tuple[Ints | None, float | None]:
    """Solve a large program: a sample tells what engines load, and a linear program the rest.

    A basic solution of the linear program divides at most one group for each bound. These groups'
    lines take what fits best. The prices of its bounds give an upper bound of all solutions.

    Returns:
        The counts, (G, R), and the upper bound; None where no solution was found.
    """
    sample = _sample(groups, _SAMPLE_COLUMNS)
    v, s = value[sample.of_line], spend[sample.of_line]
    cells = np.argwhere(sample.possible)
    program = _engine_program(sample, cells, v, s, most, load_s, deadline_s)
    program.integer[: len(cells)] = 0
    run = program.minimise(gap=1e-3, search_s=_SEARCH_S)
    if run.values is None:
        return None, None
    loads = run.values[len(cells) + load_s.size :].reshape(load_s.shape) > 0.5
    usable = np.where(loads | (load_s == 0), load_s, np.inf)
    room_s = deadline_s - np.where(loads, load_s, 0.0).sum(axis=1, where=np.isfinite(load_s))
    held = np.isfinite(usable).any(axis=0)
    barred = (groups.calls[:, ~held] > 0).any(axis=1)
    first = _linear(sample, sample.possible & ~barred, v, s, most, usable, room_s)
    if first is None:
        return None, None
    keep = groups.possible & ~barred
    net = np.where(keep, first.net(groups, value, spend), -np.inf)
    if int(keep.sum()) > 8 * _MOST_COLUMNS:
        # The fourth best option at the sample's prices is hardly ever part of a solution.
        bar = -np.partition(-net, min(2, net.shape[1] - 1), axis=1)[:, min(2, net.shape[1] - 1)]
        keep &= net >= bar[:, None]
    cheapest = _first_of_best(-np.where(groups.possible & ~barred, spend, np.inf), -net)
    keep[np.arange(len(keep)), cheapest] = True
    full = _linear(groups, keep, value, spend, most, usable, room_s)
    if full is None:
        return None, None
    dual = full.bound(groups, value, spend, most, load_s, deadline_s)
    counts = np.floor(full.counts + 1e-7).astype(np.intp)
    _place_rest(groups, counts, full, value, spend, most, usable, room_s, keep)
    return (counts if (counts.sum(axis=1) == groups.count).all() else None), dual


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    """A solution of the linear program, (G, R), and the prices of its bounds.

    Attributes:
        counts: (G, R), lines.
        price: Value of a unit of spending.
        worth_s: (E,), value of a second of an engine for each expert.
    """

    counts: Floats
    price: float
    worth_s: Floats

    def net(self, groups: _Groups, value: Floats, spend: Floats) -> Floats:
        """(G, R), the value of an option less what it takes at these prices."""
        net: Floats = value - self.price * spend
        net -= groups.seconds @ (groups.calls * self.worth_s).T
        return net

    def bound(
        self,
        groups: _Groups,
        value: Floats,
        spend: Floats,
        most: float,
        load_s: Floats,
        deadline_s: float,
    ) -> float:
        """Return an upper bound of every solution's value: the Lagrangian at these prices."""
        net = np.where(groups.possible, self.net(groups, value, spend), -np.inf)
        left_s = np.where(np.isfinite(load_s), np.maximum(deadline_s - load_s, 0.0), 0.0)
        engines = float((left_s * self.worth_s).max(axis=1).sum())
        budget = self.price * most if math.isfinite(most) else 0.0
        return float(groups.count @ net.max(axis=1)) + budget + engines


def _linear(
    groups: _Groups,
    keep: Bools,
    value: Floats,
    spend: Floats,
    most: float,
    load_s: Floats,
    room_s: Floats,
) -> _Linear | None:
    """Solve the program with divisible lines, where it is known what engines load.

    Args:
        groups: The groups.
        keep: (G, R), the options that may be taken.
        value: (G, R).
        spend: (G, R).
        most: Most that is spent.
        load_s: (P, E), finite where the engine holds the expert.
        room_s: (P,), time of each engine for lines.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    cells = np.argwhere(keep)
    places = np.argwhere(np.isfinite(load_s))
    experts = load_s.shape[1]
    scale = max(float(room_s.max()), 1e-9)
    work = groups.calls[cells[:, 1]] * groups.seconds[cells[:, 0]] / scale
    size = max(float(np.abs(spend[keep]).max(initial=0.0)), 1e-300)
    n, m = len(cells), len(places)
    time_rows = sparse.hstack(
        [
            sparse.csr_matrix(work.T),
            sparse.csr_matrix((-np.ones(m), (places[:, 1], np.arange(m))), shape=(experts, m)),
        ]
    )
    engine_rows = sparse.csr_matrix(
        (np.ones(m), (places[:, 0], n + np.arange(m))), shape=(len(load_s), n + m)
    )
    spending = spend[cells[:, 0], cells[:, 1]] / size
    rows = [time_rows, engine_rows]
    limits = [np.zeros(experts), room_s / scale]
    if math.isfinite(most):
        rows.append(sparse.csr_matrix((spending, (np.zeros(n), np.arange(n))), shape=(1, n + m)))
        limits.append(np.array([most / size]))
    lines = sparse.csr_matrix((np.ones(n), (cells[:, 0], np.arange(n))), shape=(len(keep), n + m))
    found = linprog(
        np.concatenate([-value[cells[:, 0], cells[:, 1]], np.zeros(m)]),
        A_ub=sparse.vstack(rows),
        b_ub=np.concatenate(limits),
        A_eq=lines,
        b_eq=groups.count.astype(float),
        method="highs",
        options={"time_limit": _SEARCH_S},
    )
    if found.x is None:
        return None
    prices = -np.asarray(found.ineqlin.marginals)
    counts = np.zeros(keep.shape)
    counts[cells[:, 0], cells[:, 1]] = found.x[:n]
    price = max(0.0, float(prices[-1])) / size if math.isfinite(most) else 0.0
    return _Linear(counts, price, np.maximum(prices[:experts], 0.0) / scale)


def _place_rest(
    groups: _Groups,
    counts: Ints,
    solution: _Linear,
    value: Floats,
    spend: Floats,
    most: float,
    load_s: Floats,
    room_s: Floats,
    keep: Bools,
) -> None:
    """Give lines of divided groups the best option that fits, and else what takes least."""
    net = np.where(keep, solution.net(groups, value, spend), -np.inf)
    work = groups.work_s(counts)
    spent = float((counts * np.where(keep, spend, 0.0)).sum())
    # The time of each expert that the linear program gave it, with all of its lines.
    given_s = groups.work_s(solution.counts)
    for g in np.flatnonzero(counts.sum(axis=1) < groups.count).tolist():
        for _ in range(int(groups.count[g] - counts[g].sum())):
            more = groups.calls * groups.seconds[g]
            fits = keep[g] & (spent + spend[g] <= most)
            timely = fits & ((work + more) <= np.maximum(given_s, work) + 1e-9).all(axis=1)
            among = timely if timely.any() else fits if fits.any() else keep[g]
            if fits.any():
                r = int(np.where(among, net[g], -np.inf).argmax())
            else:
                r = int(np.where(among, spend[g], np.inf).argmin())
            counts[g, r] += 1
            work = work + more[r]
            spent += float(spend[g, r])


def _run_with_engines(
    groups: _Groups, value: Floats, spend: Floats, most: float, load_s: Floats, deadline_s: float
) -> tuple[Ints | None, float | None]:
    """Solve the whole program. Returns the counts, (G, R), and an upper bound."""
    cells = np.argwhere(groups.possible)
    program = _engine_program(groups, cells, value, spend, most, load_s, deadline_s)
    run = program.minimise(gap=1e-7, search_s=_SEARCH_S)
    if run.values is None:
        return None, None
    counts = np.zeros(groups.possible.shape, dtype=np.intp)
    counts[cells[:, 0], cells[:, 1]] = np.rint(run.values[: len(cells)]).astype(np.intp)
    return counts, None if run.bound is None else -run.bound


def _engine_program(
    groups: _Groups,
    cells: Ints,
    value: Floats,
    spend: Floats,
    most: float,
    load_s: Floats,
    deadline_s: float,
) -> _Program:
    """Write the program: the lines of each cell, then engines' times, then their loads."""
    program = _Program(len(cells) + 2 * load_s.size)
    _add_choice(program, groups, cells, value, spend, most)
    _add_engines(program, load_s, deadline_s, len(cells))
    _add_work(program, groups, cells, load_s, deadline_s, len(cells))
    return program


def _least_s(groups: _Groups, value: Floats, spend: Floats, most: float, load_s: Floats) -> float:
    """The shortest time of any choice within the bound on spending, in s."""
    cells = np.argwhere(groups.possible)
    scale = float((groups.seconds.max(axis=1) * groups.count).sum())
    scale += float(load_s[np.isfinite(load_s)].sum())
    program = _Program(len(cells) + 2 * load_s.size + 1)
    last = len(program.objective) - 1
    _add_choice(program, groups, cells, value, spend, most)
    program.objective[:] = 0.0
    program.objective[last] = 1.0
    program.upper[last] = np.inf
    _add_engines(program, load_s, scale, len(cells), deadline=last)
    _add_work(program, groups, cells, load_s, scale, len(cells))
    run = program.minimise(gap=1e-3, search_s=_SEARCH_S)
    return math.inf if run.values is None else float(run.values[last]) * scale


def _add_choice(
    program: _Program, groups: _Groups, cells: Ints, value: Floats, spend: Floats, most: float
) -> None:
    """Add how many lines of each group take each recipe, as the first columns."""
    v, s = value[cells[:, 0], cells[:, 1]], spend[cells[:, 0], cells[:, 1]]
    program.objective[: len(cells)] = -v
    program.upper[: len(cells)] = groups.count[cells[:, 0]]
    _add_groups(program, cells, groups.count)
    if math.isfinite(most):
        size = max(float(np.abs(s).max(initial=0.0)), 1e-300)
        program.row(list(enumerate((s / size).tolist())), high=most / size)


def _add_groups(program: _Program, cells: Ints, count: NDArray[Any]) -> None:
    """Every line of a group takes one recipe. The cells are sorted by group."""
    starts = np.flatnonzero(np.diff(cells[:, 0], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        lines = float(count[cells[start, 0]])
        program.row([(column, 1.0) for column in range(start, end)], lines, lines)


def _add_engines(
    program: _Program, load_s: Floats, scale: float, first: int, deadline: int | None = None
) -> None:
    """Add the time of each engine for each expert and whether it loads it, from column `first`.

    Times are parts of `scale`. The column `deadline` bounds them; without one they end at `scale`.
    """
    engines, experts = load_s.shape
    for p in range(engines):
        terms: list[tuple[int, float]] = []
        for e in range(experts):
            time, loads = first + p * experts + e, first + (engines + p) * experts + e
            program.integer[time] = 0
            program.upper[time] = np.inf if deadline is not None else 1.0
            if not math.isfinite(load_s[p, e]):
                program.upper[time] = program.upper[loads] = 0.0
                continue
            terms.append((time, 1.0))
            if load_s[p, e] > 0:
                terms.append((loads, load_s[p, e] / scale))
                program.row([(time, 1.0), (loads, -1.0)], high=0.0)
        if deadline is None:
            program.row(terms, high=1.0)
        elif terms:
            program.integer[deadline] = 0
            program.row([*terms, (deadline, -1.0)], high=0.0)


def _add_work(
    program: _Program, groups: _Groups, cells: Ints, load_s: Floats, scale: float, first: int
) -> None:
    """The engines' time for an expert holds the work of the lines that ask it."""
    engines, experts = load_s.shape
    work = groups.calls[cells[:, 1]] * groups.seconds[cells[:, 0]] / scale
    for e in range(experts):
        asks = np.flatnonzero(work[:, e])
        if len(asks):
            given = [(first + p * experts + e, -1.0) for p in range(engines)]
            asked = zip(asks.tolist(), work[asks, e].tolist(), strict=True)
            program.row([*asked, *given], high=0.0)


# --- HiGHS


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    values: Floats | None
    bound: float | None


class _Program:
    """A mixed-integer linear program. Columns are integers of at least 0 unless changed."""

    def __init__(self, columns: int) -> None:
        self.objective = np.zeros(columns)
        self.upper = np.ones(columns)
        self.integer = np.ones(columns, dtype=np.int8)
        self._rows: list[tuple[list[int], list[float], float, float]] = []

    def row(
        self, terms: Sequence[tuple[int, float]], low: float = -math.inf, high: float = math.inf
    ) -> None:
        """Add low ≤ Σ terms ≤ high."""
        if terms:
            self._rows.append(([c for c, _ in terms], [v for _, v in terms], low, high))

    def minimise(self, *, gap: float, search_s: float) -> _Run:
        """Find the least objective, within a part `gap` of it."""
        # scipy takes a fraction of a second to import: only gateways that plan batches need it.
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        lengths = [len(columns) for columns, _, _, _ in self._rows]
        rows = np.repeat(np.arange(len(self._rows)), lengths)
        columns = np.concatenate([np.array(c, dtype=np.intp) for c, _, _, _ in self._rows])
        values = np.concatenate([np.array(v) for _, v, _, _ in self._rows])
        shape = (len(self._rows), len(self.objective))
        matrix = sparse.csr_matrix((values, (rows, columns)), shape=shape)
        low = np.array([low for _, _, low, _ in self._rows])
        high = np.array([high for _, _, _, high in self._rows])
        found = milp(
            self.objective,
            integrality=self.integer,
            bounds=Bounds(np.zeros(shape[1]), self.upper),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": gap, "time_limit": search_s},
        )
        dual = found.mip_dual_bound
        return _Run(found.x, None if dual is None or not math.isfinite(dual) else float(dual))
