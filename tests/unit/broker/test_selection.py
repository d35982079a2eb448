"""The selection of recipe and pool: the utility formula and its edge cases."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.pool_state import REMOTE, PoolMatrix, PoolStateTable, PoolView
from service.broker.quality_cost_bounds import Exclusion, RequestBounds
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import (
    READ_ALONG,
    READING_S,
    PrefixCacheHint,
    Selection,
    SelectionRequest,
    select,
)
from service.broker.unmet_demand import failure_reason, pool_for_demand
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import MAX_LATER, Recipe, Residency

READY = ExpertState(Residency.DEVICE)
COLD = ExpertState(Residency.DISK, eta_s=20.0, swap_s=0.5)
TOKENS = 10


def view(
    boot: str,
    *,
    experts: dict[str, ExpertState] | None = None,
    queues: dict[str, Queue] | None = None,
    running: int = 0,
    waiting: int = 0,
    unseen: int = 0,
    age_s: float = 0.1,
    draining: bool = False,
    first_s: float = 0.1,
    per_token_s: float = 0.0,
) -> PoolView:
    held = experts or {"a": READY}
    snapshot = Snapshot(
        boot=boot,
        kind="cpu",
        draining=draining,
        experts=held,
        queues=queues or {name: Queue(waiting, running) for name in held},
        capacity=dict.fromkeys(held, 4),
        speeds={name: Speed(first_s, 0.01, per_token_s) for name in held},
    )
    return PoolView(boot, snapshot, age_s, dict.fromkeys(held, unseen) if unseen else {})


FAR = PoolView(REMOTE, Snapshot(boot=REMOTE, kind="remote", experts={"far": READY}), 0.0, {})


def decided(
    *views: PoolView,
    quality: dict[str | Recipe, float] | None = None,
    price: float = 0.01,
    escalation_prob: float = 0.5,
    cost: dict[str, float] | None = None,
    **more: Any,
) -> Selection:
    """Weigh recipes (single experts by name) with these pools."""
    wanted = quality or {"a": 1.0}
    recipes = [r if isinstance(r, Recipe) else Recipe("single", (r,)) for r in wanted]
    names = dict.fromkeys(name for recipe in recipes for name in recipe.experts)
    book = RecipeCatalog(tuple(names), recipes)
    later = np.zeros((len(recipes), MAX_LATER))
    for i, recipe in enumerate(recipes):
        later[i, : len(recipe.later)] = escalation_prob
    wish = SelectionRequest(
        rows=np.array([book.recipe_index[recipe] for recipe in recipes]),
        quality=np.array(list(wanted.values())),
        escalation_prob=later,
        tokens=np.full(len(names), float(TOKENS)),
        cost=np.array([(cost or {}).get(name, 0.0) for name in names]),
        time_price=price,
        **more,
    )
    return select(book, PoolStateTable(book.index).to_matrix(views), wish)


def winner(weighed: Selection) -> tuple[str, str | None] | None:
    """Its first expert and that one's pool."""
    at = weighed.best_position()
    if at is None:
        return None
    recipe = weighed.catalog.recipes[int(weighed.request.rows[at])]
    option = weighed.expert_in_pool(recipe.members[0])
    return recipe.name, option.boot if option else None


def test_select_prefers_the_shorter_wait_with_stable_ties() -> None:
    assert winner(decided(view("x", running=8), view("y"))) == ("a", "y")
    assert winner(decided(view("y"), view("y2"))) == ("a", "y")


def test_select_counts_requests_not_yet_in_the_snapshot() -> None:
    assert winner(decided(view("x", unseen=8), view("y", running=4))) == ("a", "y")


def test_select_wait_is_load_time_plus_batches_ahead_plus_own_share() -> None:
    def waits(pool: PoolView) -> float:
        return float(decided(pool).wait[0])

    assert waits(view("x", experts={"a": ExpertState(Residency.LOADING, eta_s=30)})) == 30
    each = 0.5 + TOKENS * 0.01
    assert waits(view("x", running=4, waiting=4, first_s=0.5)) == pytest.approx(2 * each)
    assert waits(view("x", running=2, first_s=0.5)) == pytest.approx(0.25)


def test_select_prefill_scales_with_the_prompt_and_a_warm_cache_shortens_it() -> None:
    pool = view("x", per_token_s=0.01)
    cold = decided(pool, prompt_tokens=1000)
    assert cold.answer[0] == pytest.approx(0.1 + 10 + 0.1)
    warm = decided(pool, prompt_tokens=1000, prefix_cache=PrefixCacheHint("a", "x", 900))
    assert warm.answer[0] == pytest.approx(0.1 + 1 + 0.1)
    # Before prompts of several lengths were measured, too, against as fast a pool.
    for first_s in (0.1, 0.0):
        alike = [view(boot, first_s=first_s) for boot in ("x", "y")]
        for boot in ("x", "y"):
            at = PrefixCacheHint("a", boot, 900)
            assert winner(decided(*alike, prompt_tokens=1000, prefix_cache=at)) == ("a", boot)
    elsewhere = decided(pool, prompt_tokens=1000, prefix_cache=PrefixCacheHint("a", "gone", 900))
    assert elsewhere.answer[0] == cold.answer[0]


