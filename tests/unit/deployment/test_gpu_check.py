"""Pools held against a machine's GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config
from service.deployment.gpu_check import check_gpus, check_torch
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
