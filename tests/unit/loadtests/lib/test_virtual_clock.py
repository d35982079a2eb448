"""The virtual clock runs asyncio code without waiting, and gives the real clock back."""

from __future__ import annotations

import asyncio
import time

import pytest

from loadtests.lib.virtual_clock import StandstillError, run_on_virtual_clock


def test_virtual_clock_lets_hours_pass_in_the_order_of_the_timers() -> None:
    seen: list[tuple[str, float]] = []

    async def after(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        seen.append((name, time.monotonic()))

    async def main() -> float:
        await asyncio.gather(after("b", 7200.0), after("a", 3600.5), after("c", 7200.0))
        return asyncio.get_running_loop().time()

    assert run_on_virtual_clock(main()) == pytest.approx(7200)
    assert [name for name, _ in seen] == ["a", "b", "c"]
    assert [at_s for _, at_s in seen] == pytest.approx([3600.5, 7200, 7200])


def test_virtual_clock_gives_the_real_one_back_after_an_error() -> None:
    real = time.monotonic

    async def fails() -> None:
        assert time.monotonic is not real
        raise KeyError("told to")

    with pytest.raises(KeyError):
        run_on_virtual_clock(fails())
    assert time.monotonic is real


def test_virtual_clock_where_everybody_waits_raises() -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StandstillError):
        run_on_virtual_clock(waits())


def test_virtual_clock_cancels_the_tasks_that_are_left() -> None:
    ended: list[float] = []

    async def for_ever() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append(time.monotonic())

    async def main() -> None:
        main.left = asyncio.create_task(for_ever())  # type: ignore[attr-defined]
        await asyncio.sleep(10.5)

    run_on_virtual_clock(main())
    assert ended == [pytest.approx(10.5)]
