"""Engines on one accelerator, of which one is awake: who sleeps before whom, and what fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.config import SimulatedOptions
from service.engine.engine_interface import EngineReport, EngineRequest, Message
from service.engine.simulated_engine import SimulatedEngine
from service.engine.sleeping_engines import SleepingEngines, exact_pinned_blocks
from service.errors import EngineDeadError, ExpertFailedError

UNITS = {"a": ("a", "a-tuned"), "b": ("b",), "c": ("c",)}


class Dozer(SimulatedEngine):
    """Writes down what it is told to do."""

    def __init__(self, unit: str, log: list[str], broken: set[str]) -> None:
        super().__init__(UNITS[unit], SimulatedOptions())
        self.unit, self.log, self.broken = unit, log, broken

    def _do(self, act: str) -> None:
        self.log.append(f"{act} {self.unit}")
        if f"{act} {self.unit}" in self.broken:
            raise ExpertFailedError("told to fail")

    async def start(self) -> EngineReport:
        self._do("start")
        return await super().start()

    async def sleep(self) -> None:
        self._do("sleep")

    async def wake(self) -> None:
        self._do("wake")

    async def stop(self) -> None:
        self.log.append(f"stop {self.unit}")
        await super().stop()


class Stage:
    """The engines, and what they were told."""

    def __init__(self, *broken: str) -> None:
        self.log: list[str] = []
        self.broken = set(broken)
        sizes = {"a": 10, "b": 20, "c": 30}
        self.engines = SleepingEngines(
            "a", UNITS, lambda unit: Dozer(unit, self.log, self.broken), sizes
        )

    async def ask(self, expert: str) -> bytes:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        body = b'{"prompt": "x", "max_tokens": 2}'
        await self.engines.run(EngineRequest("/v1/completions", expert, body, "r"), send)
        return bytes(sent[-1]["body"])


async def test_sleep_mode_swap_keeps_one_engine_awake() -> None:
    stage = Stage()
    engines = stage.engines
    await engines.start()
    await engines.load("a-tuned")
    assert b"a-tuned:" in await stage.ask("a-tuned")
    assert (await engines.load_to_host("b")).host_bytes == 20
    done = await engines.swap_in("b")
    assert (done.ok, done.method) == (True, "sleep")
    assert b"b:" in await stage.ask("b")
    with pytest.raises(ExpertFailedError, match="sleeps"):
        await stage.ask("a")
    await engines.swap_in("a")
    await engines.swap_in("b")
    await engines.evict("b")  # it is awake: nothing happens
    await engines.evict("a")
    assert stage.log == [
        *("start a", "sleep a", "start b", "sleep b", "wake a", "sleep a", "wake b", "stop a"),
    ]
    await engines.stop()
    assert stage.log[-1] == "stop b"


async def test_sleep_mode_engine_that_can_not_start_leaves_the_other_awake() -> None:
    stage = Stage("start c")
    await stage.engines.start()
    with pytest.raises(ExpertFailedError):
        await stage.engines.swap_in("c")
    assert stage.log == ["start a", "sleep a", "start c", "stop c", "wake a"]
    assert b"a:" in await stage.ask("a")
    assert stage.engines.failure() is None


@pytest.mark.parametrize(("act", "done"), [("sleep a", []), ("wake a", ["b"])])
async def test_sleep_mode_failure_during_a_swap_fails_the_whole_engine(
    act: str, done: list[str]
) -> None:
    stage = Stage(act)
    await stage.engines.start()
    for expert in done:
        await stage.engines.swap_in(expert)
    with pytest.raises(EngineDeadError):
        await stage.engines.swap_in("a" if done else "b")
    assert stage.engines.failure() is not None


async def test_sleep_mode_engine_that_died_asleep_is_stopped_and_started_again() -> None:
    stage = Stage()
    engines = stage.engines
    await engines.start()
    await engines.swap_in("b")
    dead = engines._engines["a"]
    assert isinstance(dead, Dozer)
    dead.kill("a test killed it")
    await engines.swap_in("a")
    assert stage.log[-3:] == ["sleep b", "stop a", "start a"]
    assert b"a:" in await stage.ask("a")


async def test_sleep_mode_engine_that_can_not_be_made_leaves_the_other_awake() -> None:
    log: list[str] = []

    def build(unit: str) -> Dozer:
        if unit == "b":
            raise ExpertFailedError("no room")
        return Dozer(unit, log, set())

    engines = SleepingEngines("a", UNITS, build, {})
    await engines.start()
    with pytest.raises(ExpertFailedError, match="no room"):
        await engines.swap_in("b")
    assert log == ["start a", "sleep a", "wake a"]
    assert engines.failure() is None


async def test_sleep_mode_slots_with_one_turn_exchange_engines_one_at_a_time() -> None:
    busy = 0
    most = 0

    class Slow(Dozer):
        async def start(self) -> EngineReport:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.01)
            busy -= 1
            return await super().start()

    turn = asyncio.Lock()
    slots = [
        SleepingEngines(first, UNITS, lambda unit: Slow(unit, [], set()), {}, turn)
        for first in ("a", "b")
    ]
    await asyncio.gather(*(slot.start() for slot in slots))
    await asyncio.gather(*(slot.swap_in("c") for slot in slots))
    assert most == 1


_EXACT = "pinned_max_round_threshold_mb:2"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("PYTORCH_ALLOC_CONF", _EXACT)),
        ({"PYTORCH_ALLOC_CONF": ""}, ("PYTORCH_ALLOC_CONF", _EXACT)),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
            ("PYTORCH_ALLOC_CONF", f"max_split_size_mb:64,{_EXACT}"),
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            ("PYTORCH_CUDA_ALLOC_CONF", f"max_split_size_mb:64,{_EXACT}"),
        ),
        (
            {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:16"},
            ("PYTORCH_ALLOC_CONF", "pinned_max_round_threshold_mb:16"),
        ),
    ],
)
def test_exact_pinned_blocks_keep_the_operators_settings(
    environment: dict[str, str], expected: tuple[str, str]
) -> None:
    assert exact_pinned_blocks(environment) == expected


def test_exact_pinned_blocks_are_a_setting_that_the_installed_torch_has() -> None:
    torch = pytest.importorskip("torch")
    header = Path(torch.__file__).parent / "include" / "c10" / "core" / "AllocatorConfig.h"
    setting = exact_pinned_blocks({})[1].partition(":")[0]
    assert setting.removesuffix("_mb") in header.read_text()


async def test_sleep_mode_rests_until_the_same_or_another_engine_is_wanted() -> None:
    stage = Stage()
    engines = stage.engines
    await engines.start()
    assert engines.can_rest
    for _ in range(2):  # the second finds nothing to do
        await engines.rest()
    with pytest.raises(ExpertFailedError, match="sleeps"):
        await stage.ask("a")
    for _ in range(2):
        await engines.resume()
    assert b"a:" in await stage.ask("a")
    # Another unit comes without the first one being woken in between.
    await engines.rest()
    assert (await engines.swap_in("b")).ok
    assert b"b:" in await stage.ask("b")
    assert stage.log == [
        *("start a", "sleep a", "wake a", "sleep a", "start b"),
    ]


async def test_sleep_mode_engine_that_can_not_start_after_a_rest_leaves_the_other_awake() -> None:
    stage = Stage("start c")
    await stage.engines.start()
    await stage.engines.rest()
    with pytest.raises(ExpertFailedError):
        await stage.engines.swap_in("c")
    assert stage.log == ["start a", "sleep a", "start c", "stop c", "wake a"]
    assert b"a:" in await stage.ask("a")


async def test_sleep_mode_failure_at_a_rest_fails_the_whole_engine() -> None:
    stage = Stage("sleep a")
    await stage.engines.start()
    with pytest.raises(EngineDeadError):
        await stage.engines.rest()
    assert stage.engines.failure() is not None


async def test_sleep_mode_failure_after_a_rest_fails_the_whole_engine() -> None:
    stage = Stage("wake a")
    await stage.engines.start()
    await stage.engines.rest()
    with pytest.raises(EngineDeadError):
        await stage.engines.resume()
    assert stage.engines.failure() is not None
