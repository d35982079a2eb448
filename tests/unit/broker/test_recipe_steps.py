"""Costs and times of deliberations and recruits, and the choice of a recruit's experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.quality_cost_bounds import Exclusion, RequestBounds
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import (
    LEAST_RECRUITS,
    TEMPLATE_TOKENS,
    StepFigures,
    cast_of,
    expected_usage,
    further_steps,
    most_cost,
)
from service.broker.selection import Selection, SelectionRequest, idle_times, select
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import MAX_LATER, Deliberation, Recipe, Recruitment, Residency

EXPERTS = ("a", "b", "c", "d")


def deliberation(rounds: int) -> Recipe:
    settings = Deliberation(rounds, 16.0, 0.2, 512, "", "")
    return Recipe("deliberate", ("a", "b", "c"), deliberation=settings)


def recruit(k: int, aggregator: str | None = None, among: tuple[str, ...] = EXPERTS) -> Recipe:
    return Recipe("recruit", among, recruitment=Recruitment(k, aggregator, ""))


BOOK = RecipeCatalog(
    EXPERTS, [deliberation(1), replace(deliberation(3), members=("b", "c", "d")), recruit(2)]
)
ONE, THREE, TWO_OF = 4, 5, 6


def pool(speed: float = 0.01) -> PoolView:
    snapshot = Snapshot(
        boot="p",
        kind="cpu",
        experts={name: ExpertState(Residency.DEVICE) for name in EXPERTS},
        queues=dict.fromkeys(EXPERTS, Queue(0, 0)),
        capacity=dict.fromkeys(EXPERTS, 4),
        speeds={name: Speed(0.1, speed, 0.001) for name in EXPERTS},
        idle_speeds={name: Speed(0.1, speed, 0.001) for name in EXPERTS},
    )
    return PoolView("p", snapshot, 0.1, {})


def figures(reviews: float = 50.0) -> StepFigures:
    return StepFigures(
        np.full(4, 100.0), np.full(4, reviews), np.full(4, 2.0), np.array([0.01, 0.01, 0.01, 0.02])
    )


def chosen(
    rows: list[int],
    prob: list[float] | None = None,
    skill: list[float] | None = None,
    **more: object,
) -> Selection:
    table = PoolStateTable(BOOK.index)
    wish = SelectionRequest(
        rows=np.array(rows),
        quality=np.ones(len(rows)),
        escalation_prob=np.tile(prob or [0.0] * MAX_LATER, (len(rows), 1)),
        tokens=np.full(4, 100.0),
        cost=np.array([1.0, 1.0, 1.0, 3.0]),
        prompt_tokens=20,
        steps=figures(),
        skill=np.array(skill or [0.4, 0.3, 0.2, 0.1]),
        **more,  # type: ignore[arg-type]
    )
    return select(BOOK, table.to_matrix([pool()]), wish)


def test_select_deliberation_of_one_round_costs_answers_and_reviews() -> None:
    found = chosen([ONE], [1.0, 0.0, 0.0])
    # Three answers of 1, and three reviews of 2 that read 200 tokens at 0.01.
    assert found.cost[0] == pytest.approx(3 + 3 * (2 + 2))
    alone = chosen([0])
    assert found.time[0] > alone.time[0] + 50 * 0.01


@given(st.lists(st.floats(0, 1), min_size=MAX_LATER, max_size=MAX_LATER))
def test_select_deliberation_costs_grow_with_its_steps_up_to_the_most(prob: list[float]) -> None:
    found = chosen([THREE], prob)
    never, always = chosen([THREE]), chosen([THREE], [1.0] * MAX_LATER)
    for figure in ("cost", "time", "waiting"):
        low, here, high = (float(getattr(s, figure)[0]) for s in (never, found, always))
        assert low - 1e-9 <= here <= high + 1e-9
    cost = found.request.cost
    most = most_cost(BOOK, np.array([THREE]), cost, figures())[0]
    assert always.cost[0] == pytest.approx(most)


def test_select_deliberation_beyond_max_cost_or_deadline_is_excluded() -> None:
    most = float(most_cost(BOOK, np.array([ONE]), np.array([1.0, 1.0, 1.0, 3.0]), figures())[0])
    for bound, expected in ((most, Exclusion.NONE), (most - 0.01, Exclusion.MAX_COST)):
        found = chosen([0, ONE], [1.0, 0, 0], bounds=RequestBounds(max_cost=bound))
        assert found.exclusion[1] == expected
    free = chosen([0, ONE], [1.0, 0, 0])
    late = float(free.time[1]) - 0.01
    assert chosen([0, ONE], [1.0, 0, 0], deadline_s=late).exclusion.tolist() == [0, 3]
    assert chosen([ONE], [1.0, 0, 0], deadline_s=0.01).exclusion.tolist() == [0]


def test_idle_times_of_recipes_with_steps_count_the_first_answers() -> None:
    table = PoolStateTable(BOOK.index)
    request = chosen([0, ONE, TWO_OF]).request
    idle = idle_times(BOOK, table.to_matrix([pool()]), request)
    assert idle[0] == idle[1] == idle[2] > 0


def test_select_recruit_takes_the_experts_of_greatest_utility() -> None:
    found = chosen([TWO_OF], [1.0, 0, 0])
    assert (found.members(0), found.later(0)) == (("a", "b"), ("a",))
    found = chosen([TWO_OF], [1.0, 0, 0], [0.1, 0.2, 0.3, 0.4])
    assert (found.members(0), found.later(0)) == (("d", "c"), ("d",))
    # Dear experts have to be that much better.
    found = chosen([TWO_OF], [1.0, 0, 0], [0.1, 0.2, 0.3, 0.4], cost_price=0.11)
    assert found.members(0) == ("c", "b")
    assert found.cost[0] == pytest.approx(1 + 1 + 3 + 0.02 * 350)
    assert chosen([TWO_OF], [0.0, 0, 0]).cost[0] == pytest.approx(2)


def test_select_recruit_keeps_bounds_and_what_may_be_recruited() -> None:
    may = np.array([False, True, True, True])
    assert chosen([TWO_OF], recruitable=may).members(0) == ("b", "c")
    bounds = RequestBounds(allowed=np.array([True, False, False, True]))
    assert chosen([TWO_OF], bounds=bounds).members(0) == ("a", "d")
    bounds = RequestBounds(allowed=np.array([True, False, False, False]))
    assert chosen([TWO_OF], bounds=bounds).exclusion[0] == Exclusion.NOT_ALLOWED
    none = np.zeros(4, dtype=bool)
    assert chosen([TWO_OF], recruitable=none).exclusion[0] == Exclusion.NO_POOL
    bounds = RequestBounds(max_cost=1.5)
    assert chosen([0, TWO_OF], [1.0, 0, 0], bounds=bounds).exclusion[1] == Exclusion.MAX_COST


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.lists(st.floats(0, 5), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([np.inf, 3.0, 1.0]),
    st.sampled_from([None, "d"]),
    st.integers(2, 4),
)
def test_cast_of_recruits_distinct_eligible_experts_within_the_cost(
    skill: list[float],
    cost: list[float],
    eligible: list[bool],
    max_cost: float,
    aggregator: str | None,
    k: int,
) -> None:
    catalog = RecipeCatalog(EXPERTS, [recruit(k, aggregator)])
    each = np.array(cost)
    found = cast_of(
        catalog,
        np.array([0, 4]),
        np.ones((2, MAX_LATER)),
        eligible=np.array(eligible),
        skill=np.array(skill),
        price=0.1 * each,
        cost=each,
        max_cost=max_cost,
    )
    assert found.members[0, 0] == 0
    members = [e for e in found.members[1].tolist() if e < 4]
    assert len(set(members)) == len(members) <= k
    assert all(eligible[e] for e in members)
    assert found.missing[1] == (len(members) < LEAST_RECRUITS)
    if not found.missing[1]:
        later = int(found.later[1, 0])
        assert later == 3 if aggregator else eligible[later]
        assert each[members].sum() + each[later] <= max_cost + 1e-9
        if not np.isfinite(max_cost):
            worth = np.array(skill) - 0.1 * each
            left = [e for e in range(4) if eligible[e] and e not in members]
            assert all(worth[m] >= worth[e] - 1e-9 for m in members for e in left)


# Prompts of 20 tokens and answers of 100: a review reads the other two answers and writes 50.
ANSWERS, REVIEWS = 3 * 120.0, 3 * (20.0 + TEMPLATE_TOKENS + 200.0 + 50.0)
# The best answer, and corrections of two reviewers.
AGAIN = 3 * (20.0 + TEMPLATE_TOKENS + 100.0 + 50.0 + 100.0)
FIRST_COST, REVIEW_COST = 3.0, 3 * (2.0 + 0.01 * 200)


@pytest.mark.parametrize(
    ("row", "prob", "cost", "tokens"),
    [
        (0, [0.0, 0.0, 0.0], 1.0, 120.0),
        (ONE, [0.0, 0.0, 0.0], FIRST_COST, ANSWERS),
        (ONE, [0.5, 0.9, 0.9], FIRST_COST + 0.5 * REVIEW_COST, ANSWERS + 0.5 * REVIEWS),
        (
            THREE,
            [1.0, 0.5, 0.25],
            None,
            ANSWERS + REVIEWS + 0.75 * (REVIEWS + AGAIN),
        ),
        # The aggregator reads two answers.
        (TWO_OF, [0.5, 0.0, 0.0], 2 + 0.5 * (1 + 0.01 * 350), 2 * 120 + 0.5 * (120 + 350)),
    ],
)
def test_expected_usage_counts_each_step_by_what_it_reads_and_writes(
    row: int, prob: list[float], cost: float | None, tokens: float
) -> None:
    skill = [0.9, 0.8, 0.2, 0.1]
    used = expected_usage(
        BOOK,
        np.array([row]),
        np.array([prob]),
        np.array([1.0, 1.0, 1.0, 3.0]),
        np.full(4, 20.0),
        np.full(4, 100.0),
        figures(),
        np.array(skill),
    )
    assert used.tokens == pytest.approx([tokens])
    # The selection expects the same cost.
    assert used.cost == pytest.approx(chosen([row], prob, skill).cost)
    if cost is not None:
        assert used.cost == pytest.approx([cost])


def test_further_steps_of_a_deliberation_count_answers_and_reviews() -> None:
    found = further_steps(np.array([[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]))
    assert found.tolist() == [3.5, 1.0]


@pytest.mark.parametrize(
    ("kind", "members", "settings"),
    [
        ("deliberate", ("a", "b"), {"deliberation": Deliberation(1, 1, 0, 16, "", "")}),
        ("deliberate", ("a", "b", "c"), {}),
        ("vote", ("a", "b", "c"), {"recruitment": Recruitment(2, None, "")}),
        ("recruit", ("a",), {"recruitment": Recruitment(2, None, "")}),
        ("recruit", ("a", "b"), {}),
    ],
)
def test_recipe_with_wrong_settings_is_refused(
    kind: str, members: tuple[str, ...], settings: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="invalid recipe"):
        Recipe(kind, members, **settings)  # type: ignore[arg-type]
