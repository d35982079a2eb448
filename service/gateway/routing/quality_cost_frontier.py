"""What `auto` chooses by category and price of cost while every expert is idle. Pure.

The console draws it as quality against cost, `coe check` warns of experts that nothing reaches, and
a test holds the shipped configs to it. Costs are those of the prompts and answers that the expert
map was fitted on, by category. Where their lengths are unknown, one usual prompt and answer stand
for all of them: relative to each other costs then do not depend on the length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.broker.pool_state import Floats
from service.broker.recipe_catalog import Ints
from service.broker.reference_cost import best_shares
from service.broker.token_prices import prices_of
from service.config import Config
from service.config.experts import makes_text
from service.config.router_presets import PresetsConfig
from service.gateway.routing.candidate_planner import chosen_by_auto
from service.gateway.routing.routing_setup import RoutingSetup
from service.types import Recipe

# Tokens of the usual prompt and answer.
PROMPT_TOKENS, ANSWER_TOKENS = 500, 300
# The quality that is given up to save the cost of the best's answer: from nothing to all that is.
WEIGHTS = np.concatenate(([0.0], np.geomspace(1e-3, 1e3, 49)))


@dataclass(frozen=True, slots=True)
class Frontier:
    """Quality and cost of the recipes of `auto`.

    Attributes:
        categories: The categories.
        share: (C,), each category's share of the prompts as far as the router's fit knows.
        recipes: The recipes that `auto` may choose.
        quality: (C, R), expected quality.
        cost: (C, R), expected cost of an answer.
        reference: (C,), what the answer of the recipes that are the best costs on average.
        measured: Whether quality comes from recorded outcomes or figures of the config, rather
            than from lists of categories.
        recorded: Whether costs are those of recorded lengths, rather than of a usual prompt.
        presets: What a point of quality is worth in each preset.
    """

    categories: tuple[str, ...]
    share: Floats
    recipes: tuple[Recipe, ...]
    quality: Floats
    cost: Floats
    reference: Floats
    measured: bool
    recorded: bool = False
    presets: PresetsConfig = field(default_factory=PresetsConfig)

    def chosen(self, weight: float) -> Ints:
        """The recipe of each category, (C,), at a weight of cost (`PresetConfig.cost_weight`)."""
        level = np.where(self.reference > 0, self.reference, np.inf)[:, None]
        utility = self.quality - weight / level * self.cost
        # Of equally good recipes the cheapest, then the first, as the gateway takes.
        best = utility.max(axis=1, keepdims=True)
        return np.asarray(np.where(utility >= best - 1e-12, self.cost, np.inf).argmin(axis=1))

    def prices(self, posterior: Floats, weight: float) -> Floats:
        """What the cost of each recipe for one prompt counts at a weight of cost, in quality.

        Args:
            posterior: (C,), the categories of the prompt.
            weight: See `PresetConfig.cost_weight`.

        Returns:
            (R,).
        """
        reference = float(posterior @ self.reference)
        return np.asarray((weight / reference if reference > 0 else 0.0) * (posterior @ self.cost))

    def winners(self) -> set[Recipe]:
        """The recipes that are chosen for some category at some price."""
        return {self.recipes[r] for weight in WEIGHTS for r in self.chosen(float(weight))}

    def to_json(self, config: Config) -> dict[str, Any]:
        """For the console, which weighs the categories by its own traffic."""
        presets = self.presets
        names = {"auto:fast": presets.fast, "auto": presets.auto, "auto:best": presets.best}
        return {
            "categories": list(self.categories),
            "share": [round(float(s), 5) for s in self.share],
            "recipes": [
                {"name": recipe.name, "experts": list(recipe.experts)} for recipe in self.recipes
            ],
            "quality": [[round(float(q), 4) for q in row] for row in self.quality],
            "cost": [[float(f"{c:.4g}") for c in row] for row in self.cost],
            "reference": [float(f"{c:.6g}") for c in self.reference],
            "measured": self.measured,
            "recorded": self.recorded,
            "unit": config.prices.unit,
            "presets": {
                name: {"cost_weight": one.cost_weight, "time_price": one.time_price}
                for name, one in names.items()
            },
            "prices": {
                name: [price.prompt, price.completion] for name, price in prices_of(config).items()
            },
        }


def frontier_of(config: Config, setup: RoutingSetup) -> Frontier:
    """Compute the frontier of a config, whose experts have their prices."""
    catalog, model = setup.catalog, setup.quality_model
    allowed = chosen_by_auto(config, catalog)
    able = [
        r
        for r, recipe in enumerate(catalog.recipes)
        if allowed[r]
        and all(makes_text(config.experts[name].capabilities) for name in recipe.experts)
    ]
    recipes = tuple(catalog.recipes[r] for r in able)
    labels = model.labels or ("general",)
    quality = np.array([[model.expected(label, r) for r in able] for label in labels])
    each = _call_costs(config, setup, labels)
    calls = model.expected_calls(catalog)[able]
    costs = each @ calls.T
    known = setup.shares
    share = np.array([known.get(label, 0.0) for label in labels])
    if not share.sum() > 0:
        share = np.ones(len(labels))
    share /= share.sum()
    return Frontier(
        categories=labels,
        share=share,
        recipes=recipes,
        quality=quality,
        cost=costs,
        reference=costs @ best_shares(quality, share @ costs),
        measured=setup.has_map or _has_figures(config),
        recorded=setup.tokens is not None,
        presets=setup.presets,
    )


def _call_costs(config: Config, setup: RoutingSetup, labels: Sequence[str]) -> Floats:
    """The cost of one call of each expert in each category, (C, E).

    An expert or category without recorded lengths gets the mean of those that have them.
    """
    experts = setup.catalog.experts
    prompt = np.full((len(labels), len(experts)), float(PROMPT_TOKENS))
    answer = np.full((len(labels), len(experts)), float(ANSWER_TOKENS))
    if (recorded := setup.tokens) is not None:
        prompt[:], answer[:] = recorded.prompt.mean(), recorded.answer.mean()
        known = [row for row, label in enumerate(setup.map_categories) if label in labels]
        rows = [labels.index(setup.map_categories[row]) for row in known]
        prompt[rows] = recorded.prompt[known].mean(axis=1, keepdims=True)
        answer[rows] = recorded.answer[known].mean(axis=1, keepdims=True)
        at = np.ix_(rows, [experts.index(name) for name in recorded.experts])
        prompt[at], answer[at] = recorded.prompt[known], recorded.answer[known]
    prices = [prices_of(config)[name] for name in experts]
    per_prompt = np.array([price.prompt for price in prices]) / 1e6
    per_answer = np.array([price.completion for price in prices]) / 1e6
    return prompt * per_prompt + answer * per_answer


def _has_figures(config: Config) -> bool:
    sections: list[Mapping[str, float]] = [one.quality for one in config.experts.values()]
    return any([*sections, *(recipe.quality for recipe in config.recipes.values())])


def routing_warnings(config: Config, setup: RoutingSetup) -> tuple[str, ...]:
    """Return a line for each reason why `auto` does less than it could.

    Args:
        config: The config, whose experts have their prices.
        setup: Its router.
    """
    experts = [
        name
        for name, expert in config.experts.items()
        if expert.auto and makes_text(expert.capabilities)
    ]
    if len(experts) < 2:
        return ()
    if not setup.stages.classifies:
        return (
            f"router: no classifier, so `auto` always means {config.fallback!r}; "
            "remove `router.artifact: none`, or give categories examples",
        )
    found = frontier_of(config, setup)
    lines = []
    if not found.measured:
        lines.append(
            "router: no expert map and no figures of quality, so an expert counts as 1 on its "
            "own categories and 0 or 0.5 elsewhere; record outcomes and fit a map "
            "(coe outcomes record, coe router add-map)"
        )
    winners = found.winners()
    reached = {name for recipe in winners for name in recipe.experts} | {config.fallback}
    if not any(config.fallback in recipe.experts for recipe in winners):
        lines.append(
            f"router: no category reaches the fallback {config.fallback!r} at any price of cost; "
            "`auto` asks it only where the experts that are expected to be better are busy"
        )
    common = {c for name in reached for c in config.experts[name].capabilities}
    idle = [
        name
        for name in experts
        if name not in reached and set(config.experts[name].capabilities) <= common
    ]
    if idle:
        lines.append(
            f"router: no category reaches {', '.join(idle)} at any price of cost; only clients "
            "that name them do"
        )
    if len(winners) == 1:
        lines.append(
            f"router: {next(iter(winners)).name} is chosen for every category at every price of "
            "cost, so routing changes nothing while it is idle"
        )
    return tuple(lines)
