"""The expert map: expected quality and cost of every recipe for a prompt.

The matrix W, (categories, recipes), is fitted offline from recorded outcomes (`router_models`). Its
values are shrunk for categories with few rows. *Factors* add the difficulty of the individual
prompt. They are linear in the prompt's n-grams, and estimate which experts answer this prompt
correctly. V holds their loadings. With posterior p over categories and factors f, the quality of
recipe r is

    Q[r] = Σ_c p[c] · (W[c, r] + Σ_k f[k] · V[c, k, r])

The expected cost has the same form. The map is immutable. Online learning adds its corrections
elsewhere.
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
    """The estimates of every recipe for one prompt.

    Attributes:
        quality: (recipes,), expected quality in [0, 1].
        cost: (recipes,), expected cost of all calls, in the unit of the fit.
        reach: (recipes, MAX_LATER), probability that each later expert is called.
    """

    quality: Floats
    cost: Floats
    reach: Floats


class ExpertMap:
    """The matrix W with its recipes, costs and factor loadings."""

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
        """Create a map for C categories, R recipes and F factors.

        Args:
            categories: Names of the categories.
            recipes: The recipes.
            prior: (C,), each category's share of all prompts.
            score: (C, R), expected quality.
            count: (C, R), number of rows in the fit.
            cost: (C, R), expected cost.
            reach: (C, R, MAX_LATER), probability that each later expert is called.
            score_slope: (C, F, R), loadings of the factors for quality.
            cost_slope: (C, F, R), loadings of the factors for cost.
            max_novelty: Prompts with more novelty count as average prompts.
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
        """The experts of all recipes, in the order of their first recipe."""
        return tuple(dict.fromkeys(e for recipe in self.recipes for e in recipe.experts))

    @property
    def memory_bytes(self) -> int:
        """Size of the arrays in bytes."""
        arrays = (self.score, self.count, self.cost, self.reach, self._slopes)
        return sum(array.nbytes for array in arrays)

    @classmethod
    def load(cls, path: Path | str) -> ExpertMap:
        """Load the map of the artifact folder at `path`.

        Raises:
            ArtifactError: The artifact can't be used.
        """
        return cls.from_artifact(load_artifact(path))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> ExpertMap:
        """Create the map of an artifact.

        Raises:
            ArtifactError: The artifact can't be used.
        """
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
        """Estimate quality, cost and reach of every recipe for one prompt.

        A prompt with too much novelty counts as an average prompt. Its posterior is replaced by the
        shares of the categories, and its factors by 0.
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
        """Return the map of the recipes that use only these experts.

        Raises:
            ValueError: There is no such recipe.
        """
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
