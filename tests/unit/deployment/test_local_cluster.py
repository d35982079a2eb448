"""The local Ray cluster: a refused start, and what it lets Serve change later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

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


def _config(**pools: dict[str, Any]) -> Config:
    kinds = {kind: {"engine": "simulated", **pool} for kind, pool in pools.items()}
    return Config.model_validate({"experts": {"a": {"model": "m"}}, "pools": kinds})


def test_redeploy_gives_new_versions_to_what_is_replaced_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed: list[dict[str, str]] = []
    fault: list[Exception] = []

    def versions(app: serve.Application) -> dict[str, str]:
        gateway = app._bound_deployment
        pools = gateway.init_args[3]
        found = {kind: one._bound_deployment.version for kind, one in pools.items()}
        return {"gateway": gateway.version, **found}

    def run(app: serve.Application, **_: object) -> None:
        deployed.append(versions(app))

    def run_many(targets: list[serve.RunTarget], **given: object) -> None:
        assert given == {"wait_for_applications_running": False}
        if fault:
            raise fault.pop()
        deployed.append(versions(targets[0].target))

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "run_many", run_many)
    cluster = LocalCluster(_config(p={}, q={}), tmp_path)
    cluster.deploy(tmp_path / "secret", tmp_path / "key")
    assert not cluster.redeploy(_config(p={}, q={"swap": {"min_stay_s": 9}}))
    cluster.redeploy(_config(p={}, q={"min_replicas": 2}))
    cluster.redeploy(_config(p={"max_queued_requests": 1}, r={}))
    fault.append(RuntimeError("the controller is away"))
    last = _config(p={"max_queued_requests": 1}, q={}, r={})
    with pytest.raises(RuntimeError, match="away"):
        cluster.redeploy(last)
    # It is tried again, with the same changes. A kind that comes back is a new one.
    assert cluster.redeploy(last).added == ("q",)
    assert deployed == [
        {"gateway": "1", "p": "1", "q": "1"},
        {"gateway": "1", "p": "1", "q": "1"},
        {"gateway": "1", "p": "3", "r": "3"},
        {"gateway": "1", "p": "3", "q": "4", "r": "3"},
    ]
