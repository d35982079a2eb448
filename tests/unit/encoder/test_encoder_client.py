"""The gateway's side of the encoder, with real worker processes of a tiny model."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.encoder import encoder_client
from service.encoder.encoder_client import (
    EncoderClient,
    EncoderSettings,
    EncoderUnavailableError,
)
from service.encoder.onnx_encoder import OnnxEncoder
from service.encoder.shared_encoders import SharedEncoders
from tests.support.fake_clock_loop import FastTime
from tests.support.tiny_encoder import make_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[EncoderClient]:
    client = EncoderClient(EncoderSettings(folder, cache_entries=3, timeout_s=5.0))
    client.start()
    assert await client.wait_ready(120)
    yield client
    await client.close()


def worker_pid() -> int:
    """The only child of this process that runs the worker."""
    mine = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    for pid in Path(mine).read_text().split():
        if b"encoder_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise AssertionError("no worker runs")


async def test_embed_many_at_once_equals_the_encoder(client: EncoderClient, folder: Path) -> None:
    texts = [f"court {'lasagna ' * i}\ud800" for i in range(20)]
    found = await asyncio.gather(*(client.embed(text) for text in texts))
    np.testing.assert_allclose(np.stack(found), OnnxEncoder(folder).encode(texts), atol=1e-5)
    assert (await client.embed_all(texts)).shape == (20, client.dims)


async def test_embed_known_text_needs_no_worker_and_is_kept_for_each_tenant(
    client: EncoderClient,
) -> None:
    first = await client.embed("court", "a")
    await client.close()
    client.dims = 0
    np.testing.assert_array_equal(await client.embed("court", "a"), first)
    with pytest.raises(EncoderUnavailableError):
        await client.embed("court", "b")


async def test_cache_keeps_the_newest_entries_only(client: EncoderClient) -> None:
    for text in ("court", "judge", "court", "oven", "bug"):
        await client.embed(text)
    assert len(client._cache) == 3
    await client.close()
    client.dims = 0
    await client.embed("court")
    with pytest.raises(EncoderUnavailableError):
        await client.embed("judge")


async def test_embed_of_a_stopped_worker_waits_no_longer_than_the_limit_and_then_pauses(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = EncoderClient(EncoderSettings(folder, timeout_s=0.05))
    client.start()
    assert await client.wait_ready(120)
    os.kill(worker_pid(), signal.SIGSTOP)
    try:
        reasons = []
        for i in range(6):
            began_s = time.monotonic()
            with pytest.raises(EncoderUnavailableError) as caught:
                await client.embed(f"court {i}")
            assert time.monotonic() - began_s < 20, "it would never answer"
            reasons.append(caught.value.reason)
        assert reasons == ["slow"] * 5 + ["paused"]
        assert caplog.text.count("too slow") == 1
    finally:
        await client.close()


async def test_embed_of_a_slow_worker_pauses_for_the_tenant_that_asked(folder: Path) -> None:
    client = EncoderClient(EncoderSettings(folder, timeout_s=0.02))
    client.start()
    assert await client.wait_ready(120)
    os.kill(worker_pid(), signal.SIGSTOP)
    try:
        reasons = [await reason_of(client, f"court {i}", "one") for i in range(6)]
        assert reasons == ["slow"] * 5 + ["paused"]
        assert await reason_of(client, "court", "other") == "slow"
    finally:
        await client.close()


async def test_embed_behind_other_texts_is_not_the_worker_s_slowness() -> None:
    now_s = 0.0
    client = EncoderClient(EncoderSettings(Path("/x"), timeout_s=0.001), clock=lambda: now_s)
    client.dims = 4
    # No batch runs: the worker has not been given them yet.
    reasons = [await reason_of(client, f"text {i}", "one") for i in range(12)]
    assert set(reasons) == {"slow"}
    # A batch of 16 texts runs, and takes less than the limit for each.
    client._running = (0.0, 16)
    now_s = 0.010
    assert [await reason_of(client, f"more {i}", "one") for i in range(12)] == ["slow"] * 12
    # One text alone takes longer.
    client._running = (0.0, 1)
    reasons = [await reason_of(client, f"again {i}", "one") for i in range(6)]
    assert reasons == ["slow"] * 5 + ["paused"]
    now_s += 4.9
    assert await reason_of(client, "text", "one") == "paused"
    now_s += 0.2
    assert await reason_of(client, "text", "one") == "slow"


async def reason_of(client: EncoderClient, text: str, tenant: str) -> str:
    with pytest.raises(EncoderUnavailableError) as caught:
        await client.embed(text, tenant)
    return caught.value.reason


async def test_queue_of_one_tenant_leaves_room_and_turns_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_client, "_MAX_WAITING", 8)
    client = EncoderClient(EncoderSettings(Path("/x"), timeout_s=60))
    client.dims = 4
    many = [asyncio.create_task(client.embed(f"many {i}", "many")) for i in range(9)]
    few = [asyncio.create_task(client.embed(f"few {i}", "few")) for i in range(5)]
    await asyncio.sleep(0.01)
    # Each has half of the places; the newest of the first one gave way.
    refused = [task.done() for task in (*many, *few)]
    assert refused == [False] * 4 + [True] * 5 + [False] * 4 + [True]
    assert len(client._queue) == 8
    texts = [one.text for one in client._queue.take(5)]
    assert texts == ["many 0", "few 0", "many 1", "few 1", "many 2"]
    assert [one.text for one in client._queue.take(9)] == ["few 2", "many 3", "few 3"]
    assert not len(client._queue)
    for task in (*many, *few):
        task.cancel()
    found = await asyncio.gather(*many, *few, return_exceptions=True)
    assert {getattr(e, "reason", None) for e in found} == {"busy", None}


async def test_text_whose_requests_have_gone_on_leaves_the_queue() -> None:
    FastTime(asyncio.get_running_loop())
    client = EncoderClient(EncoderSettings(Path("/x"), timeout_s=0.05))
    client.dims = 4
    late = [asyncio.create_task(client.embed("same", "one")) for _ in range(2)]
    await asyncio.sleep(0.01)
    patient = asyncio.create_task(client.embed("other", "one"))
    late[0].cancel()
    await asyncio.gather(late[0], return_exceptions=True)
    assert len(client._queue) == 2, "one request still waits for it"
    found = await asyncio.gather(*late, return_exceptions=True)
    assert [getattr(e, "reason", None) for e in found] == [None, "slow"]
    assert [one.text for one in client._queue.take(9)] == ["other"]
    patient.cancel()
    assert not client._pending.keys() - {client._key("other", "one")}


async def test_batches_take_half_of_the_limit() -> None:
    client = EncoderClient(EncoderSettings(Path("/x"), timeout_s=0.05))
    sizes = []
    for client._text_s in (0.0, 0.0001, 0.005, 0.01, 3.0):
        sizes.append(client._batch_size())
    assert sizes == [16, 16, 5, 2, 1]


async def test_embed_beyond_the_queue_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_client, "_MAX_WAITING", 4)
    client = EncoderClient(EncoderSettings(folder, timeout_s=0.5))
    client.start()
    assert await client.wait_ready(120)
    os.kill(worker_pid(), signal.SIGSTOP)
    try:
        found = await asyncio.gather(
            *(client.embed(f"court {i}") for i in range(30)), return_exceptions=True
        )
        reasons = [e.reason for e in found if isinstance(e, EncoderUnavailableError)]
        assert len(reasons) == 30
        assert set(reasons) == {"slow", "busy"}
    finally:
        await client.close()


async def test_worker_that_dies_is_started_again(client: EncoderClient) -> None:
    await client.embed("court")
    os.kill(worker_pid(), signal.SIGKILL)
    outcomes: list[str] = []
    for i in range(1000):
        try:
            await client.embed(f"judge {i}")
            outcomes.append("ok")
        except EncoderUnavailableError as error:
            outcomes.append(error.reason)
        if "failed" in outcomes and outcomes[-1] == "ok":
            break
        await asyncio.sleep(0.02)
    assert outcomes[-1] == "ok"
    assert "failed" in outcomes
    assert client.problem is None


async def test_unusable_folder_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = asyncio.sleep
    naps: list[float] = []

    async def nap(seconds: float, *rest: Any) -> None:
        naps.append(seconds)
        await real(0)

    monkeypatch.setattr(encoder_client.asyncio, "sleep", nap)
    client = EncoderClient(EncoderSettings(tmp_path))
    with caplog.at_level(logging.ERROR):
        client.start()
        async with asyncio.timeout(60):
            while len(naps) < 2:
                await real(0.02)
        with pytest.raises(EncoderUnavailableError, match="failed"):
            await client.embed("court")
        await client.close()
    assert caplog.text.count("no ONNX model") == 1
    assert naps[:2] == [1.0, 2.0]


async def test_shared_encoders_run_one_worker_until_the_last_release(folder: Path) -> None:
    encoders = SharedEncoders()
    settings = EncoderSettings(folder)
    first, second = encoders.acquire(settings), encoders.acquire(EncoderSettings(folder))
    other = encoders.acquire(EncoderSettings(folder, threads=2))
    assert first is second
    assert other is not first
    await encoders.release(first)
    assert await second.wait_ready(120)
    await encoders.release(second)
    await encoders.release(other)
    assert encoders.acquire(settings) is not first
    await encoders.release(encoders._clients[settings])