def test_select_switching_expert_in_a_conversation_costs_the_prefix() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    pool = view("x", experts=both, per_token_s=0.01)
    for tokens, stays in ((100, False), (4000, True)):
        got = decided(
            pool,
            quality={"a": 0.5, "b": 0.7},
            prompt_tokens=5000,
            prefix_cache=PrefixCacheHint("a", "x", tokens),
        )
        # 0.01 quality a second, 0.01 s a token: 2,000 tokens are worth 0.2.
        assert winner(got) == ("a" if stays else "b", "x")


def test_select_trades_quality_against_wait() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    for ahead, first in ((40, "a"), (4000, "b")):
        queues = {"a": Queue(ahead, 0), "b": Queue()}
        got = decided(view("x", experts=both, queues=queues), quality={"a": 1.0, "b": 0.5})
        assert winner(got) == (first, "x")


def test_select_wait_counts_the_tokens_of_queued_prompts() -> None:
    def wait(queue: Queue) -> float:
        pool = view("x", per_token_s=0.01, queues={"a": queue})
        return float(decided(pool, prompt_tokens=100).wait[0])

    usual = wait(Queue(1, 0, 1, 100))
    assert wait(Queue(1, 0)) == usual
    assert wait(Queue(1, 0, 1, 30_000)) == pytest.approx(usual + 0.01 * 29_900)
    # Several answers of one request are as many requests ahead.
    assert wait(Queue(1, 0, 4, 100)) == wait(Queue(4, 0))


def test_select_traffic_shifts_where_the_formula_says() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    price, gap, capacity = 0.05, 0.3, 4
    each = 0.1 + TOKENS * 0.01
    moves_at = gap / price / each * capacity
    for ahead in range(0, 400, capacity):
        queues = {"a": Queue(ahead, 0), "b": Queue()}
        got = decided(
            view("x", experts=both, queues=queues), quality={"a": 0.9, "b": 0.9 - gap}, price=price
        )
        assert winner(got) == ("a" if ahead < moves_at else "b", "x")


def test_select_swap_cost_includes_displaced_requests_both_ways() -> None:
    experts = {"a": READY, "b": ExpertState(Residency.HOST, eta_s=0.5, swap_s=0.5)}
    busy = view("x", experts=experts, queues={"a": Queue(3, 4), "b": Queue()})
    got = decided(busy, quality={"a": 1.0, "b": 1.0})
    assert got.displaced.tolist() == [0, 2 * 0.5 * 7]
    # The requests that wait for it share the swaps.
    shared = view("x", experts=experts, queues={"a": Queue(3, 4), "b": Queue(4, 0)})
    assert decided(shared, quality={"a": 1.0, "b": 1.0}).displaced.tolist() == [0, 2 * 0.5 * 7 / 5]
    elsewhere = {"b": ExpertState(Residency.HOST, eta_s=0.5, swap_s=0.5, slot=1), "a": READY}
    assert decided(view("y", experts=elsewhere, waiting=5), quality={"b": 1}).displaced[0] == 0


def test_select_recipe_time_is_its_slowest_member_and_cost_the_sum() -> None:
    three = {name: ExpertState(Residency.DEVICE, slot=i) for i, name in enumerate("abc")}
    queues = {"a": Queue(), "b": Queue(8, 0), "c": Queue()}
    pool = view("x", experts=three, queues=queues)
    cascade = Recipe("cascade", ("a", "b"), ("c",))
    vote = Recipe("vote", ("a", "b", "c"))
    got = decided(
        pool,
        quality={cascade: 0.8, vote: 0.8},
        escalation_prob=0.25,
        cost={"a": 1.0, "b": 2.0, "c": 40.0},
        cost_price=0.001,
    )
    each = 0.1 + TOKENS * 0.01
    # A fifth of the decode is waiting.
    waiting = 0.1 + TOKENS * 0.01 * READ_ALONG
    assert got.time.tolist() == pytest.approx([3 * each + 0.25 * each, 3 * each])
    assert got.cost.tolist() == pytest.approx([3 + 0.25 * 40, 43])
    assert got.utility.tolist() == pytest.approx(
        [
            0.8 - 0.013 - 0.01 * (2 * each + 1.25 * waiting),
            0.8 - 0.043 - 0.01 * (2 * each + waiting),
        ]
    )


