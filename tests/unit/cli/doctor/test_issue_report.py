"""The report for an issue: it has facts, and no text, address, path or key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cli.doctor.issue_report import report_of, without_places
from service.config import Config
from service.engine.swap_proof import ProofFinding, Verdict
from service.engine.swap_proof_store import SwapProofStore
from tests.support.tiny_dense_family import base
from tests.unit.engine.test_swap_proof import PROVEN, proof

SECRET = "hunter2"


def whole_config(root: Path) -> Config:
    """A config with a secret wherever a text of the user can stand."""
    experts: dict[str, Any] = {
        "a": {
            "model": str(root / SECRET / "a"),
            "description": f"about {SECRET}",
            "defaults": {"system": f"You are {SECRET}."},
        },
        "b": {"base": "a", "defaults": {"system": SECRET}},
        "r": {
            "remote": {
                "url": f"https://{SECRET}.example/v1",
                "model": SECRET,
                "api_key_env": SECRET.upper(),
            }
        },
    }
    vllm = {
        "args": {
            "hf_overrides": {"rope_theta": SECRET},
            "kv_cache_dtype": "fp8",
            "speculative_config": {"model": f"/models/{SECRET}", "method": "ngram"},
            "max_num_batched_tokens": 2048,
        },
        "media_domains": [f"{SECRET}.example"],
        "kv_cache_bytes": "1GiB",
    }
    category = {"expert": "a", "examples": [f"{SECRET} {i}" for i in range(9)]}
    return Config.model_validate(
        {
            "models_dir": str(root / SECRET),
            "experts": experts,
            "categories": {"x": category},
            "pools": {"p": {"gpus": 1, "slots": 1, "experts": ["a"], "vllm": vllm}},
        }
    )


def test_report_has_facts_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET.upper(), "another secret")
    base(tmp_path / SECRET / "a")
    failed = ProofFinding(Verdict.FAILED, f"OSError: '{tmp_path}/x' is full, {tmp_path}")
    SwapProofStore(tmp_path / SECRET).write(proof(inplace=PROVEN, sleep=failed))
    report = report_of(whole_config(tmp_path))
    text = json.dumps(report)
    assert SECRET not in text.lower()
    assert "another secret" not in text
    assert str(tmp_path) not in text
    assert {"coe", "vllm", "python", "torch"} <= report["versions"].keys()
    assert report["machine"]["memory_bytes"] > 0
    pool = report["config"]["pools"]["p"]
    assert pool["vllm"]["args"] == {
        "hf_overrides": "(dict)",
        "kv_cache_dtype": "fp8",
        "speculative_config": "(dict)",
        "max_num_batched_tokens": 2048,
    }
    experts = report["config"]["experts"]
    assert experts["a"]["architecture"] == "LlamaForCausalLM"
    assert experts["b"]["form"] == "variant"
    assert experts["r"] == {"form": "remote"}
    (record,) = report["records"]
    assert record["findings"]["inplace"]["verdict"] == "proven"
    assert record["findings"]["sleep"]["reason"] == "OSError: '(path)' is full, (path)"


def test_report_needs_no_config_and_no_weights(tmp_path: Path) -> None:
    assert report_of(None)["config"] is None
    report = report_of(whole_config(tmp_path))
    assert report["config"]["experts"]["a"]["weights"] == "not here, or not readable"


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("no '/srv/jane doe/models/x' here", "no '(path)' here"),
        ("401 for https://me:pass@hub.local/api?token=abc", "401 for (address)"),
        ("file:///srv/x or s3://bucket/key", "(address) or (address)"),
        ("at 10.0.0.7:8000", "at (address)"),
        ("HF_TOKEN=hf_abcdefghijkl; api_key: abc", "HF_TOKEN=(key); api_key=(key)"),
        ("Bearer sk-abcdefghijkl", "Bearer (key)"),
        ("~/models and (/srv/x)", "(path) and ((path))"),
        ("2 of 48 tokens differ: 3, 4", "2 of 48 tokens differ: 3, 4"),
        ("driver 580.65.06, torch 2.13.0+cpu, 1/2", "driver 580.65.06, torch 2.13.0+cpu, 1/2"),
    ],
)
def test_reasons_are_told_without_places_and_keys(reason: str, told: str) -> None:
    assert without_places(reason) == told
