"""The choice of a pool where a request has one candidate, a single expert. Pure.

`select` computes the same from arrays of all experts and pools, which costs many times as much for
one expert in few pools: most of its steps are calls of numpy rather than arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.broker.pool_state import Floats, PoolStateTable, PoolView
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import Cast
from service.broker.selection import (
    LEAST_PREFILL_S,
    READ_ALONG,
    READING_S,
    ExpertInPool,
    Selection,
    SelectionRequest,
)
from service.rpc.snapshot import STALE_S

# In more pools than that, arrays are as fast.
_MOST_POOLS = 8
_READ_UNNOTICED_S = (1 - READ_ALONG) * READING_S
_POSSIBLE = np.zeros(1, dtype=np.int8)
_POSSIBLE.setflags(write=False)
_NO = np.zeros(1, dtype=bool)
_NO.setflags(write=False)


@dataclass(frozen=True, slots=True)
class SoleSelection(Selection):
    """The selection of the only candidate. Nothing is known of other experts, or other pools.

    Attributes:
        option: The candidate's expert in its best pool.
    """

    option: ExpertInPool

    def expert_in_pool(self, expert: str) -> ExpertInPool | None:
        """The best pool for an expert; None of any other than the candidate's."""
        return self.option if expert == self.option.expert else None


def select_sole(
    catalog: RecipeCatalog,
    table: PoolStateTable,
    views: Sequence[PoolView],
    request: SelectionRequest,
) -> SoleSelection | None:
    """Choose a pool for the only candidate of a request, as `select` does.

    Args:
        catalog: The recipes.
        table: The pools' rows.
        views: The pools to choose from.
        request: The request.

    Returns:
        The selection. None where only `select` can tell: the candidate is a recipe of several
        experts, the request has bounds or a session, no fresh pool can serve it in time, or there
        are many pools.
    """
    rows, bounds = request.rows, request.bounds
    if len(rows) != 1 or request.session is not None or len(views) > _MOST_POOLS:
        return None
    row = int(rows[0])
    if not catalog.single[row] or (
        bounds.allowed is not None
        or bounds.min_quality > 0
        or bounds.max_cost < math.inf
        or bounds.deadline_s < math.inf
    ):
        return None
    expert = catalog.recipes[row].members[0]
    column = catalog.index[expert]
    table.keep([view.boot for view in views])
    tokens, prompt_tokens = float(request.tokens[column]), request.prompt_tokens
    hint = request.prefix_cache
    best: tuple[float, float, float, float, float] | None = None
    least, option, idle = math.inf, None, math.inf
    for view in views:
        if view.age_s > STALE_S or (expert, view.boot) in request.excluded:
            continue
        place = table.place(view, column)
        if not place.usable or 0 < place.context < request.context_tokens:
            continue
        cached = 0
        prefill = place.first + place.per_token * prompt_tokens
        if hint is not None and (hint.expert, hint.boot) == (expert, view.boot):
            cached = min(hint.tokens, prompt_tokens)
            prefill -= place.per_token * cached
        decode = place.chunk * tokens
        answer = prefill + decode
        batches, rest = divmod(place.ahead, place.capacity)
        wait = place.eta + batches * answer + rest / place.capacity * prefill
        wait += place.per_token * max(0.0, place.prompts - place.ahead * prompt_tokens)
        total = wait + answer + place.displaced + place.far
        total -= max(0.0, LEAST_PREFILL_S - place.per_token) * cached
        reading = decode - min((1 - READ_ALONG) * decode, _READ_UNNOTICED_S * tokens) + prefill
        idle = min(idle, reading)
        if total < least:
            least = total
            best = wait, answer, prefill, wait + reading, place.displaced
            option = ExpertInPool(expert, view.boot, place.eta, wait, answer, place.chunk)
    if best is None or option is None:
        return None
    wait, answer, prefill, waiting, displaced = best
    if (wait + prefill if request.streams else wait + answer) > request.deadline_s:
        return None
    cost = float(request.cost[column])
    worth = float(request.quality[0]) - request.cost_price * cost
    count = len(catalog.experts)
    return SoleSelection(
        catalog=catalog,
        request=request,
        boots=(option.boot,),
        pool=np.zeros(count, np.intp),
        eta=_only(count, column, option.eta_s),
        chunk=_only(count, column, option.token_s),
        wait=_only(count, column, wait),
        answer=_only(count, column, answer),
        time=np.array((wait + answer,)),
        waiting=np.array((waiting,)),
        displaced=np.array((displaced,)),
        cost=np.array((cost,)),
        utility=np.array((worth - request.time_price * (waiting + displaced),)),
        exclusion=_POSSIBLE,
        ideal=np.array((worth - request.time_price * idle,)),
        cast=Cast(catalog.members[rows], catalog.later[rows], request.escalation_prob, _NO, _NO),
        option=option,
    )


def _only(count: int, column: int, value: float) -> Floats:
    figures = np.full(count, math.inf)
    figures[column] = value
    return figures
