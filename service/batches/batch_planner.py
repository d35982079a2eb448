"""Plans a batch: the knapsack over all of its lines, and the order in which they run.

The gateway's estimator classifies the lines and expects quality, cost and time of each. The choice
of answerers is `service/broker/batch_knapsack.py`. Here the lines get their order: those of one
expert together, so that it is loaded once; experts that are resident first; and lines that begin
alike one after another, so that the prefix cache of the engine holds their beginning.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.batches.batch_types import (
    BatchLine,
    BatchPlan,
    BatchTerms,
    FinishedLine,
    LineChoice,
)
from service.broker.batch_knapsack import (
    BatchBounds,
    BatchInfeasibleError,
    BatchOptions,
    BatchSolution,
    Floats,
    Ints,
    least_cost,
    solve,
)
from service.broker.line_costs import cost_ratios, features
from service.errors import InvalidRequestError, RateLimitExceededError
from service.types import Tenant

# The budgets of a curve, as parts of the way from the least cost to the cost of the best quality.
_CURVE = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)

# One in so many lines of an expert, those with the least work, comes last.
_LAST = 5
# Forecasts of one tenant that may wait at once, with the one that is made.
_MOST_ASKED = 8
# Fewer lines that are left keep their choices: the chance of single lengths decides then.
_FEWEST_LEFT = 32
# A new plan leaves room for so many of the dearest lines, or this part, whichever is less.
_ROOM_LINES, _ROOM_PART = 4.0, 32.0
# The longest time for the points of a curve, in s; those that are left are left out then.
_CURVE_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class LineEstimates:
    """What is expected of a batch's lines, with L lines, R models and E experts.

    Attributes:
        numbers: (L,), the numbers of the lines.
        models: (R,), names of experts and recipes.
        experts: (E,), names of experts.
        options: Quality, cost and time of each model for each line.
        tokens: (L, R), expected tokens of prompts and answers of all calls.
        load_s: (P, E), time until each engine can answer for each expert, in s; infinite where it
            never can.
        weights: (E,), the expert on whose weights each expert runs.
        prompts: (L,), texts that begin alike where the prompts do.
        category: (L,), a number for the category of each line.
        unplanned: Lines that no model can answer, or that are not valid. They run as they are, so
            that each gets its own error.
        least: (L, R), the least bound of cost with which a line is not refused; None for 0.
    """

    numbers: Ints
    models: tuple[str, ...]
    experts: tuple[str, ...]
    options: BatchOptions
    tokens: Floats
    load_s: Floats
    weights: Ints
    prompts: tuple[str, ...]
    category: Ints
    unplanned: tuple[LineChoice, ...] = ()
    least: Floats | None = None


class EstimatesLines(Protocol):
    """Expects quality, cost and time of the lines of a batch."""

    async def estimate(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> LineEstimates:
        """Estimate all lines, without holding up other requests.

        Args:
            endpoint: The path that the lines are for.
            lines: The lines.
            tenant: The tenant whose batch it is.
        """


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """What a batch would be within one budget.

    Attributes:
        max_cost: The budget, in units of cost; None for no bound.
        quality: The mean expected quality of the lines, in [0, 1].
        cost: The expected cost of all lines.
        seconds: The expected time, in s.
        shares: By model, its part of the lines.
        best_quality: No choice within the budget has a greater mean quality.
    """

    max_cost: float | None
    quality: float
    cost: float
    seconds: float
    shares: dict[str, float]
    best_quality: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a client sees it."""
        return {
            "max_cost": self.max_cost,
            "quality": round(self.quality, 6),
            "cost": self.cost,
            "seconds": round(self.seconds, 3),
            "shares": {name: round(share, 6) for name, share in self.shares.items()},
        }