@pytest.mark.parametrize(
    ("token_s", "waiting_s"),
    [
        (0.0, 0.1),
        (READING_S / 2, 0.1 + READ_ALONG * TOKENS * READING_S / 2),
        (READING_S, 0.1 + READ_ALONG * TOKENS * READING_S),
        # What is slower than people read is waiting in full.
        (3 * READING_S, 0.1 + (READ_ALONG + 2) * TOKENS * READING_S),
    ],
)
def test_select_decode_counts_in_full_only_where_it_is_slower_than_reading(
    token_s: float, waiting_s: float
) -> None:
    pool = view("x")
    speeds = {"a": Speed(0.1, token_s, 0.0)}
    pool = replace(pool, snapshot=replace(pool.snapshot, speeds=speeds))
    got = decided(pool, price=0.05)
    assert got.time[0] == pytest.approx(0.1 + TOKENS * token_s)
    assert got.waiting[0] == pytest.approx(waiting_s)
    assert got.utility[0] == pytest.approx(1 - 0.05 * waiting_s)
    assert got.ideal[0] == pytest.approx(got.utility[0])


def test_select_cost_price_shifts_to_the_cheaper_expert() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    for price, first in ((0.0, "a"), (0.009, "a"), (0.011, "b")):
        got = decided(
            view("x", experts=both),
            quality={"a": 0.9, "b": 0.6},
            cost={"a": 31.0, "b": 1.0},
            cost_price=price,
        )
        assert winner(got) == (first, "x")


def test_select_excludes_recipes_whose_worst_case_exceeds_max_cost() -> None:
    three = {name: ExpertState(Residency.DEVICE, slot=i) for i, name in enumerate("abc")}
    cascade = Recipe("cascade", ("a", "b"), ("c",))
    cost = {"a": 1.0, "b": 1.0, "c": 10.0}
    wanted: dict[str | Recipe, float] = {cascade: 0.9, "a": 0.5}
    for most, first in ((12.0, cascade.name), (11.9, "a"), (0.5, None)):
        got = decided(
            view("x", experts=three), quality=wanted, cost=cost, bounds=RequestBounds(max_cost=most)
        )
        assert (winner(got) or (None,))[0] == first
    assert set(got.exclusion) == {Exclusion.MAX_COST}


def test_select_recipe_that_would_miss_the_deadline_yields_to_a_single_expert() -> None:
    three = {name: ExpertState(Residency.DEVICE, slot=i) for i, name in enumerate("abc")}
    cascade = Recipe("cascade", ("a", "b"), ("c",))
    pool = view("x", experts=three, first_s=1.0)  # 1.1 s an answer
    wanted: dict[str | Recipe, float] = {cascade: 0.9, "a": 0.5}
    for left_s, first in ((3.0, cascade.name), (2.0, "a"), (0.1, "a")):
        assert (winner(decided(pool, quality=wanted, deadline_s=left_s)) or ("",))[0] == first
    # To the first token only, where a single expert streams.
    streams = decided(pool, quality={"a": 0.5, "b": 0.6}, deadline_s=1.05, streams=True)
    assert not streams.exclusion.any()


def test_select_excludes_draining_and_failed_pools() -> None:
    failed = {"a": ExpertState(Residency.FAILED, reason="no weights")}
    assert winner(decided(view("x", draining=True), view("y", experts=failed))) is None
    assert winner(decided()) is None


def test_select_uses_a_stale_pool_only_as_the_last_choice() -> None:
    assert winner(decided(view("x", age_s=1.5), view("y", running=90))) == ("a", "y")
    got = decided(view("x", age_s=1.5), FAR, quality={"a": 1.0, "far": 0.1})
    assert winner(got) == ("far", REMOTE)
    assert winner(decided(view("x", age_s=1.5))) == ("a", "x")


def test_select_without_candidates_reports_the_exclusion_reason() -> None:
    held = {"a": ExpertState(Residency.DEVICE, max_model_len=1000)}
    pool = view("x", experts=held)
    resting = frozenset({("a", "x"), ("", "https://far.example"), ("a", "gone")})
    for case, tokens, why in (
        ({"excluded": resting}, 10, Exclusion.CIRCUIT_OPEN),
        ({"excluded": resting}, 0, Exclusion.CIRCUIT_OPEN),
        ({"excluded": {("a", "gone")}}, 10, Exclusion.NONE),
    ):
        assert list(decided(pool, context_tokens=tokens, **case).exclusion) == [why]
    assert list(decided(view("x", draining=True), context_tokens=10).exclusion) == [
        Exclusion.NO_POOL
    ]


