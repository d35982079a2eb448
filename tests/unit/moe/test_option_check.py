"""Kernel and placement settings of routed experts: what vLLM accepts, and what is refused."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from service.config import Config, load_config, parse_config
from service.config.moe_options import EplbOptions, MoeBackend
from service.engine.scoped_env import scoped_env
from service.errors import ConfigError
from service.models import ModelInfo, MoeInfo
from service.pool.memory_plan import plan_pool
from tests.support.tiny_moe import save, tiny_moe
from tests.unit.pool.test_memory_plan import model

MOE = MoeInfo(8, 2, 512)


def config(vllm: dict[str, Any], *, gpus: float = 4, **experts: Any) -> Config:
    data = {
        "experts": experts or {"big": {"model": "m"}},
        "pools": {"main": {"gpus": gpus, "vllm": {"tensor_parallel_size": 4, **vllm}}},
    }
    return parse_config(json.dumps(data), "c.yaml")


def plan(made: Config, **found: ModelInfo) -> Any:
    return plan_pool(made, "main", (found or {"big": model(moe=MOE)}).__getitem__)


def of_vllm(module: str) -> ast.Module:
    """A module of vLLM, read and not imported."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return ast.parse((Path(found.origin).parent / module).read_text())


def test_moe_backends_are_those_of_vllm() -> None:
    (named,) = (
        node.value
        for node in of_vllm("config/kernel.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MoEBackend"
    )
    assert isinstance(named, ast.Subscript)
    assert get_args(MoeBackend) == ast.literal_eval(named.slice)


def test_eplb_options_are_those_of_vllm() -> None:
    (section,) = (
        node
        for node in of_vllm("config/parallel.py").body
        if isinstance(node, ast.ClassDef) and node.name == "EPLBConfig"
    )
    theirs = {ast.unparse(n.target) for n in section.body if isinstance(n, ast.AnnAssign)}
    assert set(EplbOptions.model_fields) <= theirs


@pytest.mark.parametrize(
    ("gpus", "vllm", "words"),
    [
        (0, {"moe_backend": "triton"}, "only auto is possible"),
        (0, {"tuned_config_folder": "/t"}, "tuned configs are for Triton's kernels, on GPUs"),
        (0, {"enable_eplb": True}, "load balancing is for several GPUs; this pool runs on CPU"),
        (0, {"enable_expert_parallel": True}, "on CPU an engine is one device"),
        (1, {"enable_eplb": True, "enable_expert_parallel": True, "tensor_parallel_size": 1},
         "vllm.enable_eplb: spreading experts needs several GPUs"),
        (2, {"enable_expert_parallel": True}, "needs 4 GPUs (vllm.tensor_parallel_size), and a"),
        (4, {"enable_eplb": True}, "set enable_expert_parallel too"),
        (4, {"eplb_config": {"window_size": 9}}, "no effect without enable_eplb"),
        (4, {"expert_placement_strategy": "round_robin"}, "without enable_expert_parallel"),
        (4, {"expert_placement_strategy": "round_robin", "enable_expert_parallel": True,
             "enable_eplb": True}, "EPLB always begins with linear"),
        (4, {"moe_backend": "tritn"}, "input should be 'auto', 'triton', 'batched_triton'"),
        (4, {"expert_placement_strategy": "best"}, "input should be 'linear' or 'round_robin'"),
        (4, {"eplb_config": {"windows": 9}}, "unknown key; did you mean 'window_size'? allowed:"),
    ],
)  # fmt: skip
def test_config_kernel_unsupported_on_the_platform_raises_with_the_reason(
    gpus: float, vllm: dict[str, Any], words: str
) -> None:
    if gpus == 0:
        vllm = {**vllm, "tensor_parallel_size": 1}
    with pytest.raises(ConfigError) as caught:
        config(vllm, gpus=gpus)
    assert words in caught.value.message
    assert caught.value.message.startswith("c.yaml: pools.main")


def test_vllm_of_expert_settings_override_the_pool_s() -> None:
    made = config(
        {"moe_backend": "triton"},
        big={"model": "m", "vllm": {"moe_backend": "flashinfer_cutlass"}},
        tuned={"base": "big", "adapter": "a"},
        other={"model": "n"},
    )
    assert made.vllm_of("main", "big").moe_backend == "flashinfer_cutlass"
    assert made.vllm_of("main", "tuned").moe_backend == "flashinfer_cutlass"
    assert made.vllm_of("main", "other").moe_backend == "triton"
    assert made.vllm_of("main", "big").tensor_parallel_size == 4


@pytest.mark.parametrize(
    ("expert", "gpus", "words"),
    [
        ({"model": "m", "vllm": {"moe_backend": "triton"}}, 0,
         "experts.big.vllm.moe_backend: pools.main: on CPU vLLM has one kernel"),
        ({"model": "m", "vllm": {"tuned_config_folder": "t"}}, 0,
         "experts.big.vllm.tuned_config_folder: pools.main: tuned configs are for"),
        ({"model": "m", "vllm": {"moe_backend": "fast"}}, 4, "experts.big.vllm.moe_backend: input"),
        ({"remote": {"url": "http://x/v1", "model": "m"}, "vllm": {"moe_backend": "triton"}}, 4,
         "experts.big: vllm is for experts with full weights of their own"),
    ],
)  # fmt: skip
def test_config_expert_settings_are_checked(
    expert: dict[str, Any], gpus: float, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config({"tensor_parallel_size": 1}, gpus=gpus, big=expert, b={"model": "m"})
    assert words in caught.value.message


EP = {"enable_expert_parallel": True}
EPLB = {**EP, "enable_eplb": True}


@pytest.mark.parametrize(
    ("vllm", "own", "info", "words"),
    [
        ({"moe_backend": "triton"}, {}, model(),
         "pools.main.vllm.moe_backend: none of its models is a mixture of experts"),
        ({"tuned_config_folder": "/t"}, {}, model(), "pools.main.vllm.tuned_config_folder: none"),
        (EP, {}, model(), "'big' (LlamaForCausalLM) is no mixture of experts; give it a pool"),
        ({}, {"moe_backend": "triton"}, model(),
         "experts.big.vllm.moe_backend: LlamaForCausalLM is no mixture of experts"),
        ({}, {"moe_backend": "marlin"}, model(moe=MOE),
         "experts.big.vllm.moe_backend: marlin is for quantised weights"),
        ({"moe_backend": "deep_gemm"}, {}, model(moe=MOE),
         "pools.main.vllm.moe_backend: deep_gemm is for quantised weights"),
        (EP, {}, model(moe=MoeInfo(3, 1, 64)), "'big' has 3 experts in a layer, fewer than the 4"),
        (EPLB, {}, model(moe=MoeInfo(10, 1, 64)),
         "10 experts of 'big' and 0 copies can't be spread evenly over 4 GPUs; possible: 2, 6, …"),
        ({**EPLB, "eplb_config": {"num_redundant_experts": 28}}, {}, model(moe=MOE),
         "28 copies are more than 8 experts on 4 GPUs can have"),
        ({**EP, "expert_placement_strategy": "round_robin"}, {}, model(moe=MOE),
         "round_robin is for models with groups of experts, and 'big' has none"),
    ],
)  # fmt: skip
def test_plan_kernel_settings_that_do_not_fit_the_model_raise(
    vllm: dict[str, Any], own: dict[str, Any], info: ModelInfo, words: str
) -> None:
    made = config(vllm, big={"model": "m", "vllm": own})
    with pytest.raises(ConfigError) as caught:
        plan(made, big=info)
    assert words in caught.value.message


def test_plan_describes_the_moe_settings() -> None:
    made = config({**EPLB, "eplb_config": {"num_redundant_experts": 4}, "moe_backend": "triton"})
    assert plan(made).moe == (
        "big: 8 routed experts, 2 for a token; moe_backend triton; "
        "spread over 4 GPUs by load, 4 copies",
    )
    made = config({**EP, "expert_placement_strategy": "round_robin"})
    (line,) = plan(made, big=model(moe=MoeInfo(8, 2, 512, groups=4))).moe
    assert line.endswith("moe_backend auto; spread over 4 GPUs, round_robin")
    quantised = model(moe=MOE, quantization="fp8")
    (line,) = plan(config({"moe_backend": "marlin"}), big=quantised).moe
    assert line.endswith("moe_backend marlin")


def test_plan_checks_the_tuned_config_files(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    made = config({}, big={"model": "m", "vllm": {"tuned_config_folder": str(folder)}})

    def said() -> str:
        with pytest.raises(ConfigError) as caught:
            plan(made)
        return caught.value.message

    assert said().endswith(f"{folder}: no such folder")
    folder.mkdir()
    # Eight experts, each cut in four: as vLLM names its files.
    wanted = folder / "E=8,N=128,device_name=NVIDIA_H200.json"
    assert "there is no E=8,N=128,device_name=….json in it" in said()
    wanted.write_text("[")
    assert "can't be read" in said()
    wanted.write_text('{"triton_version": "3"}')
    assert "holds no configs by number of tokens" in said()
    wanted.write_text('{"triton_version": "3", "16": {"BLOCK_SIZE_M": 16}}')
    assert f"tuned configs in {folder}" in plan(made).moe[0]
    # With whole experts on each GPU it is another file.
    spread = config({**EP, "tuned_config_folder": str(folder)})
    with pytest.raises(ConfigError, match="there is no E=2,N=512,device_name"):
        plan(spread)


def test_tuned_config_folder_is_relative_to_the_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    pool = {"gpus": 1, "vllm": {"tuned_config_folder": "pool"}}
    expert = {"model": "m", "vllm": {"tuned_config_folder": "../own"}}
    data = {"experts": {"big": expert, "b": {"model": "n"}}, "pools": {"main": pool}}
    path.write_text(json.dumps(data))
    made = load_config(path)
    assert made.vllm_of("main", "b").tuned_config_folder == str(tmp_path / "pool")
    assert made.vllm_of("main", "big").tuned_config_folder == str(tmp_path.parent / "own")


def test_check_command_prints_moe_settings_and_errors(tmp_path: Path) -> None:
    from service.cli.check import check

    folder = save(tiny_moe("mixtral"), tmp_path / "moe")
    path = tmp_path / "c.yaml"

    def run(pool: dict[str, Any]) -> Any:
        vllm = {"dtype": "float32", "kv_cache_bytes": "64MiB"}
        data = {
            "experts": {"big": {"model": str(folder), "categories": ["general"]}},
            "pools": {"main": {**pool, "vllm": {**vllm, **pool.get("vllm", {})}}},
        }
        path.write_text(json.dumps(data))
        return CliRunner().invoke(check, [str(path)])

    result = run({})
    assert result.exit_code == 0, result.exception
    assert "main: big: 8 routed experts, 2 for a token; moe_backend auto\n" in result.output
    assert isinstance(run({"vllm": {"moe_backend": "triton"}}).exception, ConfigError)
    result = run({"gpus": 2, "vllm": {**EPLB, "tensor_parallel_size": 2}})
    assert "spread over 2 GPUs by load, 0 copies" in result.output


def test_scoped_env_is_inherited_by_starts_that_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "COE_TEST_INHERITED"
    monkeypatch.delenv(name, raising=False)
    entered, leave = threading.Event(), threading.Event()
    seen: list[str | None] = []

    def first() -> None:
        with scoped_env(name, "a"):
            entered.set()
            assert leave.wait(30)
            seen.append(os.environ.get(name))

    def other(value: str | None) -> None:
        with scoped_env(name, value):
            seen.append(os.environ.get(name))

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert entered.wait(30)
    with scoped_env(name, "a"):  # the same one need not wait
        assert os.environ[name] == "a"
    threads += [threading.Thread(target=other, args=(value,)) for value in (None, "b")]
    for thread in threads[1:]:
        thread.start()
    assert os.environ[name] == "a"
    leave.set()
    for thread in threads:
        thread.join(30)
    assert seen[0] == "a"
    assert sorted(map(str, seen[1:])) == ["None", "b"]
    assert name not in os.environ
    monkeypatch.setenv(name, "mine")
    with scoped_env(name, None):
        assert os.environ[name] == "mine"
    with contextlib.suppress(RuntimeError), scoped_env(name, "c"):
        seen.append(os.environ[name])
        raise RuntimeError
    assert seen[-1] == "c"
    assert os.environ[name] == "mine"
