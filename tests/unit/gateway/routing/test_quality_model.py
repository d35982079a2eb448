"""Figures that are learned of recipes in use."""

from __future__ import annotations

import numpy as np
import pytest

from service.broker.recipe_catalog import RecipeCatalog
from service.classifier.classifier import Assessment
from service.classifier.expert_map import ExpertMap
from service.config import Config
from service.gateway.routing.quality_model import QualityModel
from service.types import MAX_LATER, CategoryScores, Recipe

CASCADE = Recipe("cascade", ("small",), ("large",))
CONFIG = Config.model_validate(
    {
        "experts": {"small": {"model": "m", "categories": ["math"]}, "large": {"model": "m"}},
        "recipes": {
            "both": {"kind": "cascade", "members": ["small"], "later": ["large"], "escalates": 0.5}
        },
        "pools": {"cpu": {"engine": "simulated"}},
    }
)
BOOK = RecipeCatalog(tuple(CONFIG.experts), [CASCADE])
AT = BOOK.recipe_index[CASCADE]


def fitted(reach: float) -> ExpertMap:
    """An artifact's map that knows nothing but the cascade."""
    one = np.ones((1, 1))
    return ExpertMap(
        categories=("math",),
        recipes=(CASCADE,),
        prior=np.ones(1),
        score=one,
        count=one,
        cost=one,
        reach=np.full((1, 1, MAX_LATER), reach),
        score_slope=np.zeros((1, 0, 1)),
        cost_slope=np.zeros((1, 0, 1)),
        max_novelty=1.0,
    )


@pytest.mark.parametrize("by_map", [False, True])
def test_quality_learns_a_cascade_s_escalation_rate_with_and_without_a_map(by_map: bool) -> None:
    worth = QualityModel(CONFIG, BOOK, ("math",))
    if by_map:
        worth.use_map(fitted(0.1), BOOK)
    math = worth.posterior({"math": 1.0})
    scores = CategoryScores(("math",), (1.0,), "math", 1.0, 0.0)
    assessment = Assessment(scores, np.zeros(0))

    def expected() -> float:
        return float(worth.quality(math, assessment)[1][AT, 0])

    before = expected()
    for i in range(400):
        reach = worth.quality(math, assessment)[1][AT]
        worth.observe_escalations(AT, reach, i % 5 < 4)
    assert abs(before - 0.8) > 0.2
    assert expected() == pytest.approx(0.8, abs=0.1)
    for _ in range(400):
        worth.observe_escalations(AT, worth.quality(math, assessment)[1][AT], 1)
    assert expected() <= 1.0
    assert worth.escalation_prob(AT)[0] <= 1.0


@pytest.mark.parametrize("by_map", [False, True])
def test_quality_by_category_and_expected_calls_prefer_the_map(by_map: bool) -> None:
    worth = QualityModel(CONFIG, BOOK, ("math",))
    if by_map:
        worth.use_map(fitted(0.1), BOOK)
    table = worth.by_category()
    # The map knows one category; the config adds `general`.
    assert table.shape == (1 if by_map else 2, 3)
    assert table[0, AT] == (1.0 if by_map else 0.0)
    assert table[0, 0] == 1.0, "the config's, which the map does not know"
    calls = worth.expected_calls(BOOK)
    assert calls.tolist() == [[1, 0], [0, 1], [1, pytest.approx(0.1 if by_map else 0.5)]]
    # What is read must not be what is kept.
    before = worth.quality(worth.posterior({"math": 1.0}), None)[0].tolist()
    calls[:] = 7.0
    assert worth.quality(worth.posterior({"math": 1.0}), None)[0].tolist() == before


def test_quality_category_that_the_config_does_not_name_counts_as_general() -> None:
    data = CONFIG.model_dump()
    data["experts"]["large"]["quality"] = {"general": 0.7}
    data["recipes"]["both"]["quality"] = {"general": 0.8, "math": 0.9}
    config = Config.model_validate(data)
    model = QualityModel(config, BOOK, ("law", "math", "general"))
    rows = {label: model.quality(model.posterior({label: 1.0}), None)[0] for label in model.labels}
    assert rows["law"].tolist() == rows["general"].tolist() != rows["math"].tolist()


def test_quality_by_category_is_the_quality_of_a_certain_category() -> None:
    worth = QualityModel(CONFIG, BOOK, ("math", "law"))
    factors = np.array([0.5, -1.0])
    draw = np.random.default_rng(1)
    found = ExpertMap(
        categories=("math", "law"),
        recipes=(CASCADE, BOOK.recipes[0]),
        prior=np.full(2, 0.5),
        score=draw.random((2, 2)),
        count=np.ones((2, 2)),
        cost=np.ones((2, 2)),
        reach=np.zeros((2, 2, MAX_LATER)),
        score_slope=draw.normal(size=(2, 2, 2)) / 9,
        cost_slope=draw.normal(size=(2, 2, 2)) / 9,
        max_novelty=1.0,
    )
    for expert_map in (None, found):
        if expert_map is not None:
            worth.use_map(expert_map, BOOK)
        worth.shifts["mine"] = draw.normal(size=(len(worth.labels), len(BOOK.recipes)))
        for tenant in ("", "mine"):
            for label in ("math", "law"):
                p = (1.0, 0.0) if label == "math" else (0.0, 1.0)
                seen = Assessment(CategoryScores(("math", "law"), p, label, 1.0, 0.0), factors)
                whole = worth.quality_by_category(seen, tenant)
                assert whole is not None
                row = whole[worth.index[label]]
                certain = worth.posterior({label: 1.0})
                np.testing.assert_allclose(row, worth.quality(certain, seen, tenant)[0], atol=1e-6)
    unsure = CategoryScores(("math", "law"), (0.5, 0.5), "general", 0.5, 1.0, "general")
    assert worth.quality_by_category(Assessment(unsure, factors)) is None
    found.trust_power = 4.0
    assert worth.quality_by_category(seen) is None
