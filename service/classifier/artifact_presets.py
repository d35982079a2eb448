"""What a point of quality is worth in each preset: by the config, the artifact, or the defaults."""

from __future__ import annotations

from pydantic import ValidationError

from service.classifier.router_artifact import Artifact
from service.config.router_presets import PresetsConfig
from service.errors import ArtifactError


def presets_of(given: PresetsConfig, artifact: Artifact | None) -> PresetsConfig:
    """Return the presets in force.

    The config's own figures count, then those that the artifact's outcomes chose, then the
    defaults.

    Args:
        given: The section `router.presets`.
        artifact: An artifact with a map; None has no figures.

    Raises:
        ArtifactError: The artifact's figures can't be used.
    """
    if artifact is None or "map" not in artifact.manifest:
        return given
    told = artifact.section("map").get("presets", {})
    found = given.model_dump()
    try:
        for name, one in dict(told).items():
            if name not in found or "point_cost" in getattr(given, name).model_fields_set:
                continue
            found[name] |= {"point_cost": one["point_cost"]}
        return PresetsConfig.model_validate(found)
    except (ValidationError, TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"{artifact.path}: manifest, map, presets: {error}") from error
