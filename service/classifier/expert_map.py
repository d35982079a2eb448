"""The expert map: expected quality and cost of every recipe for a prompt. Owns W and recipes.

W is fitted offline from recorded outcomes (`router_models`), shrunk where a
category has few rows. Beside the category stands an estimate of difficulty:
*factors*, linear in the prompt's n-grams, that say how likely experts are to
be right on this very prompt. With posterior p over categories and factors f,
the quality of recipe r is

    Q[r] = Σ_c p[c] · (W[c, r] + Σ_k f[k] · V[c, k, r])

and its expected cost likewise. Everything is numpy and immutable; what is
learned online lies on top and is not kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.classifier.artifact import Artifact, load_artifact
from service.classifier.classifier import Assessment
from service.errors import ArtifactError
from service.types import MAX_LATER, Recipe

Floats = NDArray[np.float64]

MAX_RECIPES = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the map expects of every recipe for one prompt; each array (recipes,).

    `quality` lies in [0, 1]; `cost` is in the unit of the costs given to the
    fit, all calls counted; `reach[r, i]` is the probability that the recipe's
    `later[i]` is asked.
    """

    quality: Floats
    cost: Floats
    reach: Floats


class ExpertMap:
    """W with its counts, recipes, costs and factor loadings."""

    def __init__(
        self,
        *,
        categories: tuple[str, ...],
        recipes: tuple[Recipe, ...],
        prior: Floats,
        score: Floats,
        count: Floats,
        cost: Floats,
        reach: Floats,
        score_slope: Floats,
        cost_slope: Floats,
        max_novelty: float,
    ) -> None:
        """Hold the arrays for C categories, R recipes and F factors.

        `prior` (C,) is each category's share; `score`, `count`, `cost` are (C, R), `reach` is
        (C, R, MAX_LATER), slopes are (C, F, R).
        """
        self.categories = categories
        self.recipes = recipes
        self.prior = prior
        self.score = score
        self.count = count
        self.cost = cost
        self.reach = reach
        self.max_novelty = max_novelty
        factors = score_slope.shape[1]
        flat = (len(categories) * factors, len(recipes))
        self._slopes = np.concatenate(
            (score_slope.reshape(flat), cost_slope.reshape(flat)), axis=1
        ).astype(np.float32)

    @property
    def experts(self) -> tuple[str, ...]:
        """Every expert that some recipe may ask, in the order first named."""
        return tuple(dict.fromkeys(e for recipe in self.recipes for e in recipe.experts))

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arrays held."""
        arrays = (self.score, self.count, self.cost, self.reach, self._slopes)
        return sum(array.nbytes for array in arrays)

    @classmethod
    def load(cls, path: Path | str) -> ExpertMap:
        """The map of the artifact folder at `path`. Raises ArtifactError."""
        return cls.from_artifact(load_artifact(path))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> ExpertMap:
        """The map of an artifact already read. Raises ArtifactError."""
        section = artifact.section("map")
        try:
            categories = tuple(str(c) for c in artifact.section("classifier")["categories"])
            recipes = tuple(Recipe.from_json(r) for r in section["recipes"])
            factors = int(section["factors"])
            max_novelty = float(artifact.section("classifier")["thresholds"]["max_novelty"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{artifact.path}: manifest, map: {error!r}") from error
        if not 1 <= len(recipes) <= MAX_RECIPES or len(set(recipes)) != len(recipes):
            raise ArtifactError(
                f"{artifact.path}: manifest, map: 1..{MAX_RECIPES} distinct recipes are allowed, "
                f"found {len(recipes)}"
            )
        cells = (len(categories), len(recipes))

        def read(name: str, *shape: int) -> Floats:
            return artifact.tensor(f"map.{name}", shape).astype(np.float64)

        return cls(
            categories=categories,
            recipes=recipes,
            prior=read("prior", cells[0]),
            score=read("score", *cells),
            count=read("count", *cells),
            cost=read("cost", *cells),
            reach=read("reach", *cells, MAX_LATER),
            score_slope=read("score_slope", cells[0], factors, cells[1]),
            cost_slope=read("cost_slope", cells[0], factors, cells[1]),
            max_novelty=max_novelty,
        )

    def estimate(self, assessment: Assessment) -> Estimate:
        """Quality, cost and reach of every recipe for one prompt.

        A prompt far from anything seen in training is taken for an average
        one: the categories' shares stand for its posterior, its factors for
        nothing.
        """
        scores = assessment.scores
        p = np.asarray(scores.probabilities)
        factors = assessment.factors
        if scores.novelty > self.max_novelty:
            p, factors = self.prior, np.zeros_like(factors)
        both = np.concatenate((p @ self.score, p @ self.cost))
        if len(factors):
            both += (p[:, None] * factors).ravel().astype(np.float32) @ self._slopes
        count = len(self.recipes)
        return Estimate(
            quality=np.clip(both[:count], 0.0, 1.0),
            cost=np.maximum(both[count:], 0.0),
            reach=np.tensordot(p, self.reach, axes=1),
        )

    def only(self, experts: Sequence[str]) -> ExpertMap:
        """The map over the recipes that ask nobody but `experts`. ValueError if none is left."""
        allowed = set(experts)
        keep = [i for i, recipe in enumerate(self.recipes) if allowed.issuperset(recipe.experts)]
        if not keep:
            raise ValueError("no recipe of the map uses only the experts named")
        cells = len(self.categories)
        slopes = self._slopes.reshape(cells, -1, 2, len(self.recipes))[..., keep]
        return ExpertMap(
            categories=self.categories,
            recipes=tuple(self.recipes[i] for i in keep),
            prior=self.prior,
            score=self.score[:, keep],
            count=self.count[:, keep],
            cost=self.cost[:, keep],
            reach=self.reach[:, keep],
            score_slope=slopes[:, :, 0].astype(np.float64),
            cost_slope=slopes[:, :, 1].astype(np.float64),
            max_novelty=self.max_novelty,
        )
