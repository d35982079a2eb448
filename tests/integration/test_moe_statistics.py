"""Routing statistics of two pools: the admin endpoint, and the command that reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from service.cli import cli
from service.engine.engine_interface import RoutingSample
from service.errors import CoeError
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, run_gateway, simulated

CAPTURE = {"vllm": {"moe_capture": {"every": 2}, "enforce_eager": True}}
EXPERTS = {name: {"model": "m"} for name in ("moe", "dense", "idle", "plain")}


def chosen(expert: str, tokens: int = 0) -> RoutingSample:
    if not tokens:
        return RoutingSample(expert, (0, 2), 4, 1)
    load = np.array([[tokens, 0, 0, 0], [tokens // 2, tokens // 2, 0, 0]], np.int64)
    stretch = np.zeros((2, tokens, 1), np.int16)
    stretch[1, tokens // 2 :] = 1
    return RoutingSample(expert, (0, 2), 4, 1, tokens, load, (stretch,))


@asynccontextmanager
async def two_pools() -> AsyncIterator[RunningGateway]:
    """Two pools with mixtures of experts, and one where nobody looks."""
    kinds = {
        "a": {**CAPTURE, "experts": ["moe", "dense"]},
        "b": {**CAPTURE, "experts": ["moe", "idle"]},
        "c": {"experts": ["plain"]},
    }
    async with run_gateway(
        simulated({"a": {}, "b": {}, "c": {}}, experts=EXPERTS, kinds=kinds)
    ) as s:
        for kind, tokens in (("a", 40), ("b", 60)):
            metrics = s.pools[kind].process.pool_metrics
            for expert in ("moe", "idle"):
                metrics.on_routing_sample(chosen(expert))
            metrics.on_routing_sample(RoutingSample("dense", (), 0, 0))
            metrics.on_routing_sample(chosen("moe", tokens))
        yield s


async def fetch_statistics(s: RunningGateway, expert: str, key: str = ADMIN_KEY) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}"}
    async with s.client.get(f"{s.url}/admin/experts/{expert}/moe", headers=headers) as reply:
        return reply.status, await reply.json()


async def test_moe_statistics_of_pools_are_added_up() -> None:
    async with two_pools() as s:
        status, body = await fetch_statistics(s, "moe")
        denied, _ = await fetch_statistics(s, "moe", key="no")
    assert (status, denied) == (200, 401)
    assert body["shape"] == {"layers": 2, "experts": 4, "top_k": 1}
    assert (body["expert"], body["pools"], body["tokens"], body["every"]) == ("moe", 2, 100, 2)
    first, second = body["layers"]
    assert (first["layer"], first["load"]) == (0, [100, 0, 0, 0])
    assert (first["imbalance"], first["entropy_bits"], first["srp"]) == (4.0, 0.0, 1.0)
    assert (second["layer"], second["load"]) == (2, [50, 50, 0, 0])
    assert (second["imbalance"], second["entropy_bits"], second["entropy"]) == (2.0, 1.0, 0.5)
    assert 0.8 < second["srp"] < 1
    assert second["sch"] == 1.0


async def test_moe_statistics_errors_name_the_reason() -> None:
    cases = {
        "nobody": (404, "no running pool holds an expert 'nobody'"),
        "dense": (409, "'dense' is not a mixture of experts"),
        "idle": (409, "no routing sample of 'idle' has arrived yet"),
        "plain": (409, "its pool has no vllm.moe_capture"),
    }
    async with two_pools() as s:
        for expert, (status, words) in cases.items():
            found, body = await fetch_statistics(s, expert)
            assert found == status
            assert words in body["error"]["message"]


async def test_moe_show_command_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "admin-key"
    key.write_text(ADMIN_KEY)
    key.chmod(0o600)
    monkeypatch.setattr("service.rpc.local_paths.admin_key_path", lambda: key)
    picture = tmp_path / "map.png"

    def run(url: str, *words: str) -> Any:
        return CliRunner().invoke(cli, ["moe", "show", *words, "--url", url])

    async with two_pools() as s:
        shown = await asyncio.to_thread(run, s.url, "moe")
        whole = await asyncio.to_thread(run, s.url, "moe", "--json", "--png", str(picture))
        failed = await asyncio.to_thread(run, s.url, "dense")
    assert shown.exit_code == 0
    assert "moe: 2 layers of 4 experts, 1 per token; 100 tokens sampled" in shown.output
    assert json.loads(whole.output)["tokens"] == 100
    assert picture.stat().st_size > 1000
    assert isinstance(failed.exception, CoeError)
    assert "is not a mixture of experts" in failed.exception.message
