"""Two names of the same weights in a pool: one engine, one queue, and each its own name."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import orjson
import pytest

from service.config import Config
from service.engine.engine_interface import Message
from service.errors import CoeError
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.rpc.call_headers import Call
from service.rpc.snapshot import Queue
from service.telemetry.pool_metrics import PoolMetrics
from tests.support.answer_gate import held_answers
from tests.support.polling import until

SLOTS = pytest.mark.parametrize("slots", [None, 1])


class Stage:
    """A simulated pool with experts of the folders of `tmp_path`."""

    def __init__(self, folder: Path, slots: int | None) -> None:
        self.folder = folder
        self.slots = slots
        for name in ("m", "n", "x"):
            (folder / name).mkdir()
        self.pool = Pool("p")
        self.count = itertools.count()

    def config(self, **experts: Any) -> Config:
        """Make a config. An expert is named by its folder, or by its whole section."""
        whole = {
            name: given if isinstance(given, dict) else {"model": str(self.folder / given)}
            for name, given in experts.items()
        }
        simulated = {"decode_ms": 5, "tokens": 4, "fill_s": 0.01, "swap_s": 0.01}
        pool: dict[str, Any] = {"engine": "simulated", "simulated": simulated}
        if self.slots is not None:
            pool |= {"slots": self.slots, "swap": {"min_stay_s": 0.0}}
        return Config.model_validate({"experts": whole, "pools": {"p": pool}})

    async def start(self, **experts: Any) -> None:
        self.metrics = PoolMetrics()
        self.factory = PoolBuilder(self.config(**experts), "p", self.pool, self.metrics)
        self.metrics.follow(self.pool)
        self.pool.start()

    async def reload(self, **experts: Any) -> None:
        await self.factory.reload(self.config(**experts))
        async with asyncio.timeout(60):
            await self.factory.settled()

    def engine(self, held: str) -> Any:
        return self.pool._slot_of[held]._engine

    async def ask(self, expert: str, tokens: int = 4, *, stream: bool = False) -> tuple[str, str]:
        """Return the names of the model in an answer, and its text."""
        body = {"model": expert, "messages": [{"role": "user", "content": "x"}]}
        body |= {"max_tokens": tokens, "stream": stream}
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        name = f"r{next(self.count)}"
        call = Call("/v1/chat/completions", expert, name, 10_000, stream, "g", 1)
        try:
            await self.pool.run(call, orjson.dumps(body), send)
        except CoeError as error:
            return error.code, error.message
        payload = b"".join(message.get("body", b"") for message in sent)
        if not stream:
            length = dict(sent[0]["headers"])[b"content-length"]
            assert int(length) == len(payload)
            reply = orjson.loads(payload)
            return reply["model"], reply["choices"][0]["message"]["content"]
        lines = [line[6:] for line in payload.splitlines() if line.startswith(b"data: {")]
        events = [orjson.loads(line) for line in lines]
        (model,) = {event["model"] for event in events}
        text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
        return model, text


@pytest.fixture
async def stage(tmp_path: Path, slots: int | None) -> Any:
    stage = Stage(tmp_path, slots)
    yield stage
    await stage.pool.stop(1)


@SLOTS
async def test_run_of_two_names_of_the_same_weights_answers_with_the_name_asked_for(
    stage: Stage,
) -> None:
    lora = {"base": "a", "adapter": str(stage.folder / "x")}
    again = {"base": "b", "adapter": str(stage.folder / "x")}
    variant = {"base": "l", "defaults": {}}
    await stage.start(a="m", b="m", c="n", l=lora, k=again, v=variant)
    assert set(stage.pool._slot_of) == {"a", "c", "l"}
    for stream in (False, True):
        answers = {name: await stage.ask(name, stream=stream) for name in "abclkv"}
        assert {name: model for name, (model, _) in answers.items()} == {n: n for n in "abclkv"}
        assert answers["a"][1] == answers["b"][1] != answers["c"][1]
        assert answers["l"][1] == answers["k"][1] == answers["v"][1] != answers["a"][1]
    snapshot = stage.pool.snapshot()
    assert snapshot.shares == {"b": "a", "k": "l", "v": "l"}
    assert snapshot.experts["a"] == snapshot.experts["b"]
    assert stage.pool.details()["b"]["shares"] == "a"
    assert stage.pool.details()["b"]["host_bytes"] == 0
    assert (await stage.ask("d"))[0] == "model_not_found"


@SLOTS
async def test_snapshot_counts_each_name_s_own_requests_and_the_demand_of_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.pool.slot_units._HALF_LIFE_S", math.inf)  # nothing decays
    await stage.start(a="m", b="m", c="n")
    await stage.ask("a")
    with held_answers(limit=40) as gate:
        calls = [asyncio.create_task(stage.ask(name, 40)) for name in ("a", "b", "b")]
        await until(lambda: stage.pool.queued() == 3, "all run")
        queues = stage.pool.snapshot().queues
        assert queues == {"a": Queue(0, 1, 1), "b": Queue(0, 2, 2), "c": Queue()}
        text = await stage.metrics.text({})
        assert 'coe_requests_running{expert="b"} 2.0' in text
        stage.pool.demand({"b": 3.0, "gone": 1.0})
        if stage.slots is not None:
            # Four requests, and the demand for the other name.
            slot: Any = stage.pool._slot_of["a"]
            assert slot._weights.state("a").demand == 7.0
            await stage.pool.operate("pin", "b")
            assert stage.pool.details()["a"]["pinned"]
        gate.open()
        await asyncio.gather(*calls)
    assert stage.pool.snapshot().queues["b"] == Queue()
    text = await stage.metrics.text({})
    counts = [line for line in text.splitlines() if line.startswith("coe_tokens_total{")]
    assert {line.rpartition(" ")[2] for line in counts if "completion" in line} == {"44.0", "80.0"}


@SLOTS
@pytest.mark.parametrize("removed", ["a", "b"])
async def test_reload_without_one_of_two_names_leaves_the_other_s_weights_and_requests(
    stage: Stage, removed: str
) -> None:
    (other,) = {"a", "b"} - {removed}
    await stage.start(a="m", b="m", c="n")
    assert (await stage.ask(other))[0] == other
    engine = stage.engine("a")
    with held_answers() as gate:
        running = [asyncio.create_task(stage.ask(name, stream=True)) for name in "ab"]
        await until(lambda: gate.held == 2, "both run")
        await stage.reload(**{other: "m", "c": "n"})
        assert not any(task.done() for task in running), "they were waited for"
        assert (await stage.ask(removed))[0] == "model_not_found"
        assert stage.pool.snapshot().experts.keys() == {other, "c"}
        gate.open()
        assert [(await task)[0] for task in running] == ["a", "b"]
    # It comes back beside the other, wherever it stands in the config.
    await stage.reload(**{removed: "m", other: "m", "c": "n"})
    assert [(await stage.ask(name))[0] for name in "abc"] == ["a", "b", "c"]
    assert set(stage.pool._slot_of) == {"a", "c"}
    assert stage.engine("a") is engine


@SLOTS
async def test_reload_that_gives_the_first_name_other_weights_and_back(stage: Stage) -> None:
    await stage.start(a="m", b="m")
    before = await stage.ask("b")
    engine = stage.engine("a")
    with held_answers(limit=5) as gate:
        running = asyncio.create_task(stage.ask("b", 5))
        await until(lambda: gate.held == 1, "it runs")
        await stage.reload(a="n", b="m")
        assert stage.engine("a") is engine
        assert set(stage.pool._slot_of) == {"a", "a~2"}
        assert await stage.ask("b") == before
        # In the only slot another one's weights wait for who runs.
        other = asyncio.create_task(stage.ask("a"))
        if stage.slots is None:
            await other
        gate.open()
        model, text = await other
        assert (model, text[:4]) == ("a", "a~2:")
        assert (await running)[0] == "b"
    await stage.reload(a="m", b="m")
    assert set(stage.pool._slot_of) == {"a"}
    assert (await stage.ask("a"))[1] == before[1]


@SLOTS
async def test_reload_that_changes_one_of_two_names_to_a_third_s_weights(stage: Stage) -> None:
    await stage.start(a="m", b="n")
    waiting = [asyncio.create_task(stage.ask("b", 20)) for _ in range(3)]
    await asyncio.sleep(0)
    await stage.reload(a="m", b="m")
    # Who waited for the old weights is asked to try again, not refused for good.
    assert {(await call)[0] for call in waiting} <= {"b", "engine_restarting"}
    assert set(stage.pool._slot_of) == {"a"}
    assert (await stage.ask("b"))[0] == "b"


@SLOTS
async def test_error_of_shared_weights_names_the_expert_that_was_asked_for(stage: Stage) -> None:
    await stage.start(secret="m", b="m")
    await stage.ask("b")
    stage.engine("secret").kill("why")
    code, message = await stage.ask("b")
    assert code in ("engine_restarting", "engine_died")
    assert "'b'" in message
    assert "secret" not in message
