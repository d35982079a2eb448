"""What gateways know of a pool is what the pool would tell now, and it is computed once for all."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.fleet.modelled_engine import ENDPOINT, EngineCosts, FirstToken
from loadtests.fleet.simulated_pools import SimulatedPool
from loadtests.lib.virtual_clock import run_on_virtual_clock
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.rpc.call_headers import Call
from service.rpc.snapshot import HEARTBEAT_S, Snapshot, decode

EXPERTS = tuple("abcde")
COSTS = EngineCosts(swap_s=0.3, fill_s=1.0, unit_bytes=1, capacity=3)
POLICY = SwapPolicy(host_bytes=3, min_stay_s=0.2, max_wait_s=6.0)

requests = st.lists(
    st.tuples(st.floats(0, 8), st.sampled_from(EXPERTS), st.integers(1, 60)),
    min_size=1,
    max_size=25,
)


async def answer(
    pool: SimulatedPool, firsts: dict[str, FirstToken], number: int, expert: str, tokens: int
) -> float:
    """Ask, and return when the answer came."""
    request_id = f"r{number}"
    firsts[request_id] = FirstToken()
    call = Call(ENDPOINT, expert, request_id, 100_000, False, "g", number + 1, prompt_tokens=9)
    await pool.run(call, b"9 %d" % tokens)
    return time.monotonic()


async def play(asked: list[tuple[float, str, int]]) -> tuple[list[float], list[object]]:
    """When each request was answered, and the swaps."""
    firsts: dict[str, FirstToken] = {}
    pool = SimulatedPool("kind", "boot", EXPERTS, COSTS, POLICY, firsts)

    async def later(number: int, at_s: float, expert: str, tokens: int) -> float:
        await asyncio.sleep(at_s)
        return await answer(pool, firsts, number, expert, tokens)

    ended = await asyncio.gather(*(later(i, *one) for i, one in enumerate(asked)))
    await asyncio.sleep(5)
    swaps: list[object] = [*pool.slot.swaps, pool.slot.held_bytes()]
    await pool.stop(0)
    return ended, swaps


@settings(max_examples=10, deadline=None)
@given(requests)
def test_slot_that_leaves_out_looks_decides_like_one_that_makes_them_all(
    asked: list[tuple[float, str, int]],
) -> None:
    found = run_on_virtual_clock(play(asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedSlot, "_depends_on_time", lambda self: True)
        assert run_on_virtual_clock(play(asked)) == found


def comparable(snapshot: Snapshot | None) -> Snapshot:
    """A snapshot without its number."""
    assert snapshot is not None
    return replace(snapshot, seq=0)


@settings(max_examples=10, deadline=None)
@given(requests, st.lists(st.floats(0, 5), min_size=1, max_size=4))
def test_every_gateway_knows_what_the_pool_would_tell(
    asked: list[tuple[float, str, int]], joins: list[float]
) -> None:
    async def main() -> None:
        firsts: dict[str, FirstToken] = {}
        pool = SimulatedPool("kind", "boot", EXPERTS, COSTS, POLICY, firsts)
        known: dict[int, Snapshot] = {}
        made = 0
        fresh = pool.pool.snapshot

        def counted() -> Snapshot:
            nonlocal made
            made += 1
            return fresh()

        pool.pool.snapshot = counted  # type: ignore[method-assign]

        async def follow(gateway: int, at_s: float) -> None:
            await asyncio.sleep(at_s)
            snapshot: Snapshot | None = None
            async for line in pool.pool.snapshots():
                snapshot, _ = decode(line, snapshot)
                known[gateway] = snapshot

        async def later(number: int, at_s: float, expert: str, tokens: int) -> None:
            await asyncio.sleep(at_s)
            await answer(pool, firsts, number, expert, tokens)

        followers = [asyncio.create_task(follow(i, at_s)) for i, at_s in enumerate(joins)]
        tasks = [asyncio.create_task(later(i, *one)) for i, one in enumerate(asked)]
        for _ in range(12):
            await asyncio.sleep(0.9)
            revision = pool.pool._revision
            await asyncio.sleep(HEARTBEAT_S + 0.001)
            if pool.pool._revision == revision:
                # All that has changed is with everybody, and no call was needed for it.
                now = comparable(fresh())
                for one in known.values():
                    assert comparable(one) == now
        await asyncio.gather(*tasks)
        await asyncio.sleep(2)
        made = 0
        await asyncio.sleep(10.0)
        # Nothing changes any more: once a second, for all gateways together.
        assert made <= 11
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await pool.stop(0)

    run_on_virtual_clock(main())
