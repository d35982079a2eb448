"""The simulation of learned budgets on recorded lengths."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from loadtests.thinking_budgets import (
    Answer,
    equal_quality,
    long_thinkers,
    measure,
    recorded,
    simulate,
)

# One answer in ten goes on for long, and is wrong.
ANSWERS = [Answer("c", 20 if n % 10 else 4000, float(n % 10 > 0)) for n in range(2000)]


def test_simulate_saves_what_is_lost_anyway_and_nothing_without_a_price() -> None:
    free = simulate(ANSWERS, 0.8, 0.0)
    assert (free.cut, free.tokens) == (0, 200 * 4000 + 1800 * 20)
    spent = simulate(ANSWERS, 0.8, 1e-3)
    assert spent.quality == free.quality
    assert spent.tokens < 0.3 * free.tokens
    # What has to be left whole is left whole.
    assert simulate(ANSWERS, 0.95, 1e-3).cut == 0


def test_equal_quality_saves_what_is_lost_anyway_and_no_right_answer() -> None:
    _, saved, spent = equal_quality(ANSWERS, simulate(ANSWERS, 0.8, 0.0))
    assert saved > 0.5
    assert spent.quality == 0.9
    # Where the long answers are the right ones, nothing can be saved.
    turned = [Answer(one.category, one.tokens, 1.0 - one.score) for one in ANSWERS]
    assert equal_quality(turned, simulate(turned, 0.8, 0.0))[1] == 0


def test_measure_reads_recorded_lengths_of_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl.gz"
    with gzip.open(path, "wt") as out:
        for answer in ANSWERS:
            outcomes = {
                "a": {"score": answer.score, "output_chars": 4 * answer.tokens},
                "b": {"score": answer.score, "reasoning_tokens": answer.tokens},
                "c": {"score": 1.0},
            }
            out.write(json.dumps({"category": answer.category, "outcomes": outcomes}) + "\n")
    found = recorded(path)
    assert found == {"a": ANSWERS, "b": ANSWERS}
    assert long_thinkers(found) == found
    report = measure(path, 0)
    assert report.reach[0].ok
    assert math.isclose(report.facts["worth, auto"]["most_lost"], 0.0, abs_tol=1e-9)
    (tmp_path / "none.jsonl").write_text('{"category": "c", "outcomes": {"a": {"score": 1}}}\n')
    with pytest.raises(ValueError, match="no outcome has output_chars"):
        recorded(tmp_path / "none.jsonl")
