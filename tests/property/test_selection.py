"""Single experts get the same utility with and without recipes beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.quality_cost_bounds import RequestBounds
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest, idle_times, select
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import MAX_LATER, Recipe, Residency

EXPERTS = ("a", "b", "c")
TOGETHER = (Recipe("vote", ("a", "b", "c")), Recipe("cascade", ("a", "b"), ("c",)))

seconds = st.floats(0.001, 100.0)
states = st.builds(
    ExpertState,
    st.sampled_from([Residency.DEVICE, Residency.DISK, Residency.FAILED]),
    eta_s=seconds,
    swap_s=seconds,
    max_model_len=st.sampled_from([0, 100, 1000]),
)


@st.composite
def pools(draw: st.DrawFn) -> list[PoolView]:
    """Up to three pools, each with some of the experts."""
    found = []
    for i in range(draw(st.integers(0, 3))):
        held = draw(st.dictionaries(st.sampled_from(EXPERTS), states))
        queue = st.builds(Queue, st.integers(0, 5), st.integers(0, 5))
        snapshot = Snapshot(
            boot=str(i),
            kind="cpu",
            experts=held,
            queues={name: draw(queue) for name in held},
            capacity=dict.fromkeys(held, 4),
            speeds={name: Speed(draw(seconds), draw(seconds), 0.001) for name in held},
        )
        found.append(PoolView(str(i), snapshot, draw(st.sampled_from([0.1, 2.0])), {}))
    return found


@given(
    pools(),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
    st.sampled_from([np.inf, 5.0]),
    st.sampled_from([np.inf, 1.0, 50.0]),
    st.booleans(),
    st.sampled_from([0, 500]),
)
def test_select_single_experts_score_alike_with_and_without_recipes(
    views: list[PoolView],
    quality: list[float],
    cost: list[float],
    most_cost: float,
    deadline_s: float,
    streams: bool,
    context_tokens: int,
) -> None:
    book = RecipeCatalog(EXPERTS, TOGETHER)
    standing = PoolStateTable(book.index).to_matrix(views)

    def weighed(rows: int, deadline_s: float):  # type: ignore[no-untyped-def]
        wish = SelectionRequest(
            rows=book.everything[:rows],
            quality=np.array(quality[:rows]),
            escalation_prob=np.full((rows, MAX_LATER), 0.5) * (book.later[:rows] < len(EXPERTS)),
            tokens=np.full(3, 20.0),
            cost=np.array(cost),
            prompt_tokens=30,
            cost_price=0.01,
            bounds=RequestBounds(max_cost=most_cost),
            deadline_s=deadline_s,
            context_tokens=context_tokens,
            streams=streams,
        )
        return select(book, standing, wish)

    alone, beside = weighed(3, np.inf), weighed(5, np.inf)
    for figure in ("time", "displaced", "cost", "utility", "ideal", "exclusion"):
        np.testing.assert_array_equal(getattr(alone, figure), getattr(beside, figure)[:3], figure)
    alone, beside = weighed(3, deadline_s), weighed(5, deadline_s)
    if not alone.exclusion.all():
        # Else a deadline that all miss is no bar to a single expert.
        np.testing.assert_array_equal(alone.exclusion, beside.exclusion[:3])


@given(st.permutations(range(10)), st.sampled_from([Residency.DISK, Residency.HOST]))
def test_cold_experts_spread_over_equal_pools_whose_order_does_not_matter(
    order: list[int], state: Residency
) -> None:
    names = tuple(f"expert-{i}" for i in range(300))
    book = RecipeCatalog(names, ())

    def chosen(order: list[int], eta_s: float) -> list[str]:
        held = {name: ExpertState(state, eta_s=eta_s, swap_s=eta_s) for name in names}
        views = [
            PoolView(f"pool-{i}", Snapshot(f"pool-{i}", "gpu", experts=held), 0.1, {})
            for i in order
        ]
        wish = SelectionRequest(
            rows=book.everything,
            quality=np.ones(len(names)),
            escalation_prob=np.zeros((len(names), MAX_LATER)),
            tokens=np.full(len(names), 20.0),
            cost=np.zeros(len(names)),
        )
        matrix = PoolStateTable(book.index).to_matrix(views)
        got = select(book, matrix, wish)
        return [f"pool-{order[int(at)]}" for at in got.pool.tolist()]

    first = chosen(list(range(10)), 5.0)
    assert chosen(order, 5.0) == first == chosen(order, 50.0)
    counts = Counter(first)
    assert len(counts) == 10
    assert max(counts.values()) <= 60


@given(pools(), st.integers(0, 200))
def test_idle_times_are_what_the_selection_expects_of_an_idle_pool(
    views: list[PoolView], prompt_tokens: int
) -> None:
    book = RecipeCatalog(EXPERTS, TOGETHER)
    table = PoolStateTable(book.index)
    wish = SelectionRequest(
        rows=book.everything,
        quality=np.ones(len(book.everything)),
        escalation_prob=np.ones((len(book.everything), MAX_LATER)) * (book.later < len(EXPERTS)),
        tokens=np.full(3, 20.0),
        cost=np.zeros(3),
        prompt_tokens=prompt_tokens,
    )
    # What was never measured alone is never too slow, and queues and swaps do not count.
    assert not idle_times(book, table.to_matrix(views), wish).any()
    for view in views:
        held = view.snapshot.experts
        ready = {name: structs.replace(state, eta_s=0.0) for name, state in held.items()}
        idle = replace(view.snapshot, experts=ready, queues={}, idle_speeds=view.snapshot.speeds)
        matrix = table.to_matrix([replace(view, snapshot=idle)])
        expected = select(book, matrix, wish).time
        known = np.isfinite(expected)
        to_end = idle_times(book, matrix, wish)
        np.testing.assert_allclose(to_end[known], expected[known])
        streamed = idle_times(book, matrix, replace(wish, streams=True))
        single = book.single & known
        first_s = to_end[single] - 20 * matrix.chunk[0, book.members[single, 0]]
        np.testing.assert_allclose(streamed[single], first_s)
        np.testing.assert_array_equal(streamed[~book.single], to_end[~book.single])
