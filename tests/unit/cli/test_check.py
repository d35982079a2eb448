"""`coe check` tells what makes `auto` do less than it could, whether or not models are here."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import cli

ROOT = Path(__file__).parents[3]
POOLS = "pools: {cpu: {engine: simulated}}\n"
TWO = "experts:\n  a: {model: a, categories: [general]}\n  b: {model: b}\n"
NO_CLASSIFIER = TWO + "router: {artifact: none}\n" + POOLS
ONE_EXPERT = "experts:\n  a: {model: a, categories: [general]}\n" + POOLS
SWAP = (ROOT / "deploy" / "config" / "swap.yaml").read_text().replace("../..", str(ROOT))


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (NO_CLASSIFIER, "no classifier, so `auto` always means 'a'"),
        (SWAP, "no category reaches math-light, code-light"),
        (ONE_EXPERT, None),
    ],
    ids=["no classifier", "idle experts", "one expert"],
)
def test_check_warns_before_it_plans_memory(tmp_path: Path, text: str, warned: str | None) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(text)
    done = CliRunner().invoke(cli, ["check", str(path)])
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: router:")]
    assert len(lines) == (warned is not None), done.output
    assert warned is None or warned in lines[0]
