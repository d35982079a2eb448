"""Makes the router of a config: artifact, recipes, quality, prices, savings and the planner."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from service.broker.cost_model import CostModel, Lengths, PriorTokens
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.savings import SavingsModel, best_baseline
from service.broker.token_prices import prices_of
from service.classifier.artifact_presets import presets_of
from service.classifier.built_in_artifact import BUILT_IN, built_in_artifact, encoder_for
from service.classifier.expert_map import NOT_RECORDED, ExpertMap
from service.classifier.router_artifact import Artifact, load_artifact
from service.config import Config
from service.config.router import NO_ARTIFACT
from service.config.schema import silent_member
from service.errors import ArtifactError
from service.gateway.request.parsing import GENERAL
from service.gateway.routing.candidate_planner import CandidatePlanner, chosen_by_auto
from service.gateway.routing.classifier_stages import PromptStages
from service.gateway.routing.quality_model import Escalations, QualityModel, named_categories
from service.http.token_usage import estimate_tokens
from service.telemetry.metrics_registry import MetricsRegistry
from service.types import Recipe

log = logging.getLogger("coe.routing")


class RoutingSetup:
    """The semantic router of one config, with its recipes, their quality and their prices.

    Args:
        config: The config.
        lengths: What is known of the lengths of answers; None of a new gateway.
        escalations: What is known of the escalations of cascades; None of a new gateway.
        review_lengths: What is known of the lengths of reviews; None of a new gateway.
        metrics: Counts what each stage of the classifier decided.

    Attributes:
        stages: The stages of the classifier. They are started and stopped with the gateway.
        has_map: Whether the artifact's map knows experts of the config.
        shares: Category → its share of the prompts of the map's fit.
        map_categories: The categories of the map.
        tokens: Recorded lengths of prompts and answers, where the map has them.
        thinking: Recorded lengths of thinking by expert and category, as far as the map has them.
        presets: What a point of quality is worth in each preset.
        savings: What the choices are compared with.

    Raises:
        ArtifactError: The router's artifact can't be used.
    """

    def __init__(
        self,
        config: Config,
        lengths: Lengths | None = None,
        escalations: Escalations | None = None,
        metrics: MetricsRegistry | None = None,
        review_lengths: Lengths | None = None,
    ) -> None:
        found: ExpertMap | None = None
        artifact = artifact_of(config)
        self.stages = PromptStages(config, artifact, metrics)
        if artifact is not None and "map" in artifact.manifest:
            found = _known_part(ExpertMap.from_artifact(artifact), config)
        self.has_map = found is not None
        self.shares = (
            dict(zip(found.categories, found.prior.tolist(), strict=True)) if found else {}
        )
        whole = found is not None and artifact is not None and _is_whole(artifact, found)
        self.presets = presets_of(config.router.presets, artifact if whole else None)
        if found is not None:
            found = found.with_copies(_copies(config))
        self.map_categories = found.categories if found else ()
        self.tokens = found.tokens if found else None
        self.thinking = recorded_thinking(found)
        for recipe in found.recipes if found else ():
            if (silent := silent_member(config, recipe)) is not None:
                raise ArtifactError(
                    f"{config.router.artifact}: {recipe.name} needs the log probabilities of "
                    f"{silent!r}, which is remote; set experts.{silent}.remote.logprobs to true "
                    "where it tells them"
                )
        recipes = [recipe.recipe() for recipe in config.recipes.values()]
        self.catalog = RecipeCatalog(
            tuple(config.experts),
            # Recipes that were recorded by their names stand in the map like experts.
            [*recipes, *(r for r in (found.recipes if found else ()) if not _named(config, r))],
        )
        self.quality_model = QualityModel(config, self.catalog, self.stages.labels, escalations)
        if found is not None:
            self.quality_model.use_map(found, self.catalog)
        self.cost_model = CostModel(
            self.catalog.experts,
            self.quality_model.labels,
            prices_of(config),
            lengths,
            prior_tokens(config, self.catalog, self.quality_model.labels, found),
            (review_lengths or Lengths()) if self.catalog.has_steps else None,
            max((r.deliberation.review_tokens for r in recipes if r.deliberation), default=np.inf),
        )
        self.savings = self._savings_model(config)
        assess = self.stages.assess if self.stages.classifies else None
        self.planner = CandidatePlanner(
            config,
            self.catalog,
            self.quality_model,
            assess,
            self.cost_model.per_token,
            self.stages.refine,
            self.presets,
        )

    def _savings_model(self, config: Config) -> SavingsModel:
        catalog = self.catalog
        named = dict(catalog.index)
        named |= {
            name: catalog.recipe_index[recipe.recipe()] for name, recipe in config.recipes.items()
        }
        against = config.savings.against
        if against is None:
            silent = np.array(
                ["chat" not in config.experts[name].capabilities for name in catalog.experts]
            )
            able = ~(catalog.uses & silent).any(axis=1) & chosen_by_auto(config, catalog)
            # A recruit has no cost of its own to compare with.
            able &= ~catalog.recruits
            best = best_baseline(self.quality_model.by_category(), able)
            names = {row: name for name, row in reversed(named.items())}
            if best is not None and best not in names:
                names[best] = catalog.recipes[best].name.replace("→", "->")
                named[names[best]] = best
            against = () if best is None else (names[best],)
        return SavingsModel(catalog, self.cost_model, against, named)


def _copies(config: Config) -> dict[str, str]:
    """The experts without figures of their own that have those of another one."""
    return {
        name: expert.quality_from
        for name, expert in config.experts.items()
        if expert.quality_from is not None and not expert.quality
    }


def _is_whole(artifact: Artifact, known: ExpertMap) -> bool:
    """Whether a config has every expert of the artifact's map: prices of others don't fit it."""
    return len(known.recipes) == len(artifact.section("map")["recipes"])


def prior_tokens(
    config: Config, catalog: RecipeCatalog, labels: Sequence[str], found: ExpertMap | None
) -> PriorTokens:
    """Return what a config and its expert map know of lengths before any answer was seen.

    Args:
        config: The config, whose experts may bound their answers.
        catalog: Its experts.
        labels: The categories.
        found: The expert map, if there is one.
    """
    known = PriorTokens.nothing(len(labels), len(catalog.experts))
    for name, expert in config.experts.items():
        if expert.defaults is not None and expert.defaults.max_tokens is not None:
            known.most[catalog.index[name]] = expert.defaults.max_tokens
    recorded = found.tokens if found else None
    if found is None or recorded is None:
        return known
    columns = [catalog.index[name] for name in recorded.experts]
    known.answer[0, columns] = found.prior @ recorded.answer
    for row, label in enumerate(found.categories):
        if label in labels:
            known.answer[1 + labels.index(label), columns] = recorded.answer[row]
    for name, column, added in zip(recorded.experts, columns, recorded.added, strict=True):
        # The gateway counts an expert's own system prompt by itself.
        defaults = config.experts[name].defaults
        system = (defaults and defaults.system) or ""
        known.added[column] = max(0.0, float(added) - estimate_tokens(len(system.encode())))
    return known


def recorded_thinking(found: ExpertMap | None) -> dict[tuple[str, str], list[int]]:
    """The lengths of thinking that an expert map was fitted on, by expert and category.

    Args:
        found: The expert map, if there is one.

    Returns:
        Lengths in tokens, as `ThinkingLengths.seed` takes them.
    """
    if found is None or (recorded := found.thinking) is None:
        return {}
    return {
        (expert, category): recorded.samples[:, row, column].tolist()
        for column, expert in enumerate(recorded.experts)
        for row, category in enumerate(found.categories)
        if recorded.samples[0, row, column] != NOT_RECORDED
    }


def category_warnings(config: Config, labels: Collection[str]) -> list[str]:
    """One line if the config names categories that the classifier lacks: `auto` misses these.

    Args:
        config: The config.
        labels: The classifier's categories; none where there is no classifier.
    """
    strangers = {
        category: place
        for category, place in named_categories(config).items()
        if category not in labels and category != GENERAL
    }
    if not labels or not strangers:
        return []
    named = ", ".join(f"{category!r} ({place})" for category, place in strangers.items())
    return [
        f"the router has no category {named}; `auto` sends no prompt there, a request may name it "
        f"as auto/CATEGORY. It has {', '.join(sorted(set(labels) - {GENERAL}))}"
    ]


def encoder_of(config: Config) -> str | None:
    """The name or folder of a config's sentence encoder; None where it has none.

    Raises:
        ArtifactError: The router's artifact can't be used.
    """
    encoder = config.router.encoder
    if encoder is None:
        return None
    return encoder_for(encoder.model, None if encoder.model else artifact_of(config))


def artifact_of(config: Config) -> Artifact | None:
    """The artifact that classifies a config's prompts; None where there is none.

    Without `router.artifact` it is the built-in one, unless the config has categories by examples.

    Raises:
        ArtifactError: It can't be used.
    """
    path = config.router.artifact
    if path == NO_ARTIFACT or (path is None and config.categories):
        return None
    if path is None or path == str(BUILT_IN):
        return built_in_artifact()
    return load_artifact(Path(path))


def _named(config: Config, recipe: Recipe) -> bool:
    """Whether a recipe of a map is one of the config's, recorded by its name."""
    return recipe.kind == "single" and recipe.members[0] in config.recipes


def _known_part(found: ExpertMap, config: Config) -> ExpertMap | None:
    """The artifact's map over the experts and recipes of this config; None where it knows none."""
    known = [name for name in found.experts if name in config.experts]
    strangers = sorted(set(found.experts) - set(known) - set(config.recipes))
    unknown = [name for name, expert in config.experts.items() if expert.auto and name not in known]
    # A map may know more experts than a config has. With one that it lacks, a name may be wrong.
    if strangers and unknown and len(config.experts) > 1:
        names = ", ".join(strangers)
        log.warning("the router's map knows experts that are not in the config: %s", names)
    try:
        return found.only(known, alone=config.recipes)
    except ValueError:
        return None
