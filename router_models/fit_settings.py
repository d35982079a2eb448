"""Settings of the fit of a router."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.classifier.expert_map import MAX_RECIPES
from service.classifier.hashed_ngrams import FeatureSpec

_NEVER = 1e12
"""A penalty that leaves nothing of what it is put on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a fit.

    `l2_*` are ridge penalties, `shrink_rows` pseudo-rows of the prior.
    `slope_penalties` are pairs (of the slopes shared by all categories, of each
    category's own) of which the training rows choose one. `trust_powers` are those
    of `ExpertMap.trust_power` to choose from where clusters stand for categories.
    `min_max_novelty` is the least threshold of novelty; it is greater where
    ordinary rows are more novel.
    """

    spec: FeatureSpec = field(default_factory=FeatureSpec)
    l2_category: float = 0.2
    l2_factor: float = 4.0
    l2_calibration: float = 1e-5
    factors: int = 8
    shrink_rows: float = 60.0
    slope_penalties: tuple[tuple[float, float], ...] = (
        (_NEVER, _NEVER),
        (20.0, _NEVER),
        (20.0, 60.0),
        (10.0, 60.0),
        (5.0, 20.0),
        (5.0, 5.0),
    )
    inner_folds: int = 5
    max_recipes: int = MAX_RECIPES
    min_confidence: float = 0.3
    trust_powers: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    min_max_novelty: float = 0.5
    seed: int = 0
