"""Presets come from the config, then from the artifact, then from the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.classifier.artifact_presets import presets_of
from service.classifier.router_artifact import Artifact
from service.config.router_presets import PresetsConfig
from service.errors import ArtifactError

DEFAULTS = PresetsConfig()


def artifact(presets: Any) -> Artifact:
    return Artifact(Path("a@1"), {"map": {"presets": presets}}, {})


def test_presets_of_the_config_count_before_those_of_the_artifact() -> None:
    told = artifact({"auto": {"point_cost": 0.5}, "fast": {"point_cost": 0.1}})
    given = PresetsConfig.model_validate({"auto": {"point_cost": 0.3}, "fast": {"point_s": 9}})
    found = presets_of(given, told)
    assert found.auto.point_cost == 0.3
    assert (found.fast.point_cost, found.fast.point_s) == (0.1, 9)
    assert found.best == DEFAULTS.best


@pytest.mark.parametrize("told", [None, Artifact(Path("a@1"), {}, {}), artifact({})])
def test_presets_without_figures_of_an_artifact_are_the_config_s(told: Artifact | None) -> None:
    assert presets_of(DEFAULTS, told) == DEFAULTS


@pytest.mark.parametrize(
    "presets",
    [3, {"auto": 3}, {"auto": {}}, {"auto": {"point_cost": -1}}, {"best": {"point_cost": "x"}}],
)
def test_presets_that_can_not_be_used_name_the_artifact(presets: Any) -> None:
    with pytest.raises(ArtifactError, match="a@1: manifest, map, presets"):
        presets_of(DEFAULTS, artifact(presets))


def test_presets_of_a_later_version_are_left_out() -> None:
    assert presets_of(DEFAULTS, artifact({"cheapest": {"point_cost": 1}})) == DEFAULTS
