"""Servers of somebody else's as experts: gateway, pool and real processes, without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
import yaml

from service.config import Config
from tests.support.coe_serve_process import serve, wait_until
from tests.support.foreign_server import command
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, events, run_gateway
from tests.support.polling import until
from tests.support.recordings import wav

SLEEP: dict[str, Any] = {"sleep": {"url": "/sleep?level=1"}, "wake": {"url": "/wake_up"}}


def expert(*arguments: str, **settings: Any) -> dict[str, Any]:
    given = {"run": command(*arguments), "memory_bytes": "1MiB", "stop_timeout_s": 1.0}
    return {"command": {**given, **settings}, "price": {"prompt": 1, "completion": 1}}


def config(experts: dict[str, Any], slots: int | None = None, **pool: Any) -> Config:
    swap = {"min_stay_s": 0.0, **pool.pop("swap", {})}
    return Config.model_validate(
        {
            "router": {"artifact": "none"},
            "experts": experts,
            "pools": {"p": {"slots": slots, "swap": swap, **pool}},
        }
    )


def hello(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


async def told(service: RunningGateway, model: str, **more: Any) -> str:
    status, _, answer = await service.ask(hello(model, **more))
    assert status == 200, answer
    assert answer["model"] == model
    assert answer["usage"]["total_tokens"] == 7
    return str(answer["choices"][0]["message"]["content"])


def swaps(service: RunningGateway) -> dict[tuple[str, str, str], int]:
    (slot,) = service.pools["p"].process.pool.slots
    return slot.swap_counts()


@pytest.mark.parametrize("slots", [None, 1])
async def test_experts_by_command_answer_stream_and_embed(slots: int | None) -> None:
    experts = {
        "a": expert(),
        "b": expert(model="b-at-home"),
        "e": expert() | {"capabilities": ["embeddings", "rerank", "classify", "transcription"]},
        "short": {"base": "a", "defaults": {"max_tokens": 8}},
    }
    async with run_gateway(config(experts, slots)) as service:
        assert await told(service, "a") == "a0 a1 a2 a3"
        assert await told(service, "b") == "b-at-home0 b-at-home1 b-at-home2 b-at-home3"
        assert await told(service, "short") == "a0 a1 a2 a3"
        body = {"model": "e", "input": "x"}
        status, _, answer = await service.ask(body, "/v1/embeddings")
        assert status == 200
        assert answer["data"][0]["embedding"] == [0.5, 0.25]
        asked = {"model": "auto", "query": "x", "documents": ["y"]}
        status, _, answer = await service.ask(asked, "/v1/rerank")
        assert (status, answer["results"][0]["relevance_score"]) == (200, 0.5)
        status, _, answer = await service.ask(body, "/v1/classify")
        assert (status, answer["data"][0]["label"]) == (200, "x")
        form = aiohttp.FormData({"model": "e"})
        form.add_field("file", wav(1.0), filename="a.wav")
        heard = service.url + "/v1/audio/transcriptions"
        async with service.client.post(heard, data=form) as reply:
            assert (reply.status, (await reply.json())["text"]) == (200, "1 recording")
        options = {"include_usage": True}
        async with service.post(hello("b", stream=True, stream_options=options)) as reply:
            lines = events(await reply.read())
        assert lines[-1] == "[DONE]"
        assert "home3" in lines[3]
        assert '"total_tokens":7' in lines[-2].replace(" ", "")
        status, _, answer = await service.ask(hello("e"))
        assert status in (400, 404)


async def test_slot_swaps_by_stop_and_start(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    experts = {name: expert("--pids", str(pids)) for name in ("a", "b")}
    async with run_gateway(config(experts, 1)) as service:
        for name in ("a", "b", "a"):
            assert await told(service, name) == " ".join(f"{name}{i}" for i in range(4))
        counts = swaps(service)
    assert {(unit, method): n for (unit, method, _), n in counts.items()} == {
        ("b", "respawn"): 1,
        ("a", "respawn"): 1,
    }
    assert len(pids.read_text().split()) == 3


async def test_slot_swaps_by_sleep_and_wake_keep_the_servers(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    experts = {name: expert("--pids", str(pids), **SLEEP) for name in ("a", "b")}
    async with run_gateway(config(experts, 1)) as service:
        for name in ("a", "b", "a", "b", "a"):
            assert await told(service, name) == " ".join(f"{name}{i}" for i in range(4))
        counts = swaps(service)
    assert {method for _, method, _ in counts} == {"sleep"}
    assert sum(counts.values()) == 4
    assert len(pids.read_text().split()) == 2


async def test_slot_mixes_sleeping_and_stopped_servers() -> None:
    experts = {"a": expert(**SLEEP), "b": expert(**SLEEP), "c": expert()}
    async with run_gateway(config(experts, 1)) as service:
        for name in ("a", "b", "c", "a", "b"):
            assert await told(service, name) == " ".join(f"{name}{i}" for i in range(4))
        methods = {unit: method for unit, method, _ in swaps(service)}
    assert methods["c"] == "respawn"
    assert methods["b"] == "sleep"


async def test_slot_requests_of_all_experts_at_once_are_all_answered() -> None:
    experts = {name: expert("--step-s", "0.01", **SLEEP) for name in ("a", "b", "c")}
    async with run_gateway(config(experts, 1)) as service:
        names = [name for name in experts for _ in range(8)]
        found = await asyncio.gather(*(told(service, name) for name in names))
    assert found == [" ".join(f"{name}{i}" for i in range(4)) for name in names]


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("sleeps", [False, True])
async def test_idle_server_gives_its_memory_back_until_it_is_asked(
    tmp_path: Path, slots: int | None, sleeps: bool
) -> None:
    pids = tmp_path / "pids"
    more = SLEEP if sleeps else {}
    experts = {name: expert("--pids", str(pids), **more) for name in ("a", "b")}
    made = config(experts, slots, swap={"idle_unload_s": 0.3})

    def running() -> int:
        return len([pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)])

    async with run_gateway(made) as service:
        for name in experts:
            await told(service, name)
        pool = service.pools["p"].process.pool

        def rests() -> bool:
            # In one slot the other server sleeps anyhow.
            states = [state.released for state in pool.snapshot().experts.values()]
            return any(states) if slots == 1 and sleeps else all(states)

        await until(rests, "the experts rest")
        # A server that sleeps stays, and the others' processes have ended.
        await until(lambda: running() == (2 if sleeps else 0), "the processes are as they should")
        started = len(pids.read_text().split())
        for name in experts:
            assert await told(service, name) == " ".join(f"{name}{i}" for i in range(4))
        assert len(pids.read_text().split()) == started + (0 if sleeps else 2)


async def test_server_that_crashes_is_started_again() -> None:
    async with run_gateway(config({"a": expert()})) as service:
        status, _, answer = await service.ask(hello("a", "die"))
        assert status in (500, 503)
        assert answer["error"]["code"] in ("engine_dead", "engine_died_twice", "engine_restarting")

        async def answers() -> bool:
            status, _, _ = await service.ask(hello("a"))
            return status == 200

        await until(answers, "another server answers")


async def test_server_that_never_starts_is_a_typed_failure_with_its_log() -> None:
    experts = {"bad": expert("--exit", "3", "--say", "no such file: x.gguf"), "good": expert()}
    async with run_gateway(config(experts)) as service:
        assert await told(service, "good") == "good0 good1 good2 good3"
        status, _, answer = await service.ask(hello("bad"))
        assert status == 503
        assert answer["error"]["code"] == "expert_failed"
        assert "exit status 3" in answer["error"]["message"]
        assert "no such file: x.gguf" in answer["error"]["message"]


async def test_reload_with_another_command_starts_only_that_server_again(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before = {name: expert("--pids", str(pids)) for name in ("a", "b")}
    after = {**before, "b": expert("--pids", str(pids), "--tokens", "2")}
    async with run_gateway(config(before)) as service:
        assert await told(service, "b") == "b0 b1 b2 b3"
        await service.pools["p"].process.reload(config(after))
        await service.pools["p"].process._builder.settled()

        async def changed() -> bool:
            status, _, answer = await service.ask(hello("b"))
            return status == 200 and answer["choices"][0]["message"]["content"] == "b0 b1"

        await until(changed, "the changed command answers")
        assert await told(service, "a") == "a0 a1 a2 a3"
    assert len(pids.read_text().split()) == 3


async def test_client_that_leaves_ends_the_request_at_the_server(tmp_path: Path) -> None:
    aborts = tmp_path / "aborts"
    one = expert("--tokens", "1000", "--step-s", "0.02", "--aborts", str(aborts))
    async with run_gateway(config({"a": one})) as service:
        async with service.post(hello("a", stream=True)) as reply:
            await reply.content.readany()
        await until(aborts.exists, "the server notices")


async def test_log_is_shown_to_admins_alone_and_without_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOREIGN_KEY", "sesame-123")
    said = ("--say", "ready to serve", "--say-env", "FOREIGN_KEY")
    experts = {
        "org/a": expert(*said, secret_env=["FOREIGN_KEY"]),
        "short": {"base": "org/a", "defaults": {"max_tokens": 8}},
    }
    async with run_gateway(config(experts)) as service:
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        for name in experts:
            async with service.get(f"/admin/experts/{name}/log", headers=admin) as reply:
                assert reply.status == 200
                (lines,) = (await reply.json())["pools"].values()
                assert lines == ["ready to serve", "the key is ***"]
        async with service.get("/admin/experts/org/a/log") as reply:
            assert reply.status in (401, 403)
        async with service.get("/admin/experts/other/log", headers=admin) as reply:
            assert reply.status == 404


async def test_log_of_an_expert_without_a_command_is_unknown() -> None:
    one = Config.model_validate(
        {
            "router": {"artifact": "none"},
            "experts": {"a": {"model": "m"}},
            "pools": {"p": {"engine": "simulated"}},
        }
    )
    async with run_gateway(one) as service:
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with service.get("/admin/experts/a/log", headers=admin) as reply:
            assert reply.status == 404
            assert "no server that a command starts" in (await reply.json())["error"]["message"]


@pytest.mark.cluster
def test_service_with_servers_outlives_its_pool_and_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    arguments = ("--fork", "double", "--pids", str(pids), "--say", "it starts")
    settings = {
        "server": {"drain_s": 5},
        "router": {"artifact": "none"},
        "experts": {"one": expert(*arguments)},
        "pools": {"main": {"cpus": 0.1}},
    }
    path = tmp_path / "coe.yaml"
    path.write_text(yaml.safe_dump(settings))

    def left() -> list[int]:
        return [pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]

    with (
        serve(path) as service,
        openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client,
    ):

        def answers() -> bool:
            messages: Any = [{"role": "user", "content": "hi"}]
            try:
                answer = client.chat.completions.create(model="one", messages=messages)
            except openai.APIError:
                return False
            return answer.choices[0].message.content == "one0 one1 one2 one3"

        wait_until(answers, "the server answers")
        logs = list((service.run_dir / "servers").rglob("one.log"))
        assert [log.read_text() for log in logs] == ["it starts\n"]
        before = left()
        assert len(before) == 2
        (pool,) = service.named("PoolReplica") or service.named("pool-main")
        pool.kill()
        wait_until(lambda: not set(before) & set(left()), "the dead pool's server has ended")
        wait_until(answers, "another pool's server answers", 90)
        run_dir = service.run_dir
    assert not left()
    assert not run_dir.exists()
