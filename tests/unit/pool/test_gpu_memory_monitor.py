"""What a pool tells of its GPUs."""

from __future__ import annotations

import asyncio
import threading

from service.engine.gpu_share import GpuShare
from service.gpu_devices import GpuMemory
from service.pool.gpu_memory_monitor import FRESH_S, GpuMemoryMonitor

GIB = 1024**3


def memory(index: int, used: int) -> GpuMemory:
    return GpuMemory(index, f"GPU-{index}", "H200", 100 * GIB, used * GIB, (99 - used) * GIB)


class Driver:
    """Counts its readings; memory grows with each."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> tuple[GpuMemory, ...]:
        self.readings += 1
        return (memory(4, self.readings), memory(5, 2))


async def test_states_have_the_drivers_sizes_and_the_shares_of_engines() -> None:
    shares = {0: [GpuShare(0.2, (0,)), GpuShare(0.25, (0,), GIB)], 1: [GpuShare(0.92, (1,))]}
    monitor = GpuMemoryMonitor(Driver().read, lambda: shares)
    first, second = await monitor.states()
    assert (first.memory.index, first.reserved_bytes) == (4, 46 * GIB)
    assert (second.memory.index, second.reserved_bytes) == (5, 92 * GIB)
    assert first.to_wire() == {
        "index": 4,
        "uuid": "GPU-4",
        "name": "H200",
        "total_bytes": 100 * GIB,
        "used_bytes": GIB,
        "free_bytes": 98 * GIB,
        "reserved_bytes": 46 * GIB,
    }


async def test_states_read_the_driver_once_for_all_who_ask_within_five_seconds() -> None:
    driver, now_s = Driver(), [100.0]
    monitor = GpuMemoryMonitor(driver.read, dict, lambda: now_s[0])
    await asyncio.gather(*(monitor.states() for _ in range(10)))
    assert driver.readings == 1
    now_s[0] += FRESH_S - 0.01
    await monitor.states()
    assert driver.readings == 1
    now_s[0] += 0.02
    (first, _) = await monitor.states()
    assert driver.readings == 2
    assert first.memory.used_bytes == 2 * GIB
    assert first.reserved_bytes == 0


async def test_states_wait_for_no_driver_that_hangs_and_show_no_old_figures() -> None:
    hangs = threading.Event()
    driver, now_s = Driver(), [100.0]

    def read() -> tuple[GpuMemory, ...]:
        found = driver.read()
        if driver.readings == 2:
            hangs.wait(20)
        return found

    monitor = GpuMemoryMonitor(read, dict, lambda: now_s[0], patience_s=0.05)
    assert len(await monitor.states()) == 2
    now_s[0] += FRESH_S
    try:
        waits = [asyncio.create_task(monitor.states()) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        assert await asyncio.wait_for(asyncio.gather(*waits[1:]), 60) == [(), ()]
        now_s[0] += 3 * FRESH_S
        assert await asyncio.wait_for(monitor.states(), 60) == ()
        assert driver.readings == 2, "a second reading waits behind the first one"
    finally:
        hangs.set()
    while driver.readings == 2:
        found = await monitor.states()
        now_s[0] += FRESH_S
        await asyncio.sleep(0.01)
    assert len(found) == 2


async def test_states_survive_a_reading_that_fails() -> None:
    readings = iter([ValueError("no"), (memory(0, 1),)])
    now_s = [0.0]

    def read() -> tuple[GpuMemory, ...]:
        found = next(readings)
        if isinstance(found, Exception):
            raise found
        return found

    monitor = GpuMemoryMonitor(read, dict, lambda: now_s[0])
    assert await monitor.states() == ()
    now_s[0] += FRESH_S
    assert len(await monitor.states()) == 1
