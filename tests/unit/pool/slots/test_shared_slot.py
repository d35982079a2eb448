"""A shared slot whose units fail; tests/property tests it under random events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from service.engine.engine_interface import LoadResult
from service.errors import ConflictError
from service.pool.slots.base_slot import LeaseRevokedError
from service.types import Residency
from tests.support.fake_clock_loop import FastTime
from tests.support.polling import until
from tests.support.shared_slot_simulation import SIZE, FaultyEngine, Stage, World, on_clock


def play(world: World, act: Callable[[Stage], Awaitable[None]], **given: Any) -> Stage:
    """One act on a stage with a clock of its own."""
    stages: list[Stage] = []

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            stage = Stage(world, **{"prefetch": False, **given})
            stages.append(stage)
            supervisor = asyncio.create_task(stage.slot.supervise(asyncio.Lock()))
            try:
                async with asyncio.timeout(60):
                    await act(stage)
            finally:
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)

    asyncio.run(whole())
    assert world.wrong == []
    return stages[0]


def world(bound: int | None = None, **armed: str) -> World:
    return World(bound, lambda: 0.0, armed=armed)


def test_unit_larger_than_estimated_evicts_others_and_restarts_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill = FaultyEngine.load_to_host

    async def larger(self: FaultyEngine, expert: str) -> LoadResult:
        return LoadResult((await fill(self, expert)).host_bytes * 3, 0.1)

    monkeypatch.setattr(FaultyEngine, "load_to_host", larger)

    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        assert await stage.ask("c") == "ok"
        await asyncio.sleep(0.2)
        assert stage.world.engines[-1].held == {"c"}
        # Nothing fits beside it now.
        assert await stage.ask("b") == "ok"
        assert stage.world.engines[-1].held == {"b"}

    stage = play(world(bound=2 * SIZE), act)
    methods = [swap.method for swap in stage.slot.swaps]
    assert methods == ["respawn", "inplace", "respawn"]


def test_engine_death_during_load_is_retried_once_then_fails_the_unit() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        stage.world.armed["fill"] = "die"
        assert await stage.ask("c") == "ok"
        engines = len(stage.world.engines)
        stage.world.armed["fill"] = "die"
        waiting = asyncio.create_task(stage.ask("d"))
        await until(lambda: len(stage.world.engines) > engines, "it died", timeout_s=5)
        stage.world.armed["fill"] = "die"
        assert await waiting == "expert_failed"
        # Nobody else pays for it, and it is tried again later.
        assert await stage.ask("b") == "ok"
        assert await stage.ask("d") == "expert_failed"
        await asyncio.sleep(31)
        assert await stage.ask("d") == "ok"

    play(world(), act)


def test_failed_swap_keeps_the_running_unit_serving() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        stage.world.armed["exchange"] = "fail"
        assert await stage.ask("c") == "expert_failed"
        assert await stage.ask("b") == "ok"
        assert stage.slot.states()["c"].state is Residency.FAILED
        assert "c" not in stage.world.engines[-1].held

    stage = play(world(), act)
    assert stage.slot.canary_failures == 0


def test_corrupted_weights_after_a_swap_restart_the_engine_before_any_answer() -> None:
    refuted: list[tuple[str, str | None, str]] = []

    async def act(stage: Stage) -> None:
        stage.slot._refuted = lambda *given: refuted.append(given)
        assert await stage.ask("b") == "ok"
        engines = len(stage.world.engines)
        stage.world.armed["exchange"] = "spoil"
        assert await stage.ask("c") == "ok"
        assert len(stage.world.engines) == engines + 1

    stage = play(world(), act)
    assert stage.slot.canary_failures == 1
    assert stage.slot.swap_counts()[("c", "respawn", "canary")] == 1
    assert refuted == [("c", "inplace", "the weights failed verification after a swap")]


@pytest.mark.parametrize("step", ["exchange", "fill"])
def test_swap_of_which_the_engine_dies_counts_against_its_method(step: str) -> None:
    refuted: list[tuple[str, str | None, str]] = []

    async def act(stage: Stage) -> None:
        stage.slot._refuted = lambda *given: refuted.append(given)
        assert await stage.ask("b") == "ok"
        stage.world.armed[step] = "die"
        assert await stage.ask("c") == "ok"

    play(world(), act)
    died = [("c", None, "the engine died in a swap: told to die")]
    assert refuted == (died if step == "exchange" else [])


def test_evict_of_a_unit_being_swapped_in_raises_conflict() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        waiting = asyncio.create_task(stage.ask("c"))
        refused = 0
        while not waiting.done():
            with pytest.raises(ConflictError):
                # Running, on its way, or on disk: at no moment of this free to go.
                await stage.slot.operate("evict", "b" if refused % 2 else "a")
            if stage.slot.states()["c"].state is Residency.HOST:
                break
            refused += 1
            await asyncio.sleep(0.005)
        assert refused
        assert await waiting == "ok"

    play(world(), act)


def test_load_without_prefetch_brings_the_unit_to_host_memory_once() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        assert stage.slot.states()["c"].state is Residency.DISK
        await stage.slot.operate("load", "c")
        host = Residency.HOST
        await until(lambda: stage.slot.states()["c"].state is host, "held", timeout_s=5)
        assert stage.slot.states()["b"].state is Residency.DEVICE
        # It is done once: what is dropped later, for others, is not fetched again by itself.
        await stage.slot.operate("load", "c")
        await stage.slot.operate("evict", "c")
        await asyncio.sleep(1)
        assert stage.slot.states()["c"].state is Residency.DISK

    play(world(), act)


def test_pinned_unit_is_loaded_once_the_request_without_room_has_left() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        # Other slots could make room for a third unit, but have not.
        stage.slot.policy = replace(
            stage.slot.policy, min_stay_s=50, max_wait_s=200, most_bytes=3 * SIZE
        )
        running = asyncio.create_task(stage.ask("b", 1000))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        # The request finds no room beside the running and the pinned unit, and the pinned unit
        # leaves what room there is to the request.
        waiting = asyncio.create_task(stage.ask("d"))
        stage.slot.set_pinned("c", True)
        await asyncio.sleep(2)
        assert stage.world.engines[-1].held == {"b"}
        waiting.cancel()
        held = stage.world.engines[-1].held
        await until(lambda: held == {"b", "c"}, "the pinned unit is loaded", timeout_s=5)
        running.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)

    play(world(bound=2 * SIZE), act, prefetch=True)


def test_load_that_can_not_succeed_raises_the_reason() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        with pytest.raises(ConflictError, match="more host_bytes"):
            await stage.slot.operate("load", "c")
        # As it was before: asked for, it takes the whole engine.
        assert await stage.ask("c") == "ok"

    play(world(bound=SIZE), act)

    async def fail(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        stage.world.armed["fill"] = "fail"
        assert await stage.ask("c") == "expert_failed"
        with pytest.raises(ConflictError, match="told to fail"):
            await stage.slot.operate("load", "c")

    play(world(), fail)


@pytest.mark.parametrize("preempt", [True, False])
def test_swap_preempts_running_requests_or_waits_for_them_by_policy(preempt: bool) -> None:
    async def act(stage: Stage) -> None:
        ends: list[str] = []

        async def ask(expert: str, tokens: int) -> None:
            assert await stage.ask(expert, tokens, stream=False) == "ok"
            ends.append(expert)

        await ask("c", 1)
        await ask("b", 1)  # c is held now
        whole = asyncio.create_task(ask("b", 300))  # 3 s, and nothing of it goes out before
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        other = asyncio.create_task(ask("c", 2))
        await asyncio.gather(whole, other)
        # Put back once, and run to its end at the second time.
        assert stage.put_back == preempt
        assert ends == (["c", "b", "c", "b"] if preempt else ["c", "b", "b", "c"])

    play(world(), act, preempt=preempt)


def test_preemption_spares_streams_and_preempts_a_request_only_once() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("c") == "ok"
        stream = asyncio.create_task(stage.ask("b", 100, stream=True))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        await asyncio.sleep(0.1)  # its first byte is out
        assert await stage.ask("c") == "ok"
        assert await stream == "ok"
        assert stage.put_back == 0
        whole = asyncio.create_task(stage.ask("b", 300, stream=False))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        assert await stage.ask("c") == "ok"
        assert stage.put_back == 1
        assert not whole.done()
        await until(lambda: stage.running == 1, "it runs again", timeout_s=5)
        assert await stage.ask("c") == "ok"
        assert whole.done(), "it was put back again"
        assert await whole == "ok"
        assert stage.put_back == 1

    play(world(), act, preempt=True)


def test_retire_rejects_waiting_requests_and_frees_host_memory() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        assert await stage.ask("c") == "ok"
        whole = asyncio.create_task(stage.ask("c", 100))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        waiting = asyncio.create_task(stage.ask("d"))
        others = asyncio.create_task(stage.ask("b"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await stage.slot.retire("d", "expert 'd' is not in the config any more")
        assert await waiting == "model_not_found"
        # The one that runs goes when its requests have ended, and another comes.
        await stage.slot.retire("c", "expert 'c' is not in the config any more")
        assert await whole == "ok"
        assert await others == "ok"
        assert stage.slot.experts == ("a", "a-tuned", "b")
        assert stage.world.engines[-1].held == {"b"}

    play(world(), act)


@pytest.mark.parametrize("put_back", [False, True])
def test_moved_waiter_preempts_unless_it_was_preempted_itself(put_back: bool) -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("c") == "ok"
        assert await stage.ask("b") == "ok"  # c is held now
        whole = asyncio.create_task(stage.ask("b", 300, stream=False))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        now_s = asyncio.get_running_loop().time()
        # As one that placement has moved here: its place in the queue is that of its arrival.
        async with stage.slot.lease("c", again=LeaseRevokedError(now_s, put_back=put_back)):
            assert whole.done() == put_back
        assert await whole == "ok"
        assert stage.put_back == (not put_back)

    play(world(), act, preempt=True)


def test_hand_over_keeps_which_waiters_were_preempted() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        collected: list[bool] = []

        async def wait(again: LeaseRevokedError | None) -> None:
            try:
                async with stage.slot.lease("a", again=again):
                    raise AssertionError("it was moved before it ran")
            except LeaseRevokedError as moved:
                collected.append(moved.put_back)

        waits = [
            asyncio.create_task(wait(again))
            for again in (
                None,
                LeaseRevokedError(0.0, put_back=False),
                LeaseRevokedError(0.0, put_back=True),
            )
        ]
        await asyncio.sleep(0)
        assert stage.slot.hand_over("a") is not None
        await asyncio.gather(*waits)
        assert sorted(collected) == [False, False, True]

    play(world(), act)


def test_retire_of_the_running_unit_keeps_the_last_unit_that_can_run() -> None:
    async def act(stage: Stage) -> None:
        assert await stage.ask("b") == "ok"
        assert stage.slot.hand_over("a") is not None
        await stage.slot.retire("d", "it went")
        whole = asyncio.create_task(stage.ask("b", 1000))
        await until(lambda: stage.running == 1, "it runs", timeout_s=5)
        goes = asyncio.create_task(stage.slot.retire("b", "it went"))
        await asyncio.sleep(0)
        # Placement may not take it away: nothing could run here, and b would never be gone.
        assert stage.slot.hand_over("c") is None
        assert await whole == "ok"
        await goes
        assert stage.slot.experts == ("c",)

    play(world(), act)
