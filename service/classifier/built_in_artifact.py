"""The artifact that classifies prompts where a config names none."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from service.classifier.router_artifact import Artifact, load_artifact
from service.errors import ArtifactError

# The packages `service` and `router_models` lie beside each other, in sources and when installed.
BUILT_IN = Path(__file__).parents[2] / "router_models" / "artifacts" / "general@2"
"""The general router, see its card."""


DEFAULT_ENCODER = "all-minilm-l6-v2"
"""The encoder of categories by examples, and of artifacts that do not name theirs."""


def encoder_for(model: str | None, artifact: Artifact | None) -> str:
    """Return which encoder to ask: the config's `model`, or that of the artifact's fit.

    Raises:
        ArtifactError: The artifact names none in its section.
    """
    if model is not None:
        return model
    section = None if artifact is None else artifact.part("classifier", "encoder")
    found = DEFAULT_ENCODER if section is None else section.get("model", DEFAULT_ENCODER)
    if not isinstance(found, str) or not found:
        raise ArtifactError("the router's artifact: classifier.encoder.model must be a name")
    return found


@cache
def built_in_artifact() -> Artifact:
    """Load the built-in artifact, once.

    Raises:
        ArtifactError: Its files are missing or damaged.
    """
    return load_artifact(BUILT_IN)
