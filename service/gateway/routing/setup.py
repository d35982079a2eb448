"""What decides for one config, without any pool: recipes, their worth, their prices."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from service.broker.cost_model import CostModel, Lengths
from service.broker.prices import prices_of
from service.broker.recipe_catalog import RecipeCatalog
from service.classifier.artifact import load_artifact
from service.classifier.classifier import Classifier
from service.classifier.conversation import assess_body
from service.classifier.expert_map import ExpertMap
from service.config import Config
from service.config.schema import silent_member
from service.errors import ArtifactError
from service.gateway.routing.quality import Escalations, QualityModel
from service.gateway.routing.semantic_router import Assess, SemanticRouter

log = logging.getLogger("coe.routing")


class RoutingSetup:
    """What decides for one config, without any pool: recipes, their worth, their prices.

    Raises ArtifactError where the router's artifact can't be used.
    """

    def __init__(
        self,
        config: Config,
        lengths: Lengths | None = None,
        escalations: Escalations | None = None,
    ) -> None:
        """`lengths`, `escalations`: what is known already; of a new gateway nothing."""
        found: ExpertMap | None = None
        labels: tuple[str, ...] = ()
        assess: Assess | None = None
        if config.router.artifact is not None:
            artifact = load_artifact(Path(config.router.artifact))
            classifier = Classifier.from_artifact(artifact)
            assess = partial(assess_body, classifier)
            labels = classifier.labels
            if "map" in artifact.manifest:
                found = _known_part(ExpertMap.from_artifact(artifact), config)
        for recipe in found.recipes if found else ():
            if (silent := silent_member(config, recipe)) is not None:
                raise ArtifactError(
                    f"{config.router.artifact}: {recipe.name} needs the log probabilities of "
                    f"{silent!r}, which is remote; set experts.{silent}.remote.logprobs to true "
                    "where it tells them"
                )
        recipes = [recipe.recipe() for recipe in config.recipes.values()]
        self.catalog = RecipeCatalog(
            tuple(config.experts), [*recipes, *(found.recipes if found else ())]
        )
        self.quality_model = QualityModel(config, self.catalog, labels, escalations)
        if found is not None:
            self.quality_model.use_map(found, self.catalog)
        self.cost_model = CostModel(
            self.catalog.experts, self.quality_model.labels, prices_of(config), lengths
        )
        self.router = SemanticRouter(config, self.catalog, self.quality_model, assess)


def _known_part(found: ExpertMap, config: Config) -> ExpertMap | None:
    """The artifact's map over the experts of this config; None where it knows none of them."""
    known = [name for name in found.experts if name in config.experts]
    strangers = sorted(set(found.experts) - set(known))
    if strangers:
        log.warning("the router's map knows experts that the config has not: %s", strangers)
    try:
        return found.only(known)
    except ValueError:
        return None
