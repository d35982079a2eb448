"""A real engine of idle experts ends with all of its memory, and the next one answers alike."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from loadtests.lib.machine_load import descendants
from service.engine.vllm.swapping_engine import Canary
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.idle_unload import IdlePolicy
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.types import Residency
from tests.support.engine.real_engines import BASE, ENVIRONMENT, Swapping, ask_one, demo
from tests.support.polling import until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
]
_NAMES = ("base", "intents")


def _children_mib() -> float:
    """Proportional memory of the processes that this one has started."""
    total = 0
    for pid in set(descendants(os.getpid())) - {os.getpid()}:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


async def test_idle_engine_gives_all_of_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    before = _children_mib()
    canaries: dict[str, Canary] = {}
    slot = SharedSlot(
        tuple(Unit(name, (name,)) for name in _NAMES),
        lambda first: Swapping(first, demo(), canaries),
        SwapPolicy(0.0, prefetch=False),
        capacity=8,
        max_waiting=8,
        start_guess_s=30.0,
        guess=UnitState(host_bytes=1024**3, fill_s=2.0, swap_s=0.05),
        changed=lambda: None,
    )

    async def through(expert: str) -> str:
        async with slot.lease(expert) as lease:
            return await ask_one(lease.engine, expert)

    supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
    try:
        said = {name: await through(name) for name in _NAMES}
        held = _children_mib() - before
        # 135 million parameters of 4 bytes, of two experts, and the engine's process.
        assert held > 1000
        slot.idle_policy = IdlePolicy(dict.fromkeys(_NAMES, 1.0))
        await until(lambda: slot.resting, "the slot rests", timeout_s=20)
        assert not await slot.release()  # once the process has ended
        left = _children_mib() - before
        print(f"{held:.0f} MiB in the engine's processes, {left:.0f} MiB after the unload")
        assert left < held / 50
        states = slot.states()
        assert {state.state for state in states.values()} == {Residency.DISK}
        # The time to come back is the measured start.
        assert all(state.eta_s >= 1 and state.released for state in states.values())
        slot.idle_policy = IdlePolicy()
        assert {name: await through(name) for name in reversed(_NAMES)} == said
        assert slot.swap_counts()["intents", "respawn", "idle"] == 1
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
