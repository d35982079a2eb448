"""The modelled engine takes the times that its steps add up to."""

from __future__ import annotations

import asyncio
import time

import pytest

from loadtests.fleet.modelled_engine import ENDPOINT, EngineCosts, FirstToken, ModelledEngine
from loadtests.lib.virtual_clock import run_on_virtual_clock
from service.engine.engine_interface import EngineRequest, Message
from service.errors import EngineDeadError

COSTS = EngineCosts(step_s=0.02, each_s=0.01, read_s=0.001, swap_s=0.5, fill_s=3.0)


async def answer(
    engine: ModelledEngine, firsts: dict[str, FirstToken], name: str, prompt: int, tokens: int
) -> tuple[float, float]:
    """Seconds to the first token and to the end."""
    began_s = time.monotonic()
    firsts[name] = FirstToken()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await engine.run(EngineRequest(ENDPOINT, "a", b"%d %d" % (prompt, tokens), name), send)
    assert b'"completion_tokens":%d' % tokens in sent[-1]["body"]
    return firsts[name].at_s - began_s, time.monotonic() - began_s


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 1), (100, 1), (50, 10), (500, 40)])
def test_engine_alone_reads_and_then_steps(prompt: int, tokens: int) -> None:
    async def main() -> tuple[float, float]:
        firsts: dict[str, FirstToken] = {}
        return await answer(ModelledEngine(["a"], COSTS, firsts), firsts, "r", prompt, tokens)

    first_s, whole_s = run_on_virtual_clock(main())
    assert first_s == pytest.approx(0.001 * prompt + 0.03)
    assert whole_s == pytest.approx(0.001 * prompt + 0.03 * tokens)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_engine_steps_are_longer_with_more_requests(count: int) -> None:
    async def main() -> list[tuple[float, float]]:
        firsts: dict[str, FirstToken] = {}
        engine = ModelledEngine(["a"], COSTS, firsts)
        return await asyncio.gather(
            *(answer(engine, firsts, f"r{i}", 10, 20) for i in range(count))
        )

    # All prompts are read before the first step.
    expected_s = 0.01 * count + 20 * (0.02 + 0.01 * count)
    assert [whole for _, whole in run_on_virtual_clock(main())] == pytest.approx(
        [expected_s] * count
    )


def test_engine_gives_the_steps_of_an_abandoned_request_to_the_others() -> None:
    async def main() -> float:
        firsts: dict[str, FirstToken] = {}
        engine = ModelledEngine(["a"], COSTS, firsts)
        stays = asyncio.create_task(answer(engine, firsts, "stays", 1, 100))
        leaves = asyncio.create_task(answer(engine, firsts, "leaves", 1, 1000))
        await asyncio.sleep(0.002 + 10 * 0.04)
        leaves.cancel()
        return (await stays)[1]

    assert run_on_virtual_clock(main()) == pytest.approx(0.002 + 10 * 0.04 + 90 * 0.03)


def test_engine_that_is_dead_or_busy_refuses() -> None:
    async def main() -> None:
        firsts: dict[str, FirstToken] = {}
        engine = ModelledEngine(["a", "b"], COSTS, firsts)
        running = asyncio.create_task(answer(engine, firsts, "r", 1, 100))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineDeadError):
            await engine.swap_in("b")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        began_s = time.monotonic()
        assert (await engine.load_to_host("b")).host_bytes == COSTS.unit_bytes
        assert (await engine.swap_in("b")).ok
        assert time.monotonic() - began_s == pytest.approx(3.5)
        engine.kill("told to")
        assert engine.failure() == "told to"
        with pytest.raises(EngineDeadError):
            await answer(engine, firsts, "late", 1, 1)

    run_on_virtual_clock(main())