def test_select_by_context_length_excludes_experts_unless_none_fits() -> None:
    both = {
        "a": ExpertState(Residency.DEVICE, max_model_len=1000),
        "b": ExpertState(Residency.DEVICE, slot=1, max_model_len=8000),
    }
    pool = view("x", experts=both)
    for tokens, first in ((900, "a"), (1100, "b"), (9000, "a")):
        got = decided(pool, quality={"a": 0.9, "b": 0.5}, context_tokens=tokens)
        assert winner(got) == (first, "x")
    got = decided(pool, quality={"a": 0.9, "b": 0.5}, context_tokens=1100)
    assert got.exclusion[0] == Exclusion.CONTEXT
    # Named, so that no other will do: its engine says that it does not fit.
    wish = got.request
    named = replace(
        wish, rows=wish.rows[:1], quality=wish.quality[:1], escalation_prob=wish.escalation_prob[:1]
    )
    pools = PoolStateTable(got.catalog.index).to_matrix([pool])
    assert winner(select(got.catalog, pools, named)) == ("a", "x")


def test_selection_holds_nothing_by_pool_and_expert() -> None:
    """A request keeps its selection until its answer ends: thousands of them must fit in memory."""
    pools = [view(f"pool-{i}") for i in range(300)]
    got = decided(*pools, quality={"a": 0.9})
    arrays = [getattr(got, f.name) for f in fields(got)]
    assert sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) < 8 * 300
    assert not any(isinstance(value, PoolMatrix) for value in arrays)


def test_select_excluded_places_are_not_chosen() -> None:
    pools = view("x"), view("y", running=8)
    assert winner(decided(*pools, excluded={("a", "x")})) == ("a", "y")
    assert winner(decided(*pools, excluded={("a", "x"), ("a", "y")})) is None


def test_unmet_demand_is_what_residency_would_have_won() -> None:
    pool = view("x", experts={"a": READY, "b": COLD})
    got = decided(pool, quality={"a": 0.5, "b": 0.9}, price=0.05)
    at = got.best_position()
    assert at == 0
    assert got.unmet_experts(at) == ("b",)
    assert got.unmet_utility(at) == pytest.approx(0.4, abs=0.01)
    patient = decided(pool, quality={"a": 0.5, "b": 0.9}, price=0.001)
    assert patient.unmet_experts(patient.best_position() or 0) == ()


def test_pool_for_demand_is_the_same_at_every_gateway() -> None:
    cold = {"a": READY, "b": COLD}
    pools = [view(boot, experts=cold) for boot in ("x", "y", "z")]
    homes = {pool_for_demand("b", order) for order in (pools, pools[::-1], pools[1:] + pools[:1])}
    assert len(homes) == 1


@given(st.lists(st.lists(st.integers(0, 16), min_size=3, max_size=3), min_size=2, max_size=8))
def test_pool_for_demand_is_the_same_for_loads_of_different_moments(
    moments: list[list[int]],
) -> None:
    cold = {"a": READY, "b": COLD}
    homes = {
        pool_for_demand(
            "b",
            [
                view(boot, experts=cold, queues={"a": Queue(running=load), "b": Queue()})
                for boot, load in zip("xyz", loads, strict=True)
            ],
        )
        for loads in moments
    }
    assert len(homes) == 1


def test_pool_for_demand_avoids_a_pool_with_several_times_the_load() -> None:
    cold = {"a": READY, "b": COLD}
    for busy, idle in (("x", "y"), ("y", "x")):
        loads = {busy: 90, idle: 20}
        views = [
            view(boot, experts=cold, queues={"a": Queue(running=load), "b": Queue()})
            for boot, load in loads.items()
        ]
        assert pool_for_demand("b", views) == idle


def test_pool_for_demand_prefers_the_pool_that_is_loading_the_expert() -> None:
    coming = {"a": READY, "b": ExpertState(Residency.LOADING, eta_s=5, swap_s=0.5)}
    cold = {"a": READY, "b": COLD}
    assert (
        pool_for_demand("b", [view("x", experts=cold), view("y", experts=coming, running=90)])
        == "y"
    )
    assert pool_for_demand("b", [view("x")]) is None


def test_failure_reason_is_given_only_when_every_pool_failed() -> None:
    failed = view("x", experts={"a": ExpertState(Residency.FAILED, reason="no weights")})
    assert failure_reason("a", [failed]) == "no weights"
    assert failure_reason("a", [failed, view("y")]) is None
    assert failure_reason("b", [failed]) is None
    assert failure_reason("a", []) is None


def test_pool_state_table_keeps_a_row_until_the_next_snapshot() -> None:
    board = PoolStateTable({"a": 0})
    pool = view("x", running=4)
    assert board.to_matrix([pool]).ahead.tolist() == [[4]]
    busier = PoolView("x", view("x", running=8).snapshot, 0.1, {"a": 2})
    assert board.to_matrix([busier]).ahead.tolist() == [[10]]
    assert board.to_matrix([pool]).ahead.tolist() == [[4]]
