"""`coe router refit`: promotion where the candidate is better, refusal where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from router_models.cli import group
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact

SHIPPED = Path(__file__).parents[3] / "router_models/artifacts/public@1"


@pytest.fixture
def known() -> ExpertMap:
    return ExpertMap.from_artifact(load_artifact(SHIPPED))


def outcomes(path: Path, known: ExpertMap, count: int, best_wins: float) -> Path:
    """Rows on which the expert that the map takes for the best wins this often."""
    rng = np.random.default_rng(2)
    singles = [r.members[0] for r in known.recipes if r.kind == "single"]
    columns = [i for i, r in enumerate(known.recipes) if r.kind == "single"]
    first = singles[int(known.score[0, columns].argmax())]
    other = next(name for name in singles if name != first)
    lines = []
    for i in range(count):
        won = bool(rng.random() < best_wins)
        scores = {first: {"score": float(won)}, other: {"score": float(not won)}}
        row = {"id": str(i), "prompt_hash": str(i), "category": known.categories[0]}
        lines.append(json.dumps({**row, "outcomes": scores}))
    path.write_text("\n".join(lines) + "\n")
    return path


def refit(tmp_path: Path, file: Path, *more: str) -> tuple[int, str, Any]:
    link = tmp_path / "current@1"
    if not link.is_symlink():
        link.symlink_to(SHIPPED)
    config = tmp_path / "coe.yaml"
    config.write_text(
        "experts: {a: {model: m}}\npools: {cpu: {engine: simulated}}\n"
        "router: {artifact: ./current@1}\nshadow: {promote: {min_rows: 50}}\n"
    )
    words = ["refit", "--config", str(config), "--outcomes", str(file), "--link", str(link)]
    result = CliRunner().invoke(group, [*words, "--out", str(tmp_path / "next@2"), "--json", *more])
    found = json.loads(result.stdout) if result.exit_code == 0 else None
    return result.exit_code, result.output, found


@pytest.mark.parametrize(("best_wins", "promoted"), [(0.02, True), (0.97, False)])
def test_candidate_is_promoted_only_where_it_is_better(
    tmp_path: Path, known: ExpertMap, best_wins: float, promoted: bool
) -> None:
    code, said, found = refit(tmp_path, outcomes(tmp_path / "o.jsonl", known, 400, best_wins))
    assert code == 0, said
    assert (found["promoted"], found["linked"]) == (promoted, promoted)
    leads = (tmp_path / "current@1").resolve()
    assert leads == ((tmp_path / "next@2") if promoted else SHIPPED).resolve()
    # The candidate is whole, and only the map differs.
    candidate, present = load_artifact(tmp_path / "next@2"), load_artifact(SHIPPED)
    assert candidate.name == "next@2"
    changed = {
        name
        for name, tensor in candidate.tensors.items()
        if not np.array_equal(tensor, present.tensors[name])
    }
    assert changed <= {"map.score", "map.direct_score"}
    assert "map.score" in changed
    assert ExpertMap.from_artifact(candidate).recipes == known.recipes


def test_too_few_prompts_make_no_candidate(tmp_path: Path, known: ExpertMap) -> None:
    code, said, _ = refit(tmp_path, outcomes(tmp_path / "o.jsonl", known, 60, 0.0))
    assert (code, "24 prompts are left to judge on, 50 are needed" in said) == (1, True), said
    assert not (tmp_path / "next@2").exists()


def test_folder_in_place_of_a_link_is_not_replaced(tmp_path: Path, known: ExpertMap) -> None:
    (tmp_path / "taken").mkdir()
    file = outcomes(tmp_path / "o.jsonl", known, 400, 0.0)
    code, said, _ = refit(tmp_path, file, "--link", str(tmp_path / "taken"))
    assert (code, "is no symbolic link" in said) == (1, True)
