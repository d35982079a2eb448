"""A slot under random arrivals, disconnects and engine deaths leaks nothing and never hangs."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import SimulatedOptions
from service.engine.engine_interface import EngineRequest, Message
from service.engine.simulated_engine import SimulatedEngine
from service.errors import CoeError
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.rpc.snapshot import Queue
from tests.support.fake_clock_loop import FastTime
from tests.support.garbage import collected
from tests.support.slot_events import Arrive, Kill, Leave, Turn

EXPERTS = ("base", "tuned")
CAPACITY = 2
MAX_WAITING = 3


events = st.lists(
    st.builds(Arrive, st.sampled_from(EXPERTS), st.integers(1, 4))
    | st.builds(Leave, st.integers(0, 20))
    | st.builds(Kill)
    | st.builds(Turn, st.integers(1, 20)),
    max_size=30,
)


class Story:
    """One slot, and everything that happens to it."""

    def __init__(self, fails_to_load: bool) -> None:
        self.engines: list[SimulatedEngine] = []
        self.fails_to_load = fails_to_load
        self.running = 0
        self.most_running = 0
        self.slot = DedicatedSlot(
            EXPERTS,
            self.build,
            capacity=CAPACITY,
            max_waiting=MAX_WAITING,
            start_guess_s=0.1,
            changed=lambda: None,
        )
        self.clients: list[asyncio.Task[str]] = []

    def build(self) -> SimulatedEngine:
        first = not self.engines
        fail = "load" if self.fails_to_load and first else "none"
        options = SimulatedOptions(load_s=0.05, decode_ms=10, tokens=2, fail=fail)
        self.engines.append(SimulatedEngine(EXPERTS, options))
        return self.engines[-1]

    async def client(self, event: Arrive) -> str:
        body = orjson.dumps({"prompt": "x", "max_tokens": event.tokens, "stream": True})
        request = EngineRequest("/v1/completions", event.expert, body, "r")
        ended: list[bool] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                ended.append(not message.get("more_body", False))

        try:
            async with self.slot.lease(event.expert) as lease:
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    await lease.engine.run(request, send)
                finally:
                    self.running -= 1
        except CoeError as error:
            self.slot.report_engine_death()
            return error.code
        assert ended[-1]
        assert sum(ended) == 1
        return "ok"

    async def tell(self, story: list[Any]) -> list[str | BaseException]:
        supervisor = asyncio.create_task(self.slot.supervise(asyncio.Lock()))
        for event in story:
            match event:
                case Arrive():
                    self.clients.append(asyncio.create_task(self.client(event)))
                case Leave(which) if self.clients:
                    self.clients[which % len(self.clients)].cancel()
                case Kill() if self.engines:
                    self.engines[-1].kill("a test killed it")
                case Turn(times):
                    for _ in range(times):
                        await asyncio.sleep(0.005)
        outcomes = await asyncio.gather(*self.clients, return_exceptions=True)
        await self.slot.drain(1)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        return outcomes


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(events, st.booleans())
def test_slot_under_random_events_every_lease_ends_once_and_nothing_leaks(
    story: list[Any], fails_to_load: bool
) -> None:
    result = Story(fails_to_load)
    complaints: list[dict[str, Any]] = []

    async def whole() -> list[str | BaseException]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        FastTime(loop)
        outcomes = await result.tell(story)
        for engine in result.engines:
            assert await engine.in_flight() == 0
            assert engine.failure() is not None, "an engine was left running"
        assert len(asyncio.all_tasks()) == 1
        return outcomes

    with collected():
        outcomes = asyncio.run(whole())
    assert complaints == []
    known = {"ok", "engine_dead", "engine_restarting", "over_capacity", "expert_failed"}
    unforeseen = [
        o for o in outcomes if not isinstance(o, asyncio.CancelledError) and o not in known
    ]
    assert unforeseen == []
    assert result.running == 0
    assert result.most_running <= CAPACITY
    assert all(queue == Queue(0, 0) for queue in result.slot.queues().values())
