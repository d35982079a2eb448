"""Votes on answers: bounded by their budget, and of no use to a hostile member."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.answer_agreement import FinalAnswer
from service.broker.deliberation import (
    MAX_SCORE,
    Review,
    RoundPrice,
    StopReason,
    all_agree,
    leader,
    leader_belief,
    round_gain,
    stop_reason,
    tally,
    unanimous,
    votes_of,
)

scores = st.floats(0, MAX_SCORE)
budgets = st.floats(0.01, 1000)
FREE = RoundPrice(0.0, 0.0, 1.0, 1.0)


def said(text: str | None) -> FinalAnswer | None:
    return None if text is None else FinalAnswer("text", text)


def reviewed(table: dict[int, dict[int, float]]) -> dict[int, dict[int, Review]]:
    return {by: {at: Review(score) for at, score in seen.items()} for by, seen in table.items()}


@given(st.dictionaries(st.integers(0, 7), scores), budgets)
def test_votes_of_any_scores_keep_the_quadratic_budget_and_add_up_to_zero(
    given_scores: dict[int, float], budget: float
) -> None:
    votes = votes_of(given_scores, budget)
    assert votes.keys() == given_scores.keys()
    assert math.fsum(v * v for v in votes.values()) <= budget * (1 + 1e-9)
    assert math.fsum(votes.values()) == pytest.approx(0, abs=1e-6 * math.sqrt(budget))
    order = sorted(given_scores, key=given_scores.__getitem__)
    assert all(votes[a] <= votes[b] + 1e-9 for a, b in itertools.pairwise(order))


@st.composite
def panels(draw: st.DrawFn) -> tuple[int, dict[int, dict[int, float]]]:
    """A hostile member, and the ballots of 3 to 8 members whose honest ones like it least."""
    members = draw(st.integers(3, 8))
    hostile = draw(st.integers(0, members - 1))
    table: dict[int, dict[int, float]] = {}
    for by in range(members):
        others = [at for at in range(members) if at != by]
        if by == hostile:
            # It may say anything, of itself too.
            table[by] = {at: draw(scores) for at in range(members)}
            continue
        good = {at: draw(st.floats(1, MAX_SCORE)) for at in others if at != hostile}
        table[by] = {**good, hostile: draw(st.floats(0, min(good.values()) - 0.5))}
    return hostile, table


@given(panels(), budgets)
def test_leader_is_never_the_member_that_all_others_like_least(
    panel: tuple[int, dict[int, dict[int, float]]], budget: float
) -> None:
    hostile, table = panel
    finals = {at: None for at in table}
    assert leader(reviewed(table), finals, budget, before=hostile) != hostile


@given(panels(), budgets)
def test_tally_ignores_what_a_member_says_of_itself(
    panel: tuple[int, dict[int, dict[int, float]]], budget: float
) -> None:
    hostile, table = panel
    without = {**table, hostile: {k: v for k, v in table[hostile].items() if k != hostile}}
    answers = list(table)
    assert tally(reviewed(table), answers, budget) == tally(reviewed(without), answers, budget)


def test_tally_a_member_that_dislikes_everybody_gains_nothing() -> None:
    honest = {0: {1: 6.0, 2: 5.0}, 1: {0: 6.0, 2: 5.0}}
    hating = reviewed({**honest, 2: {0: 0.0, 1: 0.0}})
    silent = reviewed({**honest, 2: {}})
    votes = tally(hating, [0, 1, 2], 16.0)
    assert votes[2] == tally(silent, [0, 1, 2], 16.0)[2] < 0
    assert leader(hating, dict.fromkeys(range(3)), 16.0) in (0, 1)


def test_tally_one_strong_vote_does_not_outweigh_two_weaker_ones() -> None:
    table = {
        0: {1: 8.0, 2: 5.0, 3: 5.0},
        1: {0: 5.0, 2: 5.0, 3: 10.0},
        2: {0: 5.0, 1: 8.0, 3: 5.0},
        3: {0: 5.0, 1: 5.0, 2: 5.0},
    }
    votes = tally(reviewed(table), range(4), 1.0)
    assert votes[1] > votes[3]


@pytest.mark.parametrize(
    ("finals", "before", "expected"),
    [
        ({0: "x", 1: "y", 2: "y"}, None, 1),
        ({0: "x", 1: "y", 2: "y"}, 0, 1),
        ({0: "x", 1: "y", 2: "z"}, 2, 2),
        ({0: "x", 1: "y", 2: "z"}, None, 0),
        ({2: None, 1: None}, None, 1),
        ({}, None, None),
    ],
)
def test_leader_without_votes_is_the_answer_that_most_gave(
    finals: dict[int, str | None], before: int | None, expected: int | None
) -> None:
    given_finals = {at: said(text) for at, text in finals.items()}
    assert leader({}, given_finals, 16.0, before) == expected


@given(st.lists(scores, max_size=7), scores)
def test_leader_belief_is_moved_by_one_reviewer_only_to_a_neighbour(
    given_scores: list[float], hostile: float
) -> None:
    finals = {9: said("x")}
    reviews = reviewed({by: {9: score} for by, score in enumerate(given_scores)})
    assert 0 <= leader_belief(reviews, finals, 9) <= 1
    more = leader_belief({**reviews, 8: {9: Review(hostile)}}, finals, 9)
    if len(given_scores) > 2:
        assert min(given_scores) / 10 <= more <= max(given_scores) / 10


@given(scores, scores)
def test_leader_belief_is_the_margin_over_the_best_other_answer(own: float, other: float) -> None:
    finals = {0: said("x"), 1: said("y"), 2: said("x")}
    reviews = reviewed({3: {0: own, 1: other, 2: MAX_SCORE}, 4: {0: own, 1: other}})
    found = leader_belief(reviews, finals, 0)
    assert found == pytest.approx(own / (own + other) if own + other else 0.5)
    # Both give 8, or both give 3: nothing is known of which is right.
    assert leader_belief(reviewed({3: {0: own, 1: own}}), finals, 0) == 0.5
    # An answer that says the same is no rival, whatever its score.
    same = reviewed({3: {0: own, 2: other}})
    assert leader_belief(same, finals, 0) == pytest.approx(own / MAX_SCORE)


def test_unanimous_needs_two_reviewers_that_compared() -> None:
    assert unanimous(reviewed({1: {0: 9, 2: 3}, 2: {0: 8, 1: 3}}), 0)
    assert not unanimous(reviewed({1: {0: 9, 2: 3}}), 0)
    assert not unanimous(reviewed({1: {0: 9, 2: 3}, 2: {0: 3, 1: 3}}), 0)
    assert not unanimous(reviewed({1: {0: 9}, 2: {0: 3}}), 0)


@pytest.mark.parametrize(
    ("held", "settled", "belief", "price", "expected"),
    [
        (1, True, 0.0, FREE, StopReason.STABLE),
        (3, False, 0.0, FREE, StopReason.ROUNDS),
        (1, False, 0.0, FREE, None),
        (1, False, 1.0, FREE, StopReason.NOT_WORTH_IT),
        (1, False, 0.5, RoundPrice(1.0, 0.0, 0.09, 0.0), None),
        (1, False, 0.5, RoundPrice(1.0, 0.0, 0.11, 0.0), StopReason.NOT_WORTH_IT),
        (1, False, 0.5, RoundPrice(0.0, 11.0, 0.0, 0.01), StopReason.NOT_WORTH_IT),
    ],
)
def test_stop_reason_weighs_gain_against_cost_and_time(
    held: int, settled: bool, belief: float, price: RoundPrice, expected: StopReason | None
) -> None:
    found = stop_reason(
        rounds_held=held,
        most_rounds=3,
        settled=settled,
        belief=belief,
        gain=0.2,
        price=price,
    )
    assert found is expected


@given(st.floats(-1, 2), st.floats(0, 1))
def test_round_gain_never_exceeds_what_is_missing(quality: float, gain: float) -> None:
    found = round_gain(quality, gain)
    assert 0 <= found <= max(0.0, min(1.0, 1 - quality))


def test_all_agree_needs_two_equal_final_answers() -> None:
    assert all_agree([said("x"), said("x")])
    assert not all_agree([said("x")])
    assert not all_agree([said("x"), None])
    assert not all_agree([said("x"), said("y")])
