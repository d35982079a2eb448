"""The quality model: expected quality of every recipe on every category.

It comes from the config (`quality`, `categories`), or from the router's artifact where that has
an expert map. A tenant's feedback (`/v1/feedback`) shifts it for that tenant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from service.broker.cost_model import Places
from service.broker.pool_state import Floats
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import further_steps
from service.classifier.classifier import GENERAL, Assessment
from service.classifier.expert_map import Estimate, ExpertMap
from service.config import Config
from service.types import MAX_LATER, Recipe

# The quality of an expert on a category without a figure in the config.
_OWN, _FALLBACK, _OTHER = 1.0, 0.5, 0.0


def named_categories(config: Config) -> dict[str, str]:
    """The categories that a config names, and where each is named first."""
    found: dict[str, str] = {name: f"categories.{name}" for name in config.categories}
    for name, expert in config.experts.items():
        for category in expert.categories:
            found.setdefault(category, f"experts.{name}.categories")
        for category in expert.quality:
            found.setdefault(category, f"experts.{name}.quality")
    for name, recipe in config.recipes.items():
        for category in recipe.quality:
            found.setdefault(category, f"recipes.{name}.quality")
    return found


class Escalations:
    """How much more often than expected cascades and deliberations go on. It outlives a config.

    Attributes:
        excess: Observed minus expected probability of each later step, (recipes, MAX_LATER).
    """

    def __init__(self) -> None:
        self._rows: dict[Recipe, int] = {}
        self.excess = np.zeros((0, MAX_LATER))

    def rows(self, recipes: Sequence[Recipe]) -> Places:
        """The rows of these recipes in `excess`; new recipes get a row of zeros."""
        found = [self._rows.setdefault(recipe, len(self._rows)) for recipe in recipes]
        self.excess = np.pad(self.excess, ((0, len(self._rows) - len(self.excess)), (0, 0)))
        return slice(0, len(found)) if found == list(range(len(found))) else np.array(found)

    def forget(self, experts: Collection[str]) -> None:
        """Reset the recipes that use any of these experts."""
        for recipe, row in self._rows.items():
            if any(name in experts for name in recipe.experts):
                self.excess[row] = 0.0

    def observe(self, recipe: Recipe, expected: Floats, escalations: int) -> None:
        """Learn from one run of a cascade, see `QualityModel.observe_escalations`."""
        row = self._rows[recipe]
        for i in range(recipe.steps):
            observed = 1.0 if i < escalations else 0.0
            self.excess[row, i] += 0.05 * (observed - expected[i])


class QualityModel:
    """Expected quality and escalation of every recipe, for a posterior over `labels`.

    Attributes:
        labels: The categories.
        index: The row of each category.
        shifts: For each tenant what its feedback adds to the quality, (labels, recipes).
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
        named = named_categories(config)
        # A category that nothing in the config names counts as `general`.
        counted = [label if label in named else GENERAL for label in self.labels]
        for row, label in enumerate(counted):
            owner = home.get(label, config.fallback)
            for column, name in enumerate(catalog.experts):
                usual = _OWN if name == owner else _FALLBACK if name == config.fallback else _OTHER
                self._table[row, column] = config.experts[name].quality.get(label, usual)
            for column, name in enumerate(catalog.experts):
                expert = config.experts[name]
                if expert.quality_from and label not in expert.quality and name != owner:
                    of_other = self._table[row, catalog.index[expert.quality_from]]
                    self._table[row, column] = of_other
        for recipe in config.recipes.values():
            at = catalog.recipe_index[recipe.recipe()]
            for row, label in enumerate(counted):
                self._table[row, at] = recipe.quality.get(label, 0.0)
            if recipe.kind == "deliberate":
                # The first reviews are usual, and each further round follows the one before.
                self._reach[at, : recipe.recipe().steps] = recipe.escalates ** np.arange(
                    recipe.recipe().steps
                )
            elif recipe.kind == "recruit":
                self._reach[at, 0] = 1.0
            else:
                self._reach[at, : len(recipe.later)] = recipe.escalates
        # (recipes,): whether a recruit has no figures, so that its best expert's count for it.
        self._by_rule = catalog.recruits.copy()
        for recipe in config.recipes.values():
            if recipe.quality:
                self._by_rule[catalog.recipe_index[recipe.recipe()]] = False
        self._among = catalog.among
        self._named = {
            name: catalog.recipe_index[recipe.recipe()] for name, recipe in config.recipes.items()
        }
        self._fill_by_rule(self._table)
        self._map: ExpertMap | None = None
        self._map_columns = np.zeros(0, dtype=np.intp)
        self._map_reach = np.zeros(0, dtype=bool)

    @property
    def _escalation_bias(self) -> Floats:
        """By how much each later expert is used more often than expected, (recipes, MAX_LATER)."""
        bias: Floats = self._escalations.excess[self._rows]
        return bias

    def use_map(self, found: ExpertMap, catalog: RecipeCatalog) -> None:
        """Use an artifact's map for the recipes that it has, and the config for the rest."""
        self._map = found
        named = [self._named_column(recipe) for recipe in found.recipes]
        self._map_columns = np.array(
            [
                catalog.recipe_index[recipe] if at is None else at
                for recipe, at in zip(found.recipes, named, strict=True)
            ]
        )
        self._by_rule[self._map_columns] = False
        # How often a recipe goes on that was recorded by its name was not recorded.
        self._map_reach = np.array([at is None for at in named])

    def _named_column(self, recipe: Recipe) -> int | None:
        """The column of a recipe of the config that was recorded by its name, like an expert."""
        return self._named.get(recipe.members[0]) if recipe.kind == "single" else None

    def _fill_by_rule(self, quality: Floats) -> None:
        """Give recruits without figures the quality of the best expert that they may recruit.

        Args:
            quality: (…, recipes), changed in place.
        """
        singles = quality[..., : self._among.shape[1]]
        for at in np.flatnonzero(self._by_rule).tolist():
            quality[..., at] = singles[..., self._among[at]].max(axis=-1)

    def by_category(self) -> Floats:
        """The quality of every recipe without feedback, (categories, recipes).

        The categories are those of the expert map, if there is one.
        """
        if self._map is None:
            return self._table
        known = [row for row, label in enumerate(self._map.categories) if label in self.index]
        table = self._table[[self.index[self._map.categories[row]] for row in known]]
        table[:, self._map_columns] = self._map.score[known]
        self._fill_by_rule(table)
        return table

    def expected_calls(self, catalog: RecipeCatalog) -> Floats:
        """How often each recipe calls each expert, on average over the categories.

        Returns:
            (recipes, experts), in [0, 1].
        """
        reach = self._reach.copy()
        if self._map is not None:
            own = self._map_reach
            reach[self._map_columns[own]] = self._map.reach.mean(axis=0)[own]
        # The last column stands for absent members.
        calls = np.zeros((len(catalog.recipes), len(catalog.experts) + 1))
        rows = catalog.everything[:, None]
        calls[rows, catalog.members] = 1.0
        calls[rows, catalog.later] = reach
        calls[catalog.deliberates] *= further_steps(reach)[catalog.deliberates, None]
        found = calls[:, :-1]
        for at in np.flatnonzero(catalog.recruits).tolist():
            recruitment = catalog.recipes[at].recruitment
            assert recruitment is not None
            # Which ones are recruited depends on the prompt; `best` is one of them.
            among = catalog.among[at]
            more = recruitment.k + (recruitment.aggregator is None)
            found[at] = catalog.uses[at] + among * (more / among.sum())
        return found

    def posterior(self, given: Mapping[str, float]) -> Floats:
        """A distribution over categories as an array over `labels`."""
        vector = np.zeros(len(self.labels))
        for label, p in given.items():
            if label in self.index:
                vector[self.index[label]] = p
        return vector

    def quality(
        self, posterior: Floats, assessment: Assessment | None, tenant: str = ""
    ) -> tuple[Floats, Floats]:
        """Expected quality and escalation for one prompt.

        Args:
            posterior: Probabilities of the categories, (labels,).
            assessment: The classifier's assessment of the prompt; the expert map needs one.
            tenant: The tenant whose feedback counts.

        Returns:
            Quality (recipes,) in [0, 1], and the probability that each later expert is used,
            (recipes, MAX_LATER).
        """
        quality = posterior @ self._table
        reach = self._reach
        if self._map is not None and assessment is not None:
            found, share = self._estimate(self._map, assessment)
            quality[self._map_columns] = share * found.quality
            if share < 1:
                own = posterior.copy()
                own[: len(self._map.categories)] = 0.0
                quality[self._map_columns] += own @ self._table[:, self._map_columns]
            reach = reach.copy()
            reach[self._map_columns[self._map_reach]] = found.reach[self._map_reach]
            self._fill_by_rule(quality)
        if (shift := self.shifts.get(tenant)) is not None:
            quality += posterior @ shift
            self._fill_by_rule(quality)
        return np.clip(quality, 0.0, 1.0), np.clip(reach + self._escalation_bias, 0.0, 1.0)

    def quality_by_category(self, assessment: Assessment, tenant: str = "") -> Floats | None:
        """The quality of every recipe were the category certain, (labels, recipes), in [0, 1].

        Args:
            assessment: The classifier's assessment of the prompt.
            tenant: The tenant whose feedback counts.

        Returns:
            None where doubt changes the estimate by itself, as a map does that trusts a doubtful
            category less, or a new prompt not at all.
        """
        table = self._table
        if self._map is not None:
            scores = assessment.scores
            if self._map.trust_power > 0 or scores.stage == GENERAL:
                return None
            known = np.array([self.index[label] for label in self._map.categories])
            table = table.copy()
            table[known[:, None], self._map_columns] = self._map.quality_by_category(
                assessment.factors
            )
            self._fill_by_rule(table)
        if (shift := self.shifts.get(tenant)) is not None:
            table = np.clip(table + shift, 0.0, 1.0)
        return table

    @staticmethod
    def _estimate(expert_map: ExpertMap, assessment: Assessment) -> tuple[Estimate, float]:
        """The map's estimate over its own categories, and their share of the posterior.

        The config's categories with examples come after the map's.
        """
        scores, size = assessment.scores, len(expert_map.categories)
        if len(scores.probabilities) == size:
            return expert_map.estimate(assessment), 1.0
        share = min(1.0, sum(scores.probabilities[:size]))
        known = tuple(p / max(share, 1e-9) for p in scores.probabilities[:size])
        scores = replace(scores, labels=expert_map.categories, probabilities=known)
        return expert_map.estimate(replace(assessment, scores=scores)), share

    def escalation_prob(self, recipe: int) -> Floats:
        """The probability that each later expert of a recipe is used, (MAX_LATER,)."""
        found: Floats = np.clip(self._reach[recipe] + self._escalation_bias[recipe], 0.0, 1.0)
        return found

    def expected(self, label: str, recipe: int) -> float:
        """The quality of one recipe on one category, in [0, 1], without feedback."""
        if self._map is not None and label in self._map.categories:
            where = np.flatnonzero(self._map_columns == recipe)
            if len(where):
                row = self._map.categories.index(label)
                return float(self._map.score[row, where[0]])
        return float(self._table[self.index[label], recipe]) if label in self.index else 0.0

    def observe_escalations(self, recipe: int, expected: Floats, escalations: int) -> None:
        """Learn from one run of a recipe how likely its later steps are taken.

        Args:
            recipe: The recipe's index.
            expected: The probability with which each later step was expected, (MAX_LATER,).
            escalations: How many of them were taken.
        """
        self._escalations.observe(self._recipes[recipe], expected, escalations)