@dataclass(frozen=True, slots=True)
class BatchOutlook:
    """The forecasts of a batch.

    Attributes:
        lines: How many lines were planned.
        unplanned: How many lines no model can answer.
        plan: The forecast by the batch's own terms; None where nothing keeps them.
        problem: Why nothing keeps them.
        curve: Forecasts for several budgets, the least one first, by the same deadline.
    """

    lines: int
    unplanned: int
    plan: BatchForecast | None
    problem: str | None
    curve: tuple[BatchForecast, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a client sees it."""
        return {
            "object": "batch.plan",
            "lines": self.lines,
            "unplanned": self.unplanned,
            "plan": None if self.plan is None else self.plan.to_json(),
            "problem": self.problem,
            "curve": [point.to_json() for point in self.curve],
        }


class BatchPlanner:
    """Plans the batches of a gateway.

    Args:
        estimator: Expects quality, cost and time of lines.
    """

    def __init__(self, estimator: EstimatesLines) -> None:
        self._estimator = estimator
        # Forecasts cost seconds of a core, so that one is made at a time. Those of one tenant have
        # a queue of their own, so that others wait for one of them at most.
        self._forecasting = asyncio.Lock()
        self._queues: dict[str, asyncio.Lock] = {}
        self._asked: Counter[str] = Counter()

    async def plan(
        self, endpoint: str, lines: Sequence[BatchLine], terms: BatchTerms, tenant: Tenant
    ) -> BatchPlan:
        """Plan a batch.

        Args:
            endpoint: The path that the lines are for, such as `/v1/chat/completions`.
            lines: The lines.
            terms: The terms of the batch. `quality` is a part of the best total quality that the
                other terms allow.
            tenant: The tenant whose batch it is.

        Raises:
            InvalidRequestError: No plan keeps the terms.
        """
        found = await self._estimator.estimate(endpoint, lines, tenant)
        if not len(found.numbers):
            return BatchPlan(found.unplanned, 0.0, 0.0, 0.0)
        try:
            # The solver works for seconds on a large batch.
            return await asyncio.to_thread(_plan, found, terms)
        except BatchInfeasibleError as error:
            raise _infeasible_error(error, found) from None

    async def basis(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> object | None:
        """Expect again what a plan goes by, after a restart."""
        return await self._estimator.estimate(endpoint, lines, tenant)

    async def replan(
        self,
        basis: object,
        terms: BatchTerms,
        left: Sequence[Sequence[LineChoice]],
        finished: Sequence[FinishedLine],
    ) -> BatchPlan | None:
        """Plan the lines of a batch that are left, see `replanned`."""
        assert isinstance(basis, LineEstimates)
        return await asyncio.to_thread(replanned, basis, terms, left, finished)

    async def forecast(
        self,
        endpoint: str,
        lines: Sequence[BatchLine],
        terms: BatchTerms,
        tenant: Tenant,
        budgets: Sequence[float] = (),
    ) -> BatchOutlook:
        """Tell what a batch would be by its terms, and for several budgets, without running it.

        Args:
            endpoint: The path that the lines are for.
            lines: The lines.
            terms: The terms of the batch.
            tenant: The tenant whose batch it is.
            budgets: The budgets of the curve; without any, budgets from the least possible cost to
                that of the best quality.
        """
        async with self._forecasting:
            return await self._forecast(endpoint, lines, terms, tenant, budgets)

    @asynccontextmanager
    async def asked_by(self, tenant: Tenant) -> AsyncIterator[None]:
        """Let a tenant read the lines of one forecast at a time, and make it.

        Raises:
            RateLimitExceededError: The tenant has asked for too many forecasts at once.
        """
        name = tenant.name
        if self._asked[name] >= _MOST_ASKED:
            raise RateLimitExceededError(
                f"this tenant may ask for {_MOST_ASKED} forecasts of batches at once",
                retry_after_s=5.0,
            )
        self._asked[name] += 1
        try:
            async with self._queues.setdefault(name, asyncio.Lock()):
                yield
        finally:
            self._asked[name] -= 1
            if not self._asked[name]:
                del self._asked[name], self._queues[name]

    async def _forecast(
        self,
        endpoint: str,
        lines: Sequence[BatchLine],
        terms: BatchTerms,
        tenant: Tenant,
        budgets: Sequence[float],
    ) -> BatchOutlook:
        found = await self._estimator.estimate(endpoint, lines, tenant)
        if not len(found.numbers):
            return BatchOutlook(0, len(found.unplanned), None, "no line can be answered", ())
        plan, problem = None, None
        try:
            plan = await asyncio.to_thread(_forecast, found, terms)
        except BatchInfeasibleError as error:
            problem = str(_infeasible_error(error, found))
        curve = []
        free = replace(terms, max_cost=None, quality=None)
        end_s = time.monotonic() + _CURVE_S
        for budget in budgets or await asyncio.to_thread(_budgets, found, free):
            if time.monotonic() > end_s:
                break
            try:
                point = await asyncio.to_thread(_forecast, found, replace(free, max_cost=budget))
            except BatchInfeasibleError:
                continue
            curve.append(point)
        return BatchOutlook(len(found.numbers), len(found.unplanned), plan, problem, tuple(curve))


def _infeasible_error(error: BatchInfeasibleError, found: LineEstimates) -> InvalidRequestError:
    if error.term == "lines":
        number = int(found.numbers[int(error.nearest)])
        return InvalidRequestError(f"line {number + 1}: no engine can answer it now", param="coe")
    return InvalidRequestError(f"no plan keeps the terms: {error}", param=f"coe.{error.term}")


def _plan(found: LineEstimates, terms: BatchTerms, *, exact: bool = True) -> BatchPlan:
    solution = _solve(found, terms, exact=exact)
    options, chosen = found.options, solution.chosen
    lines = np.arange(len(chosen))
    work_s = (options.calls[chosen] * options.seconds).sum(axis=1)
    first = options.calls.argmax(axis=1)[chosen]
    order = run_order(first, work_s, found.prompts, found.load_s, found.weights)
    quality, cost = options.quality[lines, chosen], options.cost[lines, chosen]
    tokens = found.tokens[lines, chosen]
    least = np.zeros(len(lines)) if found.least is None else found.least[lines, chosen]
    choices = tuple(
        LineChoice(
            int(found.numbers[line]),
            found.models[chosen[line]],
            float(quality[line]),
            float(cost[line]),
            float(tokens[line]),
            float(least[line]),
        )
        for line in order.tolist()
    )
    count = len(choices) + len(found.unplanned)
    return BatchPlan(
        (*found.unplanned, *choices),
        solution.quality / count,
        solution.cost,
        solution.seconds,
        found,
    )


def replanned(
    found: LineEstimates,
    terms: BatchTerms,
    left: Sequence[Sequence[LineChoice]],
    finished: Sequence[FinishedLine],
) -> BatchPlan | None:
    """Plan the lines of a batch that are left, with the costs that the finished ones teach.

    Experts whose lines have all run, and that are not resident, get lines again only where the rest
    does not fit into the cost without them: each would be loaded once more. Where nothing fits,
    every line takes what costs least.

    Args:
        found: What was expected of all lines.
        terms: The terms for the lines that are left.
        left: These lines, by model in the order in which they would run.
        finished: What other lines have cost.

    Returns:
        The plan; None where too little is left to choose, or the time is too short for any.
    """
    place = {number: row for row, number in enumerate(found.numbers.tolist())}
    rows = np.array(
        [place[choice.line] for lines in left for choice in lines if choice.line in place],
        dtype=np.intp,
    )
    if len(rows) < _FEWEST_LEFT:
        return None
    ratios = _ratios(found, place, finished)[rows]
    options = found.options.only(rows)
    options = replace(options, cost=options.cost * ratios)
    # It is certain that any line has one of these.
    running = {lines[0].model for lines in left}
    resident = (found.load_s == 0).any(axis=0)[found.weights]
    loaded = ~(options.calls[:, ~resident] > 0).any(axis=1)
    kept = loaded | np.array([model in running for model in found.models])
    rest = replace(
        found,
        numbers=found.numbers[rows],
        options=replace(options, possible=options.possible & kept),
        tokens=found.tokens[rows] * ratios,
        prompts=tuple(found.prompts[row] for row in rows.tolist()),
        category=found.category[rows],
        unplanned=(),
        least=None if found.least is None else found.least[rows],
    )
    most = math.inf if terms.max_cost is None else terms.max_cost
    if math.isfinite(most):
        # What a line may cost at most has to fit, to the last line.
        dearest = float(np.where(options.possible, options.cost, 0.0).max())
        most -= min(_ROOM_LINES * dearest, most / _ROOM_PART)
        terms = replace(terms, max_cost=most)
    if least_cost(rest.options) > most:
        rest = replace(rest, options=options)
        least = least_cost(options)
        terms = replace(terms, max_cost=max(most, least * (1 + 1e-9)))
    try:
        return _plan(rest, terms, exact=False)
    except BatchInfeasibleError:
        return None


def _ratios(
    found: LineEstimates, place: Mapping[int, int], finished: Sequence[FinishedLine]
) -> Floats:
    """(L, R), real cost by expected cost, as the finished lines let expect."""
    column = {model: at for at, model in enumerate(found.models)}
    cost = found.options.cost
    seen = [
        (place[line.line], column[line.model], line.cost)
        for line in finished
        if line.line in place and line.model in column
    ]
    lines = np.array([line for line, _, _ in seen], dtype=np.intp)
    chosen = np.array([model for _, model, _ in seen], dtype=np.intp)
    spent = np.array([cost for _, _, cost in seen], dtype=np.float64)
    expected = cost[lines, chosen]
    known = expected > 0
    given = features(found.options.quality, found.tokens)
    return cost_ratios(
        given,
        found.category,
        len(found.models),
        lines[known],
        chosen[known],
        spent[known] / expected[known],
    )


def _solve(found: LineEstimates, terms: BatchTerms, *, exact: bool = True) -> BatchSolution:
    possible = found.options.possible
    resident = possible & runs_at_once(found.options.calls, found.load_s, found.weights)
    # A line that names a recipe of such experts keeps it.
    possible = np.where(resident.any(axis=1)[:, None], resident, possible)
    options = replace(found.options, possible=possible)
    bounds = BatchBounds(
        np.inf if terms.max_cost is None else terms.max_cost, terms.deadline_s, terms.quality
    )
    return solve(options, found.load_s, bounds, exact=exact)


def _forecast(found: LineEstimates, terms: BatchTerms) -> BatchForecast:
    solution = _solve(found, terms)
    lines = len(solution.chosen)
    counts = np.bincount(solution.chosen, minlength=len(found.models))
    shares = {name: n / lines for name, n in zip(found.models, counts.tolist(), strict=True) if n}
    best = solution.bound if terms.quality is None else solution.quality
    return BatchForecast(
        terms.max_cost,
        solution.quality / lines,
        solution.cost,
        solution.seconds,
        shares,
        best / lines,
    )


def _budgets(found: LineEstimates, terms: BatchTerms) -> list[float]:
    """Budgets from the least cost to that of the best quality; none where nothing is possible."""
    try:
        dearest = _solve(found, terms).cost
    except BatchInfeasibleError:
        return []
    least = least_cost(found.options)
    parts = [least + part * (dearest - least) for part in _CURVE]
    return list(dict.fromkeys(parts))


def runs_at_once(calls: Floats, load_s: Floats, weights: Ints) -> Any:
    """(R,), whether a recipe's experts can be resident at the same time.

    Experts that share a slot would be swapped for every line, so that a batch leaves out recipes
    that ask several of them.

    Args:
        calls: (R, E), calls of each expert.
        load_s: (P, E), finite where an engine can hold the expert.
        weights: (E,), the expert on whose weights each expert runs.
    """
    holds = np.isfinite(load_s)
    fits = np.ones(len(calls), dtype=bool)
    for r in range(len(calls)):
        units = {int(weights[e]) for e in np.flatnonzero(calls[r])}
        if len(units) > 1:
            fits[r] = _matched(units, holds)
    return fits


def _matched(units: set[int], holds: Any) -> bool:
    """Whether each unit finds an engine of its own (augmenting paths)."""
    taken: dict[int, int] = {}

    def place(unit: int, seen: set[int]) -> bool:
        for engine in np.flatnonzero(holds[:, unit]).tolist():
            if engine not in seen:
                seen.add(engine)
                if engine not in taken or place(taken[engine], seen):
                    taken[engine] = unit
                    return True
        return False

    return all(place(unit, set()) for unit in units)


def _least_of_each(unit: Ints, work_s: Floats, rank: Ints) -> NDArray[np.bool_]:
    """(L,), whether a line is of the fifth of its unit's lines with the least work.

    Of lines with the same work those of the highest `rank` are.
    """
    by_unit = np.lexsort((-rank, work_s, unit))
    sizes = np.bincount(unit)
    begins = np.cumsum(sizes) - sizes
    at = np.empty(len(unit), dtype=np.intp)
    at[by_unit] = np.arange(len(unit)) - begins[unit[by_unit]]
    return np.asarray(at < sizes[unit] // _LAST)


def run_order(
    first: Ints, work_s: Floats, prompts: Sequence[str], load_s: Floats, weights: Ints
) -> Ints:
    """The order in which lines run.

    Each engine gets a sequence of experts: those on resident weights first, then one expert after
    another, the one with the most work first. In an expert's lines, prompts that begin alike stand
    together, but the fifth with the least work comes last, in falling order: an engine that waits
    for its last lines before a swap waits for short ones. The sequences of several engines are
    merged by the time at which a line would start, so that all engines have work.

    Args:
        first: (L,), the expert that each line asks first.
        work_s: (L,), time of an engine for each line, in s.
        prompts: (L,), texts that begin alike where the prompts do.
        load_s: (P, E), time to load, in s.
        weights: (E,), the expert on whose weights each expert runs.

    Returns:
        (L,), the indices of the lines.
    """
    experts = load_s.shape[1]
    unit_s = np.bincount(weights[first], weights=work_s, minlength=experts)
    ends = np.zeros(len(load_s))
    home = np.zeros(experts, dtype=np.intp)
    resident = (load_s == 0).any(axis=0)
    units = sorted(
        np.flatnonzero(np.bincount(weights[first], minlength=experts)).tolist(),
        key=lambda unit: (not resident[unit], -unit_s[unit], unit),
    )
    place: dict[int, int] = {}
    for turn, unit in enumerate(units):
        after = ends + load_s[:, unit] + unit_s[unit]
        home[unit] = int(after.argmin())
        if np.isfinite(after[home[unit]]):
            ends[home[unit]] = after[home[unit]]
        place[unit] = turn
    begins = np.array(sorted(range(len(first)), key=prompts.__getitem__), dtype=np.intp)
    rank = np.empty(len(first), dtype=np.intp)
    rank[begins] = np.arange(len(first))
    position = np.array([place[unit] for unit in weights[first].tolist()], dtype=np.intp)
    last = _least_of_each(weights[first], work_s, rank)
    ordered = np.lexsort((rank, np.where(last, -work_s, 0.0), first, last, position))
    starts = np.zeros(len(first))
    clock = np.zeros(len(load_s))
    engines = home[weights[first]]
    for engine in range(len(load_s)):
        own = ordered[engines[ordered] == engine]
        loads = np.where(np.isfinite(load_s[engine]), load_s[engine], 0.0)[weights[first[own]]]
        new = np.diff(position[own], prepend=-1) != 0
        steps = work_s[own] + np.where(new, loads, 0.0)
        starts[own] = clock[engine] + np.cumsum(steps) - work_s[own]
    at = np.empty(len(first), dtype=np.intp)
    at[ordered] = np.arange(len(first))
    merged: Ints = np.lexsort((at, starts))
    return merged
