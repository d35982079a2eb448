"""Units that move between the slots of one pool, under random arrivals and faults."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.engine_interface import Message
from service.errors import CoeError
from service.pool.pool import Pool
from service.pool.slot_units import UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.rpc.call_headers import Call
from tests.support.fake_clock_loop import FastTime
from tests.support.shared_slot_simulation import (
    EXPERTS,
    FILL_S,
    LOAD_S,
    SIZE,
    STAY_S,
    STEP_MS,
    SWAP_S,
    UNITS,
    WAIT_S,
    FaultyEngine,
    World,
    on_clock,
)

_ROUGH = ("ok", "engine_dead", "engine_restarting", "expert_failed")

_calls = itertools.count()


@dataclass
class Fleet:
    """A pool of two slots, each with half of the units at first."""

    pool: Pool
    slots: list[SharedSlot]
    worlds: list[World]

    @classmethod
    def build(cls, bound: int | None, preempt: bool) -> Fleet:
        worlds = [World(bound, lambda: 0.0) for _ in range(2)]
        for world in worlds:
            world.together = worlds
        pool = Pool("cpu")
        slots = []
        for i, world in enumerate(worlds):
            slot = SharedSlot(
                UNITS[i::2],
                partial(FaultyEngine, world=world),
                SwapPolicy(STAY_S, WAIT_S, host_bytes=bound, preempt=preempt),
                capacity=2,
                max_waiting=50,
                start_guess_s=LOAD_S,
                guess=UnitState(host_bytes=SIZE, fill_s=FILL_S, swap_s=SWAP_S),
                changed=pool.changed,
            )
            pool.add(slot)
            slots.append(slot)
        return cls(pool, slots, worlds)

    async def ask(self, expert: str, tokens: int, stream: bool) -> str:
        body = orjson.dumps({"prompt": "x", "max_tokens": tokens, "stream": stream})
        call = Call("/v1/completions", expert, f"r{next(_calls)}", 10**7, stream, "g", 1)
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            await self.pool.run(call, body, send)
        except CoeError as error:
            return error.code
        starts = sum(m["type"] == "http.response.start" for m in sent)
        ends = sum(m["type"] == "http.response.body" and not m.get("more_body") for m in sent)
        whole = b"".join(m.get("body", b"") for m in sent)
        if b'"error"' not in whole and (starts, ends) != (1, 1):
            self.worlds[0].wrong.append(f"{starts} starts and {ends} ends of one answer")
        if b'"error"' not in whole and f'"{expert}:'.encode() not in whole:
            self.worlds[0].wrong.append(f"{expert} was answered {whole[:200]!r}")
        return "ok"

    def check(self) -> None:
        """Every unit is in exactly one slot, and the pool knows in which."""
        names = sorted(unit.name for slot in self.slots for unit in slot.units)
        assert names == ["a", "b", "c", "d"]
        snapshot = self.pool.snapshot()
        assert set(snapshot.experts) == set(EXPERTS)
        for i, slot in enumerate(self.slots):
            assert all(snapshot.experts[name].slot == i for name in slot.experts)


def play(fleet_of: tuple[int | None, bool], act: Any) -> Fleet:
    fleets: list[Fleet] = []

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            fleet = Fleet.build(*fleet_of)
            fleets.append(fleet)
            fleet.pool.start()
            await act(fleet)
            await fleet.pool.stop(1)
        for world in fleet.worlds:
            assert all(engine.failure() is not None for engine in world.engines)
            assert [await engine.in_flight() for engine in world.engines] == [0] * len(
                world.engines
            )
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(whole())
    fleet = fleets[0]
    assert [world.wrong for world in fleet.worlds] == [[], []]
    return fleet


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    # Of both slots together.
    st.sampled_from([None, 2 * SIZE, 3 * SIZE, 4 * SIZE]),
    st.booleans(),
    st.booleans(),
)
def test_placement_under_random_events_every_request_ends_once(
    seed: int, bound: int | None, preempt: bool, rough: bool
) -> None:
    chance = random.Random(seed)
    hot = chance.sample(EXPERTS, 2)

    async def act(fleet: Fleet) -> None:
        requests = []
        for _ in range(80):
            expert = chance.choice(hot) if chance.random() < 0.7 else chance.choice(EXPERTS)
            kind = chance.random()
            if kind < 0.5:
                ask = fleet.ask(expert, chance.randint(1, 8), chance.random() < 0.5)
                requests.append(asyncio.create_task(ask))
            elif kind < 0.55 and requests:
                chance.choice(requests).cancel()
            elif kind < 0.6 and rough:
                world = chance.choice(fleet.worlds)
                world.armed[chance.choice(["fill", "exchange"])] = chance.choice(["fail", "die"])
            else:
                for _ in range(chance.choice([1, 4, 10, 60])):
                    await asyncio.sleep(0.01)
                    fleet.check()
        async with asyncio.timeout(600):
            ended = await asyncio.gather(*requests, return_exceptions=True)
        strange = [
            item
            for item in ended
            if not isinstance(item, asyncio.CancelledError)
            and item not in (_ROUGH if rough else ("ok",))
        ]
        assert strange == []

    play((bound, preempt), act)


def test_placement_two_busy_units_of_one_slot_are_separated() -> None:
    """Start b and d in the second slot; nobody requests c, in the first."""

    async def act(fleet: Fleet) -> None:
        async def client(expert: str) -> None:
            for _ in range(40):
                assert await fleet.ask(expert, 8, stream=True) == "ok"

        await asyncio.gather(*(client(expert) for expert in ("b", "d") for _ in range(3)))
        fleet.check()
        assert {slot.running_unit for slot in fleet.slots} == {"b", "d"}
        swaps = sum(sum(slot.swap_counts().values()) for slot in fleet.slots)
        # Apart they need not take turns: 240 answers, and a few swaps until they were.
        assert swaps < 20

    play((None, False), act)


def test_placement_constant_demand_settles() -> None:
    async def act(fleet: Fleet) -> None:
        async def client(expert: str) -> None:
            for _ in range(60):
                await fleet.ask(expert, 2, stream=True)
                await asyncio.sleep(0.05 * STEP_MS / 10)

        await asyncio.gather(*(client(expert) for expert in ("b", "c", "d")))
        before = [{unit.name for unit in slot.units} for slot in fleet.slots]
        await asyncio.gather(*(client(expert) for expert in ("b", "c", "d")))
        after = [{unit.name for unit in slot.units} for slot in fleet.slots]
        assert before == after

    play((None, False), act)
