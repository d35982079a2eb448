"""How replicas tell the end of the service from their own removal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.deployment.service_stop_signal import EndableApp, EndOfService
from tests.support.fake_clock_loop import FastTime


async def test_wait_for_requests_ends_with_the_last_request(tmp_path: Path) -> None:
    left = iter([2, 1, 0])
    async with asyncio.timeout(60):
        await EndOfService(tmp_path / "secret").wait_for_requests(lambda: next(left), 60)


async def test_wait_for_requests_ends_in_time(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        await EndOfService(tmp_path / "secret").wait_for_requests(lambda: 1, 0.1)


async def test_wait_for_requests_ends_when_the_service_stops(tmp_path: Path) -> None:
    here, there = EndOfService(tmp_path / "secret"), EndOfService(tmp_path / "secret")
    waiting = asyncio.create_task(here.wait_for_requests(lambda: 1, 60))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert not here.announced
    there.announce()
    async with asyncio.timeout(60):
        await waiting


async def test_endable_app_ends_requests_after_the_drain_time(tmp_path: Path) -> None:
    seen: list[str] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        if scope["type"] == "http":
            await asyncio.sleep(scope["takes_s"])
            seen.append("answered")

    FastTime(asyncio.get_running_loop())
    app, end = EndableApp(answer), EndOfService(tmp_path / "secret")
    await app({"type": "lifespan"}, None, None)
    ending = asyncio.create_task(app.end_after(end, 0.2))
    short = asyncio.create_task(app({"type": "http", "takes_s": 0.1}, None, None))
    long = asyncio.create_task(app({"type": "http", "takes_s": 60}, None, None))
    end.announce()
    async with asyncio.timeout(60):
        await ending
        await short
        with pytest.raises(asyncio.CancelledError):
            await long
    assert seen == ["lifespan", "http", "http", "answered"]
