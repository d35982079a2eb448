"""The rows from which the map of public models is fitted."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from router_models.outcome_reader import costs_of, read_outcomes, read_tokens
from router_models.public.public_map_fit import PublicModel, outcome_rows, stem

MODEL = PublicModel("Recorded-7B", "org/recorded", "MIT", 7.0, 2.0, "a model")
QUESTION = "Which is the largest ocean?"
ROW = {
    "id": "1",
    "prompt": f"{QUESTION}\n(A) Atlantic\n(B) Pacific",
    "category": "other",
    "outcomes": {
        "Recorded-7B": {"score": 1, "answer": "B", "output_chars": 401},
        "Another": {"score": 0},
    },
}


def test_outcome_rows_have_costs_of_what_was_read_and_lengths_of_what_people_ask(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write(json.dumps(ROW) + "\n")
    (row,) = outcome_rows(file, {"mine": MODEL, "missing": replace(MODEL, recorded="Missing")})
    assert row["prompt"] == stem(str(ROW["prompt"])) == QUESTION
    assert set(row["outcomes"]) == {"mine"}
    found = row["outcomes"]["mine"]
    assert found["cost"] == pytest.approx(2.0 * (len(str(ROW["prompt"])) + 401) / 4 / 1e6)
    plain = tmp_path / "rows.jsonl"
    plain.write_text(json.dumps(row) + "\n")
    table, _ = read_outcomes([plain], costs_of(None, [plain]))
    prompt, answer = read_tokens([plain], table)
    assert answer.tolist() == [[100]]
    # The gateway counts a prompt alike, so that nothing is added to it.
    assert prompt.tolist() == [[found["prompt_tokens"]]]
    assert found["prompt_tokens"] < len(str(ROW["prompt"])) / 4
