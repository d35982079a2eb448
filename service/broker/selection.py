"""Selection of a recipe and pools for a request. Pure.

Every recipe r, with one pool for each of its experts, has a utility,

    U = Q − λ_cost · c − λ_time · (W + X)

- Q: expected quality of its answer to this prompt, in [0, 1]
- c: expected cost of all calls
- W: expected waiting time in s
- X: time in s that its swaps cost other requests
- λ_cost: the preset's price of cost, plus the shadow prices of the budgets
- λ_time: the preset's price of waiting

A conversation's session (`service/broker/session_terms.py`) adds its terms: an open tool call
leaves only the expert that made it, and otherwise a hand-over to another recipe has a cost.

The time of one expert consists of loading or swapping, queue, prefill and decode. Waiting is the
time to the first token, and then a fifth of the decode: people read while it runs. Where it is
slower than they read, the excess is waiting in full. A recipe calls its members at the same time,
so W contains the waiting for the slowest member. It calls its later experts one after another, and
only if it needs them. W therefore adds the waiting for each later expert, multiplied by the
probability of its call. Predictions and deadlines use T, which is the same with all of the decode.

The recipe with the greatest utility wins. This choice is the online form of a multiple-choice
knapsack (Kellerer, Pferschy, Pisinger: Knapsack Problems, ch. 11): each request takes its best
option at the current prices.

Unmet demand is the utility that the best recipe would have gained if every expert were resident and
idle. It makes pools load cold experts for which no single request would wait.

Deliberations and recruits make more calls than one of each expert: `service/broker/recipe_steps.py`
has their part of c, W and T, and the choice of a recruit's experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import BootId, Floats, Place, PoolMatrix
from service.broker.quality_cost_bounds import FIRST_BROKEN_BOUND, Exclusion, RequestBounds
from service.broker.recipe_catalog import Ints, RecipeCatalog
from service.broker.recipe_steps import (
    Cast,
    StepFigures,
    StepTimes,
    beyond_first_calls,
    cast_of,
    fixed_cast,
)
from service.broker.session_terms import (
    SessionOutcome,
    SessionTerms,
    apply_terms,
    decide,
    release_reason,
)

_INFINITE = np.inf
# Prefill time of a prompt token, at least, where pools are compared: 50,000 tokens a second.
LEAST_PREFILL_S = 2e-5
_NO_POOLS = np.zeros(0, dtype=np.intp)
# Time in which people read a token: 238 words a minute (Brysbaert: How many words do we read per
# minute?, 2019) of 1.33 tokens.
READING_S = 60 / (238 * 1.33)
# Share of the decode that counts as waiting while it keeps up with reading.
READ_ALONG = 0.2
_READ_UNNOTICED_S = (1 - READ_ALONG) * READING_S


@dataclass(frozen=True, slots=True)
class PrefixCacheHint:
    """The pool whose prefix cache holds the beginning of a conversation.

    Attributes:
        expert: The expert that answered before.
        boot: The pool's boot id.
        tokens: Number of prompt tokens that the cache holds.
    """

    expert: str
    boot: BootId
    tokens: int

    def compare(self, expert: str, boot: BootId) -> Literal["cached", "elsewhere"]:
        """Whether this expert in this pool has the conversation in its prefix cache."""
        return "cached" if (self.expert, self.boot) == (expert, boot) else "elsewhere"


@dataclass(frozen=True, slots=True)
class SelectionRequest:
    """One request, as the selection sees it.

    Attributes:
        rows: (recipes,), the recipes to choose from, as rows of the catalog.
        quality: (recipes,), expected quality in [0, 1].
        escalation_prob: (recipes, MAX_LATER), probability that each later expert is called.
        tokens: (experts,), expected length of each expert's answer.
        cost: (experts,), expected cost of one call.
        prompt_tokens: Length of the prompt.
        time_price: Quality per second of waiting.
        cost_price: Quality per unit of cost, `budget_price` included.
        budget_price: The part of `cost_price` that the budgets' shadow prices make up.
        bounds: The client's bounds of quality, cost and experts.
        deadline_s: Time left in s, to the first token if `streams`, else to the end.
        context_tokens: Context that prompt and answer need; 0 if it is unknown.
        streams: Whether the answer is streamed.
        prefix_cache: The pool that has the beginning of the prompt in its prefix cache.
        excluded: Places, as (expert, pool's boot id), that must not be selected.
        session: The terms of the conversation's session, if it has one.
        steps: What experts write and read in the steps of recipes, where the catalog has such.
        skill: (experts,), expected quality of each expert alone, where recipes recruit.
        recruitable: (experts,), the experts that a recipe may recruit; None for all.
    """

    rows: Ints
    quality: Floats
    escalation_prob: Floats
    tokens: Floats
    cost: Floats
    prompt_tokens: int = 0
    time_price: float = 0.01
    cost_price: float = 0.0
    budget_price: float = 0.0
    bounds: RequestBounds = field(default_factory=RequestBounds)
    deadline_s: float = _INFINITE
    context_tokens: int = 0
    streams: bool = False
    prefix_cache: PrefixCacheHint | None = None
    excluded: Collection[Place] = field(default=())
    session: SessionTerms | None = None
    steps: StepFigures | None = None
    skill: Floats | None = None
    recruitable: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class ExpertInPool:
    """One expert in one pool: a member of a candidate.

    Attributes:
        expert: The expert.
        boot: The pool's boot id; `REMOTE` for a remote expert of this gateway.
        eta_s: Time until its weights are ready, swaps included.
        wait_s: Time until prefill starts, `eta_s` included.
        answer_s: Time from then to the end of the answer.
        token_s: Time of one more token of the answer.
    """

    expert: str
    boot: BootId
    eta_s: float
    wait_s: float
    answer_s: float
    token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Selection:
    """All recipes of a request with their utilities. Times in s.

    It holds nothing by pool and expert, because a request keeps it until its answer has ended.

    Attributes:
        catalog: The recipes that the rows refer to.
        request: The request.
        boots: Boot ids of the pools.
        pool: (experts,), best pool for each expert, an index into `boots`.
        eta: (experts,), time until the expert's weights are ready there.
        chunk: (experts,), time of a token of the answer there.
        wait: (experts,), time until prefill starts there.
        answer: (experts,), time from then to the end of the answer.
        time: (recipes,), expected time to the answer. Like all fields below, it is in the order of
            `request.rows`.
        waiting: (recipes,), the part of it that counts as waiting.
        displaced: (recipes,), time that the recipe's swaps cost other requests.
        cost: (recipes,), expected cost.
        utility: (recipes,), utility; -inf for excluded recipes.
        exclusion: (recipes,), an `Exclusion` for each; 0 for possible recipes.
        ideal: (recipes,), utility if all experts were resident and idle.
        cast: The experts of each recipe.
    """

    catalog: RecipeCatalog
    request: SelectionRequest
    boots: tuple[BootId, ...]
    pool: Ints
    eta: Floats
    chunk: Floats
    wait: Floats
    answer: Floats
    time: Floats
    waiting: Floats
    displaced: Floats
    cost: Floats
    utility: Floats
    exclusion: NDArray[np.int8]
    ideal: Floats
    cast: Cast

    def members(self, position: int) -> tuple[str, ...]:
        """The experts whose first answers the recipe at a position takes."""
        return self._named(self.cast.members[position])

    def later(self, position: int) -> tuple[str, ...]:
        """The experts that it may call after them."""
        return self._named(self.cast.later[position])

    def _named(self, columns: Ints) -> tuple[str, ...]:
        experts = self.catalog.experts
        return tuple(experts[e] for e in columns.tolist() if e < len(experts))

    def best_position(self) -> int | None:
        """Position of the winner among `request.rows`; None if every recipe is excluded."""
        if not len(self.utility):
            return None
        # Among equal utilities, argmax takes the recipe that comes first in the config.
        position = int(self.utility.argmax())
        return position if self.utility[position] > -_INFINITE else None

    @property
    def locked(self) -> bool:
        """Whether an open tool call leaves only the expert that made it."""
        terms = self.request.session
        return terms is not None and terms.locked and self.release_reason is None

    @property
    def release_reason(self) -> str | None:
        """Why the session's recipe can't answer; None if it can, or without a session."""
        terms = self.request.session
        if terms is None:
            return None
        return release_reason(terms, self.request.rows, self.exclusion)

    def session_outcome(self, chosen: int) -> SessionOutcome | None:
        """How the session took part in the choice of the position `chosen`; None without one."""
        terms = self.request.session
        if terms is None:
            return None
        return decide(terms, self.request.rows, self.exclusion, chosen)

    @property
    def net_quality(self) -> Floats:
        """(recipes,), utility without the budgets' shadow prices; -inf for excluded recipes."""
        return self.utility + self.request.budget_price * self.cost

    def order(self) -> Ints:
        """(recipes,), positions in `request.rows`, best first and excluded recipes last."""
        return np.argsort(-self.utility, kind="stable")

    def expert_in_pool(self, expert: str) -> ExpertInPool | None:
        """The best pool for an expert; None if no pool can serve it."""
        column = self.catalog.index[expert]
        if not np.isfinite(self.wait[column]):
            return None
        return ExpertInPool(
            expert,
            self.boots[int(self.pool[column])],
            float(self.eta[column]),
            float(self.wait[column]),
            float(self.answer[column]),
            float(self.chunk[column]),
        )

    def unmet_experts(self, chosen: int) -> tuple[str, ...]:
        """Return the members of the recipe that would win if all experts were resident and idle.

        Empty if that recipe is `chosen`.
        """
        position = int(self.ideal.argmax())
        if position == chosen or not self.unmet_utility(chosen) > 0:
            return ()
        return self.members(position)

    def unmet_utility(self, chosen: int) -> float:
        """Utility that the recipe of `unmet_experts` would have gained over the `chosen` recipe."""
        return float(self.ideal.max() - self.utility[chosen])


@dataclass(frozen=True, slots=True)
class _ExpertTimes:
    """Times of each expert in its best pool, each (experts,) in s; infinite without a pool.

    Attributes:
        pool: Row of the best pool.
        eta: Time until the expert's weights are ready.
        chunk: Time of a token of the answer.
        wait: Time until prefill starts.
        answer: Time from then to the end of the answer.
        prefill: Time of the prefill.
        waiting: Time that counts as waiting, from `wait` and `answer`.
        displaced: Time that a swap costs other requests.
        idle: Waiting if the expert were resident and idle.
        steps: What further calls take; None where no recipe makes them.
    """

    pool: Ints
    eta: Floats
    chunk: Floats
    wait: Floats
    answer: Floats
    prefill: Floats
    waiting: Floats
    displaced: Floats
    idle: Floats
    steps: StepTimes | None = None


@dataclass(frozen=True, slots=True)
class _RecipeTotals:
    """Totals of each recipe over its experts, each (recipes,); times in s.

    Attributes:
        time: Expected time to the answer.
        waiting: The part of it that counts as waiting.
        displaced: Expected time that its swaps cost other requests.
        cost: Expected cost.
        ideal_waiting: Expected waiting if all experts were resident and idle.
        max_cost: Cost if every expert is called.
        deadline_time: Time to compare with the deadline, if every expert is called. It ends at the
            first token for a stream of one expert, and at the end of the answer otherwise.
    """

    time: Floats
    waiting: Floats
    displaced: Floats
    cost: Floats
    ideal_waiting: Floats
    max_cost: Floats
    deadline_time: Floats


def select(catalog: RecipeCatalog, pools: PoolMatrix, request: SelectionRequest) -> Selection:
    """Compute the utility of every recipe of a request.

    Pools whose snapshot is older than a second are used only if no other pool is possible.
    """
    fitting = _fits_context(pools, request)
    usable = pools.usable
    if (fitting != usable).any():
        possible = (fitting.any(axis=0) | ~catalog.uses[request.rows]).all(axis=1)
        # If no recipe fits, the engine refuses the request, and its error states both lengths.
        usable = fitting if possible.any() else usable
    if request.excluded:
        usable = usable.copy()
        for expert, boot in request.excluded:
            if boot in pools.boots:
                usable[pools.boots.index(boot), catalog.index[expert]] = False
    if not pools.fresh.all():
        fresh = usable & pools.fresh[:, None]
        selection = _select_among(catalog, pools, request, fresh)
        if not (usable & ~fresh).any():
            return selection
        if selection.best_position() is not None:
            if request.session is None or not request.session.locked or selection.locked:
                return selection
            # A silent pool may still have the expert whose tool call is open.
            every = _select_among(catalog, pools, request, usable)
            return every if every.locked else selection
    return _select_among(catalog, pools, request, usable)


def _fits_context(pools: PoolMatrix, request: SelectionRequest) -> NDArray[np.bool_]:
    """(pools, experts), whether prompt and answer fit. An unknown context fits everything."""
    fits: NDArray[np.bool_] = (pools.context == 0) | (pools.context >= request.context_tokens)
    return pools.usable & fits


def _select_among(
    catalog: RecipeCatalog,
    pools: PoolMatrix,
    request: SelectionRequest,
    usable: NDArray[np.bool_],
) -> Selection:
    """Select among the places where `usable`, (pools, experts), is true."""
    times = _expert_times(catalog, pools, request, usable)
    rows = request.rows
    single = catalog.single[rows]
    cast = _cast(catalog, request, times)
    if single.all():
        totals = _single_totals(catalog, request, times)
    else:
        totals = _recipe_totals(catalog, request, times, single, cast)
    quality_less_cost = request.quality - request.cost_price * totals.cost
    utility = quality_less_cost - request.time_price * (totals.waiting + totals.displaced)
    exclusion = _exclusions(catalog, pools, request, totals, single)
    ideal = np.where(
        np.isfinite(totals.ideal_waiting) & (exclusion < FIRST_BROKEN_BOUND),
        quality_less_cost - request.time_price * totals.ideal_waiting,
        -_INFINITE,
    )
    if request.session is not None:
        apply_terms(request.session, rows, utility, ideal, exclusion)
    utility[exclusion != 0] = -_INFINITE
    return Selection(
        catalog=catalog,
        request=request,
        boots=pools.boots,
        pool=times.pool,
        eta=times.eta,
        chunk=times.chunk,
        wait=times.wait,
        answer=times.answer,
        time=totals.time,
        waiting=totals.waiting,
        displaced=totals.displaced,
        cost=totals.cost,
        utility=utility,
        exclusion=exclusion,
        ideal=ideal,
        cast=cast,
    )


def _cast(catalog: RecipeCatalog, request: SelectionRequest, times: _ExpertTimes) -> Cast:
    """The experts of each recipe, those that are recruited for this prompt included."""
    rows = request.rows
    if not catalog.recruits[rows].any():
        return fixed_cast(catalog, rows, request.escalation_prob)
    eligible = np.isfinite(times.wait)
    for allowed in (request.recruitable, request.bounds.allowed):
        if allowed is not None:
            eligible &= allowed
    price = request.cost_price * request.cost + request.time_price * np.where(
        eligible, times.waiting + times.displaced, 0.0
    )
    skill = np.zeros(len(catalog.experts)) if request.skill is None else request.skill
    return cast_of(
        catalog,
        rows,
        request.escalation_prob,
        eligible=eligible,
        skill=skill,
        price=price,
        cost=request.cost
        if request.bounds.floor is None
        else np.maximum(request.cost, request.bounds.floor),
        max_cost=request.bounds.max_cost,
    )


def _expert_times(
    catalog: RecipeCatalog,
    pools: PoolMatrix,
    request: SelectionRequest,
    usable: NDArray[np.bool_],
) -> _ExpertTimes:
    """Choose the best pool for each expert: the pool of the least time, displacement included."""
    if not len(pools.boots):
        never = np.full(len(catalog.experts), _INFINITE)
        nowhere = StepTimes(never, never, never, never) if catalog.has_steps else None
        return _ExpertTimes(_NO_POOLS, *(never,) * 8, nowhere)
    prefill = pools.first + pools.per_token * request.prompt_tokens
    hint = request.prefix_cache
    warm: tuple[int, int] | None = None
    cached = 0
    if hint is not None and hint.boot in pools.boots and hint.expert in catalog.index:
        warm = pools.boots.index(hint.boot), catalog.index[hint.expert]
        cached = min(hint.tokens, request.prompt_tokens)
        prefill[warm] -= pools.per_token[warm] * cached
    decode = pools.chunk * request.tokens
    answer = prefill + decode
    # Both are whole numbers, so this is what the slower `divmod` gives.
    batches = np.floor(pools.ahead / pools.capacity)
    rest = pools.ahead - batches * pools.capacity
    # A request waits until all full batches before it have ended. The other requests ahead run in
    # its own batch, and delay it only by a share of their prefill.
    wait = pools.eta + batches * answer + rest / pools.capacity * prefill
    # The estimate assumes that the requests ahead have prompts like this one. Longer prompts among
    # them add their prefill time.
    wait += pools.per_token * np.maximum(0.0, pools.prompts - pools.ahead * request.prompt_tokens)
    total = wait + answer + pools.displaced + pools.far
    if warm is not None:
        # Prompts of one length teach no time per token, which is not 0 for that.
        total[warm] -= max(0.0, LEAST_PREFILL_S - pools.per_token[warm]) * cached
    total[~usable] = _INFINITE
    pool = total.argmin(axis=0)
    columns = catalog.all_singles
    exists = usable[pool, columns]

    def in_best_pool(figure: Floats) -> Floats:
        return np.where(exists, figure[pool, columns], _INFINITE)

    # Subtract the part of the decode during which the client reads.
    decode -= np.minimum((1 - READ_ALONG) * decode, _READ_UNNOTICED_S * request.tokens)
    decode += prefill
    best_wait, best_prefill = in_best_pool(wait), in_best_pool(prefill)
    chunk = in_best_pool(pools.chunk)
    steps = None
    if catalog.has_steps:
        steps = StepTimes(best_wait, best_prefill, in_best_pool(pools.per_token), chunk)
    return _ExpertTimes(
        pool=pool,
        eta=in_best_pool(pools.eta),
        chunk=chunk,
        wait=best_wait,
        answer=in_best_pool(answer),
        prefill=best_prefill,
        waiting=best_wait + in_best_pool(decode),
        displaced=in_best_pool(pools.displaced),
        idle=np.where(usable, decode, _INFINITE).min(axis=0),
        steps=steps,
    )


def _exclusions(
    catalog: RecipeCatalog,
    pools: PoolMatrix,
    request: SelectionRequest,
    totals: _RecipeTotals,
    single: NDArray[np.bool_],
) -> NDArray[np.int8]:
    """(recipes,), an `Exclusion` for each recipe. `single`, (recipes,), marks single experts."""
    rows = request.rows
    idle_s = None
    if math.isfinite(request.bounds.deadline_s):
        idle_s = idle_times(catalog, pools, request)
    exclusion = request.bounds.exclusions(catalog, rows, request.quality, totals.max_cost, idle_s)
    no_pool = ~np.isfinite(totals.time) & (exclusion == 0)
    if no_pool.any():
        exclusion[no_pool] = Exclusion.NO_POOL
        if request.context_tokens:
            small = pools.usable.any(axis=0) & ~_fits_context(pools, request).any(axis=0)
            exclusion[no_pool & (catalog.uses[rows] & small).any(axis=1)] = Exclusion.CONTEXT
        if request.excluded:
            open_circuits = np.zeros(len(catalog.experts), dtype=bool)
            experts = [expert for expert, boot in request.excluded if boot in pools.boots]
            open_circuits[[catalog.index[expert] for expert in experts]] = True
            affected = (catalog.uses[rows] & open_circuits).any(axis=1)
            exclusion[(exclusion == Exclusion.NO_POOL) & affected] = Exclusion.CIRCUIT_OPEN
    if math.isfinite(request.deadline_s):
        late = (totals.deadline_time > request.deadline_s) & (exclusion == 0)
        if late.any():
            # If all recipes are late, single experts may still try, or else every recipe.
            if (late | (exclusion != 0)).all():
                late &= ~single & (late & single).any()
            exclusion[late] = Exclusion.DEADLINE
    return exclusion


def idle_times(catalog: RecipeCatalog, pools: PoolMatrix, request: SelectionRequest) -> Floats:
    """(recipes,), the expected time if all experts were resident and idle, each of them called.

    It ends where the deadline counts, as `_RecipeTotals.deadline_time` does. It is a lower bound:
    an expert that no pool has, or that some pool has never run alone, counts as taking no time.
    Deliberations and recruits count their first answers, because a deadline leaves the best so far.
    """
    rows = request.rows
    if not len(pools.boots):
        return np.zeros(len(rows))
    hint = request.prefix_cache
    cached = hint.tokens if hint is not None else 0
    prefill = pools.idle_first + pools.idle_per_token * max(0, request.prompt_tokens - cached)
    experts = np.zeros((2, len(catalog.experts) + 1))
    for i, time in enumerate((prefill, prefill + pools.idle_chunk * request.tokens)):
        least = np.where(pools.usable, time, _INFINITE).min(axis=0)
        # The last column stands for the absent members of short recipes.
        experts[i, :-1] = np.where(np.isfinite(least), least, 0.0)
    first, end = experts
    members, later = catalog.members[rows], catalog.later[rows]
    in_full: Floats = end[members].max(axis=1) + end[later].sum(axis=1)
    for at in np.flatnonzero(catalog.recruits[rows]).tolist():
        in_full[at] = end[:-1][catalog.among[rows[at]]].min()
    if not request.streams:
        return in_full
    return np.where(catalog.single[rows], first[members[:, 0]], in_full)


def _single_totals(
    catalog: RecipeCatalog, request: SelectionRequest, times: _ExpertTimes
) -> _RecipeTotals:
    """Totals of single experts. The result equals that of `_recipe_totals`, but is faster."""
    experts = catalog.members[request.rows, 0]
    time = (times.wait + times.answer)[experts]
    cost = request.cost[experts]
    return _RecipeTotals(
        time=time,
        waiting=times.waiting[experts],
        displaced=times.displaced[experts],
        cost=cost,
        ideal_waiting=times.idle[experts],
        max_cost=cost,
        deadline_time=(times.wait + times.prefill)[experts] if request.streams else time,
    )


# Rows of the table of experts' figures.
_TIME, _WAITING, _DISPLACED, _COST, _IDLE, _FIRST = range(6)


def _recipe_totals(
    catalog: RecipeCatalog,
    request: SelectionRequest,
    times: _ExpertTimes,
    single: NDArray[np.bool_],
    cast: Cast,
) -> _RecipeTotals:
    """Totals of any recipes.

    The slowest member determines the members' time. Their other figures add up. The figures of a
    later expert are multiplied by the probability of its call, and then added.

    Args:
        catalog: The recipes.
        request: The request.
        times: The times of each expert.
        single: (recipes,), whether a recipe is a single expert.
        cast: The experts of each recipe.
    """
    rows, members, later = request.rows, cast.members, cast.later
    # The last column holds zeros. It stands for the absent members of short recipes.
    table = np.zeros((6, len(catalog.experts) + 1))
    table[:, :-1] = (
        times.wait + times.answer,
        times.waiting,
        times.displaced,
        request.cost,
        times.idle,
        times.wait + times.prefill,
    )
    # (figures, members, recipes): reducing an axis is faster where the last one is long.
    of_members = table.take(members.T, axis=1)
    of_later = table.take(later.T, axis=1)
    slowest = of_members[_TIME].max(axis=0)
    max_cost = of_members[_COST].sum(axis=0) + of_later[_COST].sum(axis=0)
    # A recipe of several experts can't stream before they have agreed.
    first = table[_FIRST] if request.streams else table[_TIME]
    in_full = slowest + of_later[_TIME].sum(axis=0)
    deadline_time = np.where(single, first[members[:, 0]], in_full)
    recruits = catalog.recruits[rows]
    if request.streams and recruits.any():
        # A recruit streams its aggregator's answer.
        deadline_time = np.where(recruits, slowest + first[later[:, 0]], deadline_time)
    # 0 · ∞ would be NaN, but an expert that is never called costs nothing.
    prob = np.ascontiguousarray(cast.later_prob.T)
    called = np.zeros((_FIRST, *prob.shape))
    np.multiply(of_later[:_FIRST], prob, out=called, where=prob > 0)
    expected = called.sum(axis=1)
    totals = _RecipeTotals(
        time=slowest + expected[_TIME],
        waiting=of_members[_WAITING].max(axis=0) + expected[_WAITING],
        displaced=of_members[_DISPLACED].sum(axis=0) + expected[_DISPLACED],
        cost=of_members[_COST].sum(axis=0) + expected[_COST],
        ideal_waiting=of_members[_IDLE].max(axis=0) + expected[_IDLE],
        max_cost=max_cost,
        deadline_time=deadline_time,
    )
    stepping = recruits | catalog.deliberates[rows]
    if stepping.any():
        totals = _with_steps(catalog, request, times, totals, cast)
    return totals


def _with_steps(
    catalog: RecipeCatalog,
    request: SelectionRequest,
    times: _ExpertTimes,
    totals: _RecipeTotals,
    cast: Cast,
) -> _RecipeTotals:
    """Add what deliberations and recruits cost and take beyond one call of each expert."""
    if request.steps is None or times.steps is None:
        raise ValueError("the catalog has recipes with steps, and the request lacks `steps`")
    waits, none = times.steps, np.zeros(len(catalog.experts))
    beyond, idle = (
        beyond_first_calls(
            catalog,
            request.rows,
            request.escalation_prob,
            request.cost,
            request.steps,
            cast,
            each,
        )
        for each in (waits, replace(waits, wait=none))
    )
    time = totals.time + beyond.time
    time[cast.missing] = _INFINITE
    # Nobody reads along while others review.
    return _RecipeTotals(
        time=time,
        waiting=totals.waiting + beyond.time,
        displaced=totals.displaced * (1.0 + beyond.displaced_calls),
        cost=totals.cost + beyond.cost,
        ideal_waiting=np.where(cast.missing, _INFINITE, totals.ideal_waiting + idle.time),
        max_cost=np.where(cast.too_dear, _INFINITE, totals.max_cost + beyond.most_cost),
        deadline_time=totals.deadline_time + beyond.most_time,
    )
