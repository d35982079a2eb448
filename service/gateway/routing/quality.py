"""What every recipe is worth on every category: the matrix W as the service uses it.

From the config (`quality`, `categories`), or where the router's artifact has a map, from
that. What a tenant says of answers (`/v1/feedback`) shifts it for that tenant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from service.broker.cost_model import Places
from service.broker.pool_state import Floats
from service.broker.recipe_catalog import RecipeCatalog
from service.classifier.classifier import Assessment
from service.classifier.expert_map import ExpertMap
from service.config import Config
from service.types import MAX_LATER, Recipe

# Of an expert on a category that the config says nothing of.
_OWN, _FALLBACK, _OTHER = 1.0, 0.5, 0.0


class Escalations:
    """How much oftener than expected cascades ask each later expert: it outlives a config.

    Attributes:
        excess: (recipes, MAX_LATER), differences of probabilities.
    """

    def __init__(self) -> None:
        self._rows: dict[Recipe, int] = {}
        self.excess = np.zeros((0, MAX_LATER))

    def rows(self, recipes: Sequence[Recipe]) -> Places:
        """Where these recipes' rows are; new ones get theirs."""
        found = [self._rows.setdefault(recipe, len(self._rows)) for recipe in recipes]
        self.excess = np.pad(self.excess, ((0, len(self._rows) - len(self.excess)), (0, 0)))
        return slice(0, len(found)) if found == list(range(len(found))) else np.array(found)

    def forget(self, experts: Collection[str]) -> None:
        """Nothing is known any more of recipes that ask any of these."""
        for recipe, row in self._rows.items():
            if any(name in experts for name in recipe.experts):
                self.excess[row] = 0.0

    def saw(self, recipe: Recipe, expected: Floats, asked: int) -> None:
        """See `QualityModel.escalated`."""
        row = self._rows[recipe]
        for i in range(len(recipe.later)):
            seen = 1.0 if i < asked else 0.0
            self.excess[row, i] += 0.05 * (seen - expected[i])


class QualityModel:
    """Expected quality and escalation of the book's recipes, for a posterior over `labels`.

    What a tenant said of answers is added to what was expected for that tenant, and for nobody
    else: `shifts`, by the tenant's name (labels, recipes); feedback writes them.
    """

    def __init__(
        self,
        config: Config,
        catalog: RecipeCatalog,
        labels: Sequence[str],
        escalations: Escalations | None = None,
    ) -> None:
        self.labels = tuple(dict.fromkeys([*labels, *config.category_map()]))
        self.index = {label: i for i, label in enumerate(self.labels)}
        self.shifts: dict[str, Floats] = {}
        self._table = np.zeros((len(self.labels), len(catalog.recipes)))
        self._reach = np.zeros((len(catalog.recipes), MAX_LATER))
        self._recipes = catalog.recipes
        self._escalations = Escalations() if escalations is None else escalations
        self._rows = self._escalations.rows(catalog.recipes)
        home = config.category_map()
        for row, label in enumerate(self.labels):
            owner = home.get(label, config.fallback)
            for column, name in enumerate(catalog.experts):
                usual = _OWN if name == owner else _FALLBACK if name == config.fallback else _OTHER
                self._table[row, column] = config.experts[name].quality.get(label, usual)
        for recipe in config.recipes.values():
            at = catalog.recipe_index[recipe.recipe()]
            for row, label in enumerate(self.labels):
                self._table[row, at] = recipe.quality.get(label, 0.0)
            self._reach[at, : len(recipe.later)] = recipe.escalates
        self._map: ExpertMap | None = None
        self._map_columns = np.zeros(0, dtype=np.intp)

    @property
    def _oftener(self) -> Floats:
        """How much oftener than expected each later expert was asked, (recipes, MAX_LATER)."""
        oftener: Floats = self._escalations.excess[self._rows]
        return oftener

    def use_map(self, found: ExpertMap, catalog: RecipeCatalog) -> None:
        """Believe an artifact's map where it knows a recipe, and the config elsewhere."""
        self._map = found
        self._map_columns = np.array([catalog.recipe_index[recipe] for recipe in found.recipes])

    def posterior(self, given: Mapping[str, float]) -> Floats:
        """As an array over `labels`."""
        vector = np.zeros(len(self.labels))
        for label, p in given.items():
            if label in self.index:
                vector[self.index[label]] = p
        return vector

    def quality(
        self, posterior: Floats, assessment: Assessment | None, tenant: str = ""
    ) -> tuple[Floats, Floats]:
        """Expected quality (recipes,) and reach (recipes, MAX_LATER) for one prompt of a tenant.

        `assessment`: of the prompt, where it was classified; without one, a map's rows count
        by the posterior alone.
        """
        quality = posterior @ self._table
        reach = self._reach
        if self._map is not None and assessment is not None:
            found = self._map.estimate(assessment)
            quality[self._map_columns] = found.quality
            reach = reach.copy()
            reach[self._map_columns] = found.reach
        if (shift := self.shifts.get(tenant)) is not None:
            quality += posterior @ shift
        return np.clip(quality, 0.0, 1.0), np.clip(reach + self._oftener, 0.0, 1.0)

    def escalation_prob(self, recipe: int) -> Floats:
        """How likely each later expert of one recipe is asked, (MAX_LATER,): without a prompt."""
        found: Floats = np.clip(self._reach[recipe] + self._oftener[recipe], 0.0, 1.0)
        return found

    def expected(self, label: str, recipe: int) -> float:
        """Without shifts: of one recipe on one category, in [0, 1]."""
        if self._map is not None and label in self._map.categories:
            where = np.flatnonzero(self._map_columns == recipe)
            if len(where):
                row = self._map.categories.index(label)
                return float(self._map.score[row, where[0]])
        return float(self._table[self.index[label], recipe]) if label in self.index else 0.0

    def escalated(self, recipe: int, expected: Floats, asked: int) -> None:
        """A cascade asked `asked` of its later experts: learn how likely each is.

        `expected` (MAX_LATER,): how likely each was thought to be when it was chosen.
        """
        self._escalations.saw(self._recipes[recipe], expected, asked)
