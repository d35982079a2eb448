"""Pools held against a machine's GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.deployment.gpu_check import check_gpus, check_nodes, check_torch, node_faults
from service.deployment.serve_application import application
from service.errors import ConfigError
from service.torch_build import TorchBuild


def config(**pools: dict[str, Any]) -> Config:
    whole = {
        kind: {"engine": "simulated", "experts": [kind], **pool} for kind, pool in pools.items()
    }
    return Config.model_validate({"experts": {n: {"model": n} for n in pools}, "pools": whole})


@pytest.mark.parametrize(
    ("pools", "have", "said"),
    [
        ({"a": {"gpus": 1}}, 0, r"pools\.a\.gpus: a replica needs 1, and Ray finds none"),
        ({"a": {"gpus": 4}}, 2, r"needs 4, and Ray finds 2"),
        ({"a": {"gpus": 1}, "b": {"gpus": 2}}, 2, r"replicas need 3 GPUs, and Ray finds 2"),
        ({"a": {"gpus": 1, "min_replicas": 3}}, 2, r"replicas need 3 GPUs"),
    ],
)
def test_check_gpus_missing_gpus_raise_with_their_number(
    pools: dict[str, Any], have: float, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_gpus(config(**pools), have)


def test_check_gpus_needs_only_the_minimum_replicas() -> None:
    check_gpus(config(a={}), 0)
    check_gpus(config(a={"gpus": 0.5}, b={"gpus": 0.5}), 1)
    check_gpus(config(a={"gpus": 1}, b={"gpus": 1, "min_replicas": 0, "max_replicas": 1}), 1)


@pytest.mark.parametrize(
    ("build", "pool", "refused"),
    [
        (TorchBuild("2.13.0+cpu", ""), {"gpus": 1}, True),
        (TorchBuild("2.13.0+cpu", ""), {"gpus": 0.5}, True),
        (TorchBuild("2.13.0+cpu", ""), {}, False),
        (TorchBuild("2.13.0+cpu", ""), {"gpus": 1, "engine": "simulated"}, False),
        (TorchBuild("2.13.0", "cuda 13.0"), {"gpus": 1}, False),
        (TorchBuild("2.13.0", "hip 7.0"), {"gpus": 1}, False),
        (None, {"gpus": 1}, False),
    ],
)
def test_check_torch_refuses_a_cpu_build_for_a_pool_on_gpus(
    build: TorchBuild | None, pool: dict[str, Any], refused: bool
) -> None:
    checked = config(a={"engine": "vllm", **pool})
    if not refused:
        return check_torch(checked, build)
    with pytest.raises(ConfigError, match=r"pools\.a\.gpus: .* CPU build.*make setup GPU=1"):
        check_torch(checked, build)


@pytest.mark.parametrize(
    ("nodes", "wrong"),
    [([], []), ([0, 0], []), ([8, 1], []), ([4, 4], ["big"]), ([0, 1], ["big", "pair"])],
)
def test_node_faults_name_replicas_that_would_span_nodes(
    nodes: list[float], wrong: list[str]
) -> None:
    vllm = {"engine": "vllm", "gpus": 8}
    sizes = {"tensor_parallel_size": 2, "args": {"pipeline_parallel_size": 4}}
    pools = config(small={"gpus": 0.5}, pair={"gpus": 2}, big={**vllm, "vllm": sizes}, cpu={})
    found = node_faults(pools, nodes)
    assert [line.split(".")[1] for line in sorted(found)] == wrong
    assert all("pipeline_parallel_size" in line and "one node" in line for line in found)
    if not wrong:
        return check_nodes(pools, nodes)
    with pytest.raises(ConfigError) as caught:
        check_nodes(pools, nodes)
    assert all(f"pools.{kind}.gpus" in caught.value.message for kind in wrong)


def test_application_asks_ray_for_all_gpus_of_a_replica_in_one_actor(tmp_path: Path) -> None:
    """Ray keeps an actor on one node: no placement group could spread its engines."""
    sizes = {"tensor_parallel_size": 2, "args": {"data_parallel_size": 3}}
    pools = config(big={"engine": "vllm", "gpus": 6, "vllm": sizes}, small={"gpus": 0.5})
    app = application(pools, tmp_path / "secret", tmp_path / "key", host="127.0.0.1")
    made = app._bound_deployment.init_args[3]
    options = {kind: one._bound_deployment.ray_actor_options for kind, one in made.items()}
    assert {kind: one["num_gpus"] for kind, one in options.items()} == {"big": 6, "small": 0.5}
