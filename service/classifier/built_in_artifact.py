"""The artifact that classifies prompts where a config names none."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from service.classifier.router_artifact import Artifact, load_artifact

# The packages `service` and `router_models` lie beside each other, in sources and when installed.
BUILT_IN = Path(__file__).parents[2] / "router_models" / "artifacts" / "general@1"
"""The general router, see its card."""


@cache
def built_in_artifact() -> Artifact:
    """Load the built-in artifact, once.

    Raises:
        ArtifactError: Its files are missing or damaged.
    """
    return load_artifact(BUILT_IN)
