"""A request's bounds: nothing that breaks one is left, and the nearest ones are possible."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, idle_view
from service.broker.quality_cost_bounds import (
    FIRST_BROKEN_BOUND,
    NearestBounds,
    RequestBounds,
    nearest_bounds,
    worst_costs,
)
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest, idle_times, select
from service.rpc.snapshot import Queue, Speed
from service.types import MAX_LATER, Recipe

EXPERTS = ("a", "b", "c")
BOOK = RecipeCatalog(EXPERTS, (Recipe("vote", ("a", "b", "c")), Recipe("cascade", ("a",), ("c",))))
ROWS = BOOK.everything
VIEW = idle_view(EXPERTS)

shares = st.floats(0, 1)
costs = st.lists(st.floats(1e-9, 1e3), min_size=3, max_size=3).map(np.array)
qualities = st.lists(shares, min_size=len(ROWS), max_size=len(ROWS)).map(np.array)
request_bounds = st.builds(
    RequestBounds,
    allowed=st.none() | st.lists(st.booleans(), min_size=3, max_size=3).map(np.array),
    min_quality=st.just(0.0) | shares,
    max_cost=st.just(math.inf) | st.floats(0, 2e3),
    floor=st.none() | costs,
    deadline_s=st.just(math.inf) | st.floats(0.001, 200),
)
times = st.lists(st.just(0.0) | st.floats(1e-3, 1e2), min_size=3, max_size=3).map(np.array)


def idle(chunk_s: np.ndarray) -> np.ndarray:
    """Time of each recipe, where each expert takes so long."""
    return np.array([sum(chunk_s[EXPERTS.index(e)] for e in r.experts) for r in BOOK.recipes])


def keeps(
    bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray, idle_s: np.ndarray
) -> np.ndarray:
    found = bounds.exclusions(BOOK, ROWS, quality, worst_costs(BOOK, ROWS, cost), idle_s)
    return np.asarray(found == 0)


@settings(deadline=None)
@given(request_bounds, qualities, costs, times)
def test_select_never_takes_a_recipe_that_breaks_a_bound(
    bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray, chunk_s: np.ndarray
) -> None:
    request = SelectionRequest(
        rows=ROWS,
        quality=quality,
        escalation_prob=np.full((len(ROWS), MAX_LATER), 0.5) * (BOOK.later[ROWS] < 3),
        tokens=np.full(3, 20.0),
        cost=cost,
        cost_price=0.01,
        bounds=bounds,
    )
    speeds = {n: Speed(0.0, c / 20) for n, c in zip(EXPERTS, chunk_s, strict=True) if c}
    # A queue makes no bound impossible, and one second is more than each bound here.
    waiting = {name: Queue(waiting=500, running=1) for name in EXPERTS}
    snapshot = replace(VIEW.snapshot, idle_speeds=speeds, queues=waiting)
    pools = PoolStateTable(BOOK.index).to_matrix([replace(VIEW, snapshot=snapshot)])
    got = select(BOOK, pools, request)
    idle_s = idle_times(BOOK, pools, request)
    best = got.best_position()
    assert (best is None) == (not keeps(bounds, quality, cost, idle_s).any())
    if best is None:
        assert (got.exclusion >= FIRST_BROKEN_BOUND).all()
        assert not np.isfinite(got.ideal).any(), "no pool loads an expert for it"
        return
    recipe = BOOK.recipes[best]
    at = [EXPERTS.index(name) for name in recipe.experts]
    assert quality[best] >= bounds.min_quality
    assert cost[at].sum() <= bounds.max_cost * (1 + 1e-12)
    if bounds.floor is not None:
        assert bounds.floor[at].sum() <= bounds.max_cost * (1 + 1e-12)
    if bounds.allowed is not None:
        assert bounds.allowed[at].all()
    assert idle_s[best] <= bounds.deadline_s


@settings(deadline=None)
@given(request_bounds, qualities, costs, times)
def test_nearest_bounds_are_possible_and_no_nearer_ones_are(
    bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray, chunk_s: np.ndarray
) -> None:
    idle_s = idle(chunk_s)

    def possible(**changed: Any) -> bool:
        return bool(keeps(replace(bounds, **changed), quality, cost, idle_s).any())

    if possible():
        return
    found = nearest_bounds(bounds, BOOK, ROWS, quality, worst_costs(BOOK, ROWS, cost), idle_s)
    if not possible(min_quality=0.0, max_cost=math.inf, deadline_s=math.inf):
        assert found == NearestBounds(), "only other experts would do"
        return
    if found.min_quality is not None:
        assert found.min_quality <= bounds.min_quality
        assert possible(min_quality=found.min_quality)
        assert not possible(min_quality=found.min_quality * 1.0011 + 1e-300)
    if found.max_cost is not None:
        assert found.max_cost > bounds.max_cost
        assert possible(max_cost=found.max_cost)
        assert not possible(max_cost=found.max_cost / 1.0011)
    if found.deadline_s is not None:
        assert found.deadline_s > bounds.deadline_s
        assert possible(deadline_s=found.deadline_s)
        assert not possible(deadline_s=found.deadline_s / 1.0011)
    # One bound suffices, or all are told together.
    alone = (found.min_quality, found.max_cost, found.deadline_s)
    assert (found.together is None) == any(value is not None for value in alone)
    if found.together is not None:
        least, most, deadline_s = found.together
        assert possible(min_quality=least, max_cost=most, deadline_s=deadline_s)


@pytest.mark.parametrize(
    ("bounds", "nearest"),
    [
        # `c` is the best alone, and the vote better; both cost more than 5.
        (RequestBounds(None, 0.75, 5.0), NearestBounds(0.6, 10.0)),
        (RequestBounds(None, 0.99, math.inf), NearestBounds(0.9)),
        (RequestBounds(None, 0.99, 0.5), NearestBounds(together=(0.9, 13.0, 7.0))),
        (RequestBounds(np.array([True, True, False]), 0.75, math.inf), NearestBounds(0.6)),
        # A recipe needs all of its experts.
        (RequestBounds(np.zeros(3, dtype=bool), 0.1, 5.0), NearestBounds()),
        (
            RequestBounds(None, 0.0, 0.5, np.array([7.0, 8.0, 9.0])),
            NearestBounds(max_cost=7.0),
        ),
        # `c` takes 4 s, and the experts that are good enough and quick are too dear.
        (RequestBounds(None, 0.75, 20.0, None, 3.0), NearestBounds(0.6, None, 4.0)),
        (RequestBounds(None, 0.0, math.inf, None, 0.5), NearestBounds(None, None, 1.0)),
    ],
)
def test_nearest_bounds_by_hand(bounds: RequestBounds, nearest: NearestBounds) -> None:
    quality = np.array([0.5, 0.6, 0.8, 0.9, 0.7])
    worst = worst_costs(BOOK, ROWS, np.array([1.0, 2.0, 10.0]))
    found = nearest_bounds(bounds, BOOK, ROWS, quality, worst, idle(np.array([1.0, 2.0, 4.0])))
    for name in ("min_quality", "max_cost", "deadline_s", "together"):
        expected, got = getattr(nearest, name), getattr(found, name)
        assert got == (None if expected is None else pytest.approx(expected, rel=2e-3)), name
