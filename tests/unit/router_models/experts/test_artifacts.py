"""The committed adapters match their cards, and each beats the base in its domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_models.experts import training_texts
from service.models import AdapterInfo, inspect_model

ARTIFACTS = Path(training_texts.__file__).parent / "artifacts"


@pytest.mark.parametrize("expert", training_texts.EXPERTS)
def test_demo_adapter_is_small_and_changes_the_mlp_only(expert: str) -> None:
    info = inspect_model(ARTIFACTS / expert)
    assert isinstance(info, AdapterInfo)
    assert (info.base, info.rank) == ("smollm2-135m-instruct", 8)
    assert info.target_modules == ("down_proj", "gate_proj", "up_proj")
    assert info.weight_bytes <= 5_000_000


@pytest.mark.parametrize("expert", training_texts.EXPERTS)
def test_demo_expert_beats_the_base_on_its_domain(expert: str) -> None:
    measured = json.loads((ARTIFACTS / expert / "metrics.json").read_text())["measured"]
    assert measured["gain"] > 3 * measured["gain_error"]


@pytest.mark.parametrize("expert", training_texts.EXPERTS)
def test_demo_expert_card_has_the_measured_figures(expert: str) -> None:
    card = (ARTIFACTS / expert / "README.md").read_text()
    metrics = json.loads((ARTIFACTS / expert / "metrics.json").read_text())
    measured, run = metrics["measured"], metrics["run"]
    assert f"| base | {measured['base']:.4f} |" in card
    assert f"| this adapter | {measured['tuned']:.4f} |" in card
    assert f"{run['wall_s'] / 60:.1f} minutes" in card
    assert "licence of the data" in card
