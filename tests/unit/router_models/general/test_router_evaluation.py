"""What is measured of a general router, and its card."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.general.held_out_prompts import held_out_prompts
from router_models.general.model_card import card
from router_models.general.router_evaluation import (
    FEW_EXPERTS,
    Answers,
    confusion,
    giving_up,
    interval,
    measured,
    readable,
    unchanged,
)
from router_models.linear_models import top_error
from service.classifier.built_in_artifact import BUILT_IN, built_in_artifact
from service.classifier.classifier import GENERAL
from service.types import CategoryScores

LABELS = ("a", "b", GENERAL)


def scores(top: str, confidence: float, category: str | None = None) -> CategoryScores:
    rest = (1 - confidence) / 2
    p = tuple(confidence if label == top else rest for label in LABELS)
    given = top if category is None else category
    stage = GENERAL if category == GENERAL else "static"
    return CategoryScores(LABELS, p, given, confidence, 0.0, stage)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_share_within_0_and_1(given: tuple[int, int]) -> None:
    share, low, high = interval(*given)
    assert 0 <= low <= share <= high <= 1
    assert high - low <= 1.96 * given[1] ** -0.5 + 1e-3


def test_interval_of_nothing_is_zero() -> None:
    assert interval(0, 0) == [0.0, 0.0, 0.0]


def test_measured_counts_general_as_wrong_for_known_prompts_only() -> None:
    said = [scores("a", 0.95), scores("b", 0.95), scores("a", 0.3, GENERAL), scores("b", 0.4)]
    said.append(scores(GENERAL, 0.9))
    found = measured(said, ["a", "a", "a", GENERAL, GENERAL], ["en", "de", "en", "en", "en"])
    assert found["accuracy"][0] == pytest.approx(1 / 3, abs=1e-3)
    assert found["unknown_to_general"][0] == 0.5
    assert found["known_to_general"][0] == pytest.approx(1 / 3, abs=1e-3)
    assert found["wrong_above_0.9"][0] == pytest.approx(1 / 3, abs=1e-3)
    assert found["by_language"]["de"][0] == 0.0
    assert found["by_language"]["en"][0] == 0.5


def test_top_error_is_zero_where_confidence_is_the_share_of_right() -> None:
    confidence = np.array([0.75] * 4 + [0.5] * 2)
    right = np.array([True, True, True, False, True, False])
    assert top_error(confidence, right) == pytest.approx(0)
    assert top_error(confidence, np.zeros(6, bool)) == pytest.approx(4 / 6 * 0.75 + 2 / 6 * 0.5)


def test_answers_ask_the_encoder_below_the_bar_and_where_the_first_gave_up() -> None:
    first = [scores("a", 0.9), scores("a", 0.5), scores("a", 0.85, GENERAL)]
    found = Answers(first, [scores("b", 0.99)] * 3)
    assert [s.category for s in found.served(0.8)] == ["a", "b", "b"]
    assert found.asked(0.8) == pytest.approx(2 / 3)
    assert [s.category for s in found.served(0.0)] == ["a", "a", GENERAL]
    assert found.asked(1.01) == 1.0


def test_unchanged_counts_pairs_of_each_kind() -> None:
    before = [scores("a", 0.9)] * 4
    after = [scores("a", 0.5), scores("b", 0.5), scores("a", 0.9), scores("a", 0.9)]
    found = unchanged(before, after, ["typo", "typo", "case", "case"])
    assert [found[k][0] for k in ("all", "typo", "case")] == [0.75, 0.5, 1.0]


def test_unchanged_counts_experts_and_not_categories_where_several_share_one() -> None:
    before = [scores("coding", 0.9), scores("coding", 0.9), scores("law", 0.9)]
    after = [scores("shell-sql", 0.9), scores("law", 0.9), scores("facts", 0.9)]
    kinds = ["typo"] * 3
    assert unchanged(before, after, kinds)["all"][0] == 0
    assert unchanged(before, after, kinds, FEW_EXPERTS)["all"][0] == pytest.approx(2 / 3, abs=1e-4)
    known = {label for label in built_in_artifact().manifest["categories"] if label != GENERAL}
    assert set(FEW_EXPERTS) < known


def test_giving_up_trades_prompts_of_a_category_for_those_of_none() -> None:
    labels = ("law", GENERAL)
    given = [
        CategoryScores(labels, (1 - q, q), GENERAL if q > 0.5 else "law", max(q, 1 - q), 0.0)
        for q in (0.9, 0.25, 0.15, 0.07, 0.01)
    ]
    truth = [GENERAL, GENERAL, "law", "law", "law"]
    points = giving_up(given, truth)
    assert points[0] == {"above": 1.0, "unknown": 0.5, "known": 0.0, "accuracy": 1.0}
    assert [point["above"] for point in points] == sorted(
        (p["above"] for p in points), reverse=True
    )
    assert [point["unknown"] for point in points] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert [point["known"] for point in points] == pytest.approx([0, 0, 0, 1 / 3, 2 / 3], abs=1e-4)
    for point in points:
        assert point["accuracy"] == pytest.approx(1 - point["known"], abs=2e-4)


def test_confusion_counts_what_was_given() -> None:
    found = confusion([scores("a", 0.9), scores("b", 0.9), scores("b", 0.9)], ["a", "a", "b"])
    assert found == {"a": {"a": 1, "b": 1}, "b": {"b": 1}}


def test_card_of_the_built_in_is_made_of_its_manifest_and_states_every_category() -> None:
    manifest = dict(built_in_artifact().manifest)
    text = card("general@2", manifest)
    assert (BUILT_IN / "README.md").read_text(encoding="utf-8") == text
    tested = manifest["metrics"]["test"]
    assert tested["prompts"] == len(held_out_prompts())
    for category in manifest["categories"]:
        assert f"| {category} | " in text
    assert readable(tested)[1].startswith("static: accuracy ")
