"""This service for a load test: a temporary config, started by `coe serve`, ready, stopped."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from loadtests.lib.child_processes import admin_key_of, fetch, running

ROOT = Path(__file__).resolve().parents[2]
ROUTER = ROOT / "router_models" / "artifacts" / "demo@1"
_START_S = 300.0


def config(port: int, experts: dict[str, Any], pools: dict[str, Any] | None = None) -> Any:
    """A config with `auto` by the demo's router, on loopback."""
    return {
        "server": {"port": port, "drain_s": 5.0},
        "router": {"artifact": str(ROUTER)},
        "experts": experts,
        "pools": pools or {},
    }


def _all_ready(port: int, *, scaled_to_zero: bool) -> bool:
    status, body = fetch(port, "/ready", admin_key=admin_key_of())
    if status != 200 or scaled_to_zero:
        return status == 200
    experts = json.loads(body)["experts"].values()
    failed = [state.get("reason", "") for state in experts if state["state"] == "failed"]
    if failed:
        raise RuntimeError(f"an expert failed to load: {failed[0]}")
    return all(state["state"] == "device" for state in experts)


@contextmanager
def serving(settings: Any, *, scaled_to_zero: bool = False) -> Iterator[int]:
    """The service with this config; gives the pid of `coe serve` once every expert answers.

    `scaled_to_zero`: no expert does, before somebody asks.
    """
    port = settings["server"]["port"]
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        # Ray Serve gives every cluster's first gateway the same port. Another service on
        # this machine must not get requests that are meant for the one we measure.
        first = 30_000 + port % 1000
        env = {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 20),
        }
        command = [str(Path(sys.executable).parent / "coe"), "serve", "--config", str(path)]

        def ready() -> bool:
            return _all_ready(port, scaled_to_zero=scaled_to_zero)

        with running("coe", command, ready, timeout_s=_START_S, env=env) as process:
            yield process.pid
