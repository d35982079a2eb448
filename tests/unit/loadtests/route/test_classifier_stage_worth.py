"""What `python -m loadtests.route --stages` measures, on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.lib.targets_and_report import Report
from loadtests.route import classifier_stage_worth
from router_models.category_fit import fit_categories, write_artifact
from router_models.labelled_prompt_reader import LabelledPrompt
from service.classifier.static_embedding_table import built_in_table
from service.encoder.onnx_encoder import OnnxEncoder
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts


def test_measure_reports_every_stage_and_the_share_that_reaches_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(tmp_path / "encoder")
    rows = [LabelledPrompt(text, name) for name in SUBJECTS for text in prompts(name, 15)]
    fitted = fit_categories(rows, built_in_table(), OnnxEncoder(folder), say=lambda _: None)
    write_artifact(fitted, tmp_path / "mine@1", [], {})
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(
            json.dumps({"prompt": text, "category": name}) + "\n"
            for name in SUBJECTS
            for text in prompts(name, 6, seed=4)
        )
    )
    monkeypatch.setattr(OnnxEncoder, "vocabulary_size", 1005)
    monkeypatch.setattr(OnnxEncoder, "encode_ids", _known_ids(OnnxEncoder.encode_ids))
    report = Report("route")
    classifier_stage_worth.measure(report, tmp_path / "mine@1", str(folder), [test], 10, 0.2)
    for stage in ("ngrams", "static", "encoder"):
        assert 0 <= report.facts[f"{stage}_accuracy"] <= 1
    assert 0 <= report.facts["encoder_share"] <= 1
    assert report.facts["worker_mb"] > 10
    assert any("planning with the encoder" in check.name for check in report.reach)


def _known_ids(encode):  # type: ignore[no-untyped-def]
    """Ids that the tiny vocabulary has, whatever the load test draws for a real one."""
    return lambda self, ids: encode(self, [[one % 20 for one in row] for row in ids])
