"""Virtual experts in a slot: base weights are held once and while they are in use."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import SimulatedOptions
from service.engine.engine_interface import (
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    Send,
    SwapResult,
)
from service.engine.simulated_engine import SimulatedEngine
from service.errors import CoeError, ConflictError, ExpertFailedError
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from tests.support.fake_clock_loop import FastTime
from tests.support.shared_slot_simulation import on_clock

SIZE = 10
NEEDS = {"a1": "a", "a2": "a", "b1": "b"}
FULL = ("a", "b", "c")
NAMES = (*FULL, *NEEDS)
UNITS = tuple(Unit(name, (name,), needs=NEEDS.get(name)) for name in NAMES)


class Engine(SimulatedEngine):
    """Tells when weights are held twice or missing, or a request meets another's."""

    def __init__(self, first: str, bound: int | None, wrong: list[str], chance: Any) -> None:
        options = SimulatedOptions(load_s=0.05, fill_s=0.05, swap_s=0.01, decode_ms=5)
        super().__init__(NAMES, options, bases=NEEDS)
        self.bound, self.wrong, self.chance = bound, wrong, chance
        self.first = self.now = first
        self.held = {first}

    async def start(self) -> EngineReport:
        if self.first in NEEDS:
            self.wrong.append(f"started with {self.first}")
        return await super().start()

    def _must(self, fine: bool, what: str) -> None:
        if not fine:
            self.wrong.append(what)

    async def load_to_host(self, expert: str) -> LoadResult:
        base = NEEDS.get(expert)
        self._must(base is None or base in self.held, f"{expert} without {base}")
        full = {name for name in (*self.held, expert) if name not in NEEDS}
        if self.bound is not None:
            self._must(len(full) * SIZE <= self.bound, f"{full} held")
        if self.chance.random() < 0.05:
            raise ExpertFailedError("told to fail")
        await super().load_to_host(expert)
        self.held.add(expert)
        return LoadResult(3 if base else SIZE, 0.05)

    async def swap_in(self, expert: str) -> SwapResult:
        self._must(self._running == 0, "exchanged under requests")
        self._must(NEEDS.get(expert, expert) in self.held, f"{expert} without its base")
        if self.chance.random() < 0.05:
            raise ExpertFailedError("told to fail")
        done = await super().swap_in(expert)
        same = NEEDS.get(self.now, self.now) == NEEDS.get(expert, expert)
        self._must(done.method == ("steer" if same else "inplace"), f"{done.method} to {expert}")
        self.now = expert
        return done

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        kept = [name for name in self.held if NEEDS.get(name) == expert]
        self._must(not kept, f"{expert} dropped under {kept}")
        self._must(expert != self.now, f"{expert} dropped while it ran")
        self.held.discard(expert)
        await super().evict(expert, for_next=for_next)

    async def run(self, request: EngineRequest, send: Send) -> None:
        self._must(request.expert == self.now, f"{request.expert} met {self.now}")
        await super().run(request, send)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 10, 20, 30]))
def test_virtual_expert_slot_holds_base_weights_once_while_they_are_used(
    seed: int, bound: int | None
) -> None:
    asyncio.run(_story(random.Random(seed), bound))


async def _story(chance: random.Random, bound: int | None) -> None:
    clock = FastTime(asyncio.get_running_loop())
    wrong: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        on_clock(patch, lambda: clock.now_s)
        slot = SharedSlot(
            UNITS,
            lambda first: Engine(first, bound, wrong, chance),
            SwapPolicy(min_stay_s=0.02, max_wait_s=2.0, host_bytes=bound, prefetch=True),
            capacity=2,
            max_waiting=50,
            start_guess_s=0.05,
            guess=UnitState(host_bytes=SIZE, fill_s=0.05, swap_s=0.01),
            changed=lambda: None,
        )
        supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
        ended: list[str] = []

        async def ask(expert: str) -> None:
            body = orjson.dumps({"prompt": "x", "max_tokens": 2})
            sent: list[Message] = []

            async def send(message: Message) -> None:
                sent.append(message)

            try:
                async with slot.lease(expert) as lease:
                    request = EngineRequest("/v1/completions", expert, body, "r")
                    await lease.engine.run(request, send)
            except CoeError as error:
                ended.append(error.code)
                return
            ended.append("ok" if f'"{expert}:'.encode() in sent[-1]["body"] else repr(sent))

        asking = []
        for _ in range(60):
            asking.append(asyncio.create_task(ask(chance.choice(NAMES))))
            await asyncio.sleep(chance.choice((0, 0, 0.01, 0.1, 0.4)))
            if chance.random() < 0.1:
                with contextlib.suppress(ConflictError):
                    await slot.operate("evict", chance.choice(NAMES))
        async with asyncio.timeout(300):
            await asyncio.gather(*asking)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
    assert wrong == []
    assert len(ended) == 60
    assert set(ended) <= {"ok", "expert_failed"}
    # A unit that failed is left alone for a while, and so are those who ask for it.
    assert ended.count("ok") > 5
