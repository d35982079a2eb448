"""The application of a cluster that somebody else has started, held against its nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from service.deployment.external_cluster_app import build
from service.errors import ConfigError

POOL = {"engine": "vllm", "gpus": 16, "vllm": {"tensor_parallel_size": 8}}
POOL["vllm"]["args"] = {"pipeline_parallel_size": 2}  # type: ignore[index]  # a dict of dicts


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    config = {"experts": {"big": {"model": "m"}}, "pools": {"gpu": POOL}}
    keys = {"secret": str(folder / "secret"), "admin_key": str(folder / "key")}
    return {"config": {**config, "server": {"allow_unauthenticated": True}}, **keys, **others}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The GPUs of each node of a cluster; a dead node has some, too."""
    found: list[float] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)

    def nodes() -> list[dict[str, Any]]:
        alive = [{"Alive": True, "Resources": {"GPU": one} if one else {}} for one in found]
        return [*alive, {"Alive": False, "Resources": {"GPU": 64.0}}]

    monkeypatch.setattr(ray, "nodes", nodes)
    return found


@pytest.mark.parametrize("nodes", [[8.0, 8.0], [0.0, 15.0], [8.0, 8.0, 8.0]])
def test_engine_larger_than_every_node_is_refused(
    nodes: list[float], gpus: list[float], tmp_path: Path
) -> None:
    gpus[:] = nodes
    with pytest.raises(ConfigError, match=r"pools\.gpu\.gpus: .* 16 GPUs on one node"):
        build(arguments(tmp_path))
    build(arguments(tmp_path, nodes_may_join=True))


@pytest.mark.parametrize("nodes", [[], [0.0], [16.0, 8.0]])
def test_engine_that_fits_or_waits_for_the_first_gpu_is_deployed(
    nodes: list[float], gpus: list[float], tmp_path: Path
) -> None:
    gpus[:] = nodes
    build(arguments(tmp_path))
