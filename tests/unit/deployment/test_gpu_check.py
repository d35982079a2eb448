"""Pools held against a machine's GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config
from service.deployment.gpu_check import check_gpus
from service.errors import ConfigError


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
