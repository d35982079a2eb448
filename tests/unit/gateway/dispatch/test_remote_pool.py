"""The limits of a remote expert: bounded, fair between tenants, and always released."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from service.engine.engine_interface import EngineRequest
from service.errors import OverCapacityError
from service.gateway.dispatch.remote_pool import RemotePool
from service.types import Tenant
from tests.support.polling import until

A, B = Tenant("a"), Tenant("b")


class Held:
    """An endpoint that answers when told to, and remembers who came."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.go = asyncio.Event()

    async def run(self, request: EngineRequest, send: Any) -> None:
        self.came.append(request.request_id)
        await self.go.wait()


def ask(seat: RemotePool, name: str, tenant: Tenant) -> asyncio.Task[None]:
    request = EngineRequest("/v1/completions", "far", b"{}", name)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    return asyncio.create_task(seat.run(request, send, None, tenant))


async def test_run_queued_requests_of_tenants_take_turns() -> None:
    engine = Held()
    seat = RemotePool(engine, 1, 100)  # type: ignore[arg-type]
    tasks = [ask(seat, f"a{i}", A) for i in range(10)]
    await until(lambda: seat.waiting == 9, "nine wait")
    tasks += [ask(seat, f"b{i}", B) for i in range(2)]
    await until(lambda: seat.waiting == 11, "two more wait")
    engine.go.set()
    await asyncio.gather(*tasks)
    assert engine.came[:5] == ["a0", "b0", "a1", "b1", "a2"]
    assert (seat.waiting, seat.running) == (0, 0)


async def test_run_full_queue_sheds_the_heaviest_tenant_and_cancelled_requests_free_places() -> (
    None
):
    engine = Held()
    seat = RemotePool(engine, 1, 3)  # type: ignore[arg-type]
    tasks = [ask(seat, f"a{i}", A) for i in range(4)]
    await until(lambda: seat.waiting == 3, "the queue is full")
    with pytest.raises(OverCapacityError, match="expert 'far' has 3 requests waiting"):
        await ask(seat, "a4", A)
    tasks.append(ask(seat, "b0", B))
    with pytest.raises(OverCapacityError):
        await tasks[3]
    assert seat.waiting == 3
    for task in (tasks[0], tasks[1]):
        task.cancel()
    await asyncio.gather(tasks[0], tasks[1], return_exceptions=True)
    engine.go.set()
    await asyncio.gather(tasks[2], tasks[4])
    assert (seat.waiting, seat.running) == (0, 0)


async def test_run_without_a_queue_refuses_beyond_the_limit() -> None:
    engine = Held()
    seat = RemotePool(engine, 2, 0)  # type: ignore[arg-type]
    tasks = [ask(seat, str(i), A) for i in range(2)]
    await until(lambda: seat.running == 2, "both have a place")
    with pytest.raises(OverCapacityError):
        await ask(seat, "2", B)
    engine.go.set()
    await asyncio.gather(*tasks)
    await ask(seat, "3", A)


@pytest.mark.parametrize("wait_s", [0.0, 0.02])
async def test_speed_of_a_stream_that_its_client_reads_slowly_is_not_learnt(wait_s: float) -> None:
    class Streams:
        async def run(self, request: EngineRequest, send: Any) -> None:
            head = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            for i in range(8):
                await asyncio.sleep(0.005)
                await send({"type": "http.response.body", "body": b"x", "more_body": i < 7})

    async def read(_: Any) -> None:
        if wait_s:
            await asyncio.sleep(wait_s)

    seat = RemotePool(Streams(), 1, 1)  # type: ignore[arg-type]
    await seat.run(EngineRequest("/v1/completions", "far", b"{}", "a"), read, None, A)
    learnt = seat.latency.usual.speed(time.monotonic()).chunk_s
    assert (learnt > 0) == (wait_s == 0)
