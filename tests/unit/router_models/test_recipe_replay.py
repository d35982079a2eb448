"""Recipes on recorded rows: the answer taken, and the price paid."""

from __future__ import annotations

import numpy as np
import pytest

from router_models.outcome_reader import NO_ANSWER, Table
from router_models.recipe_replay import candidates, play
from service.types import Recipe

NAMES = ("a", "b", "c", "d")
COSTS = np.array([1.0, 2.0, 10.0, 50.0])


def table(answers: list[list[int]], truth: list[int], missing: list[int] | None = None) -> Table:
    answer = np.array(answers)
    score = (answer == np.array(truth)[:, None]).astype(float)
    if missing is not None:
        score[:, missing] = np.nan
    rows = len(answers)
    return Table(
        tuple(map(str, range(rows))),
        tuple(f"prompt {i}" for i in range(rows)),
        (None,) * rows,
        NAMES,
        score,
        answer,
        np.ones(len(NAMES), np.bool_),
        np.tile(COSTS, (rows, 1)),
        np.empty((rows, 0)),
    )


def one(recipe: Recipe, answers: list[int], truth: int) -> tuple[float, float]:
    played = play([recipe], table([answers], [truth]))
    return float(played.score[0, 0]), float(played.cost[0, 0])


NONE = NO_ANSWER
PAIR = Recipe("cascade", ("a", "b"), ("c",))
CHAIN = Recipe("cascade", ("a", "b"), ("c", "d"))
FALLBACK = Recipe("cascade", ("a",), ("d",))
VOTE = Recipe("vote", ("a", "b", "c"))


@pytest.mark.parametrize(
    ("recipe", "answers", "truth", "expected"),
    [
        (Recipe("single", ("b",)), [1, 2, 3, 4], 2, (1, 2)),
        (PAIR, [1, 1, 2, 2], 1, (1, 3)),  # they agree: c is not asked
        (PAIR, [1, 1, 2, 2], 2, (0, 3)),
        (PAIR, [1, 3, 2, 2], 2, (1, 13)),  # they differ: c decides
        (PAIR, [NONE, NONE, 2, 2], 2, (1, 13)),  # silence is no agreement
        (PAIR, [1, 3, NONE, 2], 3, (0, 13)),  # c is the last: its answer counts, though silent
        (CHAIN, [1, 2, 2, 9], 2, (1, 13)),  # c agrees with b: d is not asked
        (CHAIN, [1, 2, 3, 9], 9, (1, 63)),
        (CHAIN, [1, 2, 3, NONE], 3, (0, 63)),
        (FALLBACK, [1, 2, 3, 4], 1, (1, 1)),
        (FALLBACK, [NONE, 2, 3, 4], 4, (1, 51)),
        (VOTE, [1, 1, 2, 3], 1, (1, 13)),
        (VOTE, [1, 2, 3, 3], 3, (1, 13)),  # no majority: the last decides
        (VOTE, [1, 2, NONE, 3], 2, (1, 13)),
        (VOTE, [1, 2, 2, 1], 2, (1, 13)),
    ],
)
def test_outcome_of_recipes_on_one_row(
    recipe: Recipe, answers: list[int], truth: int, expected: tuple[float, float]
) -> None:
    assert one(recipe, answers, truth) == expected


def test_outcome_reach_counts_experts_asked_later() -> None:
    played = play([CHAIN], table([[1, 1, 2, 3], [1, 2, 2, 3], [1, 2, 3, 4]], [1, 1, 1]))
    assert played.reach[:, 0].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_outcome_missing_expert_matters_only_where_it_is_asked() -> None:
    played = play([PAIR], table([[1, 1, 2, 2], [1, 3, 2, 2]], [1, 2], missing=[2]))
    assert played.score[0, 0] == 1
    assert np.isnan(played.score[1, 0])
    assert np.isnan(played.cost[1, 0])


def test_outcome_vote_whose_last_member_decides_equals_its_cascade() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 4, (200, 4))
    played = play([VOTE, PAIR], table(answers.tolist(), rng.integers(0, 4, 200).tolist()))
    assert (played.score[:, 0] == played.score[:, 1]).all()
    assert (played.cost[:, 0] >= played.cost[:, 1]).all()


def test_candidate_recipes_are_distinct_and_use_recorded_answers_only() -> None:
    found = candidates(table([[1, NONE, 2, 3]] * 3, [1, 1, 1]))
    assert len(set(found)) == len(found)
    assert found[:4] == [Recipe("single", (name,)) for name in NAMES]
    assert Recipe("cascade", ("b",), ("d",)) in found  # b is silent at times
    assert Recipe("cascade", ("a",), ("d",)) not in found


@pytest.mark.parametrize(
    ("kind", "members", "later"),
    [
        ("single", ("a", "b"), ()),
        ("single", ("a",), ("b",)),
        ("cascade", ("a",), ()),
        ("cascade", ("a", "a"), ("b",)),
        ("cascade", ("a", "b"), ("a",)),
        ("vote", ("a", "b"), ()),
        ("team", ("a", "b", "c"), ()),
    ],
)
def test_parse_recipe_invalid_text_raises(
    kind: str, members: tuple[str, ...], later: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="invalid recipe"):
        Recipe(kind, members, later)  # type: ignore[arg-type]


def test_recipe_names_and_json_round_trip() -> None:
    assert CHAIN.name == "cascade([a, b] → c → d)"
    assert VOTE.name == "vote([a, b, c])"
    assert Recipe("single", ("a",)).name == "a"
    for recipe in (CHAIN, VOTE, PAIR):
        assert Recipe.from_json(recipe.to_json()) == recipe
