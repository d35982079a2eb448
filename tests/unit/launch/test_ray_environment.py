"""Ports that two services on one machine must not share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.config import ServerConfig
from service.launch import ray_environment


def ports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every port of a service's own Ray Serve, by its variable; not the range of gateways."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        ray_environment.prepare(folder, ServerConfig(), folder / "startup.sock")
        variables = dict(os.environ)
    return {
        name: int(value)
        for name, value in variables.items()
        if name.endswith("_PORT") and "DIRECT_INGRESS" not in name
    }


def test_environment_moves_every_default_port_of_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    found = ports(tmp_path / "a", monkeypatch)
    assert len(set(found.values())) == len(found)
    # Statistics, metrics, and the proxies that Serve falls back to while no gateway is up.
    assert not {8404, 9101, 8500, 9500} & set(found.values())
    assert {name for name in found if "FALLBACK" in name} == {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    }
