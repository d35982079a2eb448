"""The local Ray cluster where its start is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from service.config import Config
from service.deployment.local_cluster import LocalCluster
from service.errors import ConfigError
from service.torch_build import TorchBuild


def test_start_refused_by_the_installed_torch_starts_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    cpu = TorchBuild("2.13.0+cpu", "")
    monkeypatch.setattr("service.deployment.local_cluster.torch_build", lambda: cpu)
    monkeypatch.setattr(ray, "init", forbidden)
    config = Config.model_validate({"experts": {"a": {"model": "a"}}, "pools": {"p": {"gpus": 1}}})
    cluster = LocalCluster(config, tmp_path)
    with pytest.raises(ConfigError, match="CPU build"):
        cluster.start_ray()
    cluster.stop()
    assert not ray.is_initialized()
