"""One scrape target per node: processes find each other, and one answers for all."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from service.rpc.local_paths import node_folder
from service.telemetry import node_scrape_target
from service.telemetry.node_scrape_target import NodeTarget
from tests.support.polling import until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def target(folder: Path, name: str, port: int | None = None) -> AsyncIterator[NodeTarget]:
    async def text() -> str:
        return f'# HELP up_now Up.\n# TYPE up_now gauge\nup_now{{process="{name}"}} 1.0\n'

    made = NodeTarget(folder, name, text, host="127.0.0.1", port=port)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def ask(port: int) -> set[str]:
    """The processes that a node's port tells of; none where nobody listens."""
    try:
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"http://127.0.0.1:{port}/metrics") as reply,
        ):
            assert reply.status == 200
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
            text = await reply.text()
    except aiohttp.ClientConnectorError:
        return set()
    assert text.count("# TYPE up_now") == 1
    return {line.split('"')[1] for line in text.splitlines() if line.startswith("up_now")}


async def test_node_target_process_with_the_port_answers_for_all_until_it_ends(
    tmp_path: Path,
) -> None:
    folder, port = tmp_path / "node", free_port()
    async with target(folder, "gateway-2", port) as second:
        async with target(folder, "gateway-1", port), target(folder, "pool-cpu-1", port):
            everybody = {"gateway-1", "gateway-2", "pool-cpu-1"}
            await until(lambda: port_tells(port, everybody), "the port tells of everybody")
            assert len(await second.others("gateway-")) == 1
            assert len(await second.others()) == 2
            # The one that has the port goes first.
            await second.stop()
            left = {"gateway-1", "pool-cpu-1"}
            await until(lambda: port_tells(port, left), "another has taken the port")
        assert not folder.exists()


async def port_tells(port: int, names: set[str]) -> bool:
    return await ask(port) == names


async def test_node_target_socket_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    async with target(folder, "gateway-1") as living:
        dead = folder / "pool-cpu-1.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(dead))
        assert await living.others() == []
        # A young one may belong to a process that is about to listen.
        assert dead.exists()
        os.utime(dead, (time.time() - 60, time.time() - 60))
        assert await living.others() == []
        assert not dead.exists()


async def test_node_target_folder_open_to_others_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)
    async with target(folder, "gateway-1") as alone:
        assert list(folder.iterdir()) == []
        assert "up_now" in await alone.whole()
    assert "cannot register on the node metrics socket" in caplog.text


def test_node_folder_name_does_not_reveal_the_secret() -> None:
    folder = node_folder("secret")
    assert "secret" not in folder.name
    assert folder == node_folder("secret") != node_folder("another")


async def test_node_target_waiting_for_the_port_holds_no_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[web.TCPSite] = []

    class Site(web.TCPSite):
        async def start(self) -> None:
            tried.append(self)
            await super().start()

    monkeypatch.setattr(web, "TCPSite", Site)
    monkeypatch.setattr(node_scrape_target, "_RETRY_S", 0.001)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with target(tmp_path / "node", "gateway-1", taken.getsockname()[1]) as waiting:
            await until(lambda: len(tried) > 20, "it has tried again and again")
            assert sum(len(runner.sites) for runner in waiting._runners) <= 2
