"""Ollama's Python client against a service: chat, generate, embed, lists, errors, keep_alive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ollama
import pytest

from tests.support.in_process_service import RunningGateway, run_gateway, simulated
from tests.support.polling import until

_EXPERTS: dict[str, Any] = {
    "general": {"model": "m", "categories": ["general"]},
    "vectors": {"model": "v", "capabilities": ["embeddings"]},
}
_HELLO = [{"role": "user", "content": "hello there"}]


@asynccontextmanager
async def _service(**more: Any) -> AsyncIterator[tuple[RunningGateway, ollama.AsyncClient]]:
    config = simulated({"cpu": {"tokens": 4, "max_model_len": 512}}, experts=_EXPERTS, **more)
    async with run_gateway(config) as s:
        client = ollama.AsyncClient(host=s.url)
        try:
            yield s, client
        finally:
            await client.close()


async def test_chat_and_generate_are_whole_or_streamed() -> None:
    async with _service() as (_, client):
        options = {"num_predict": 3, "temperature": 0, "seed": 1}
        whole = await client.chat("general:latest", _HELLO, options=options)
        assert (whole.model, whole.done, whole.done_reason) == ("general", True, "length")
        assert len((whole.message.content or "").split()) == whole.eval_count == 3
        assert whole.prompt_eval_count == 2
        assert (whole.total_duration or 0) >= (whole.eval_duration or 0)
        parts = [
            part async for part in await client.chat("auto", _HELLO, stream=True, options=options)
        ]
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        assert [part.done for part in parts] == [False] * 3 + [True]
        assert (parts[-1].eval_count, parts[-1].prompt_eval_count) == (3, 2)
        text = await client.generate("general", "hello there", options=options)
        assert text.response == whole.message.content
        raw = await client.generate("general", "hello there", raw=True, options=options)
        assert len(raw.response.split()) == 3
        pieces = [
            part async for part in await client.generate("general", "hello there", stream=True)
        ]
        assert len("".join(part.response for part in pieces).split()) == 4


async def test_chat_keeps_what_headers_and_bodies_say_to_the_gateway() -> None:
    async with _service() as (s, _):
        body = {"model": "auto", "messages": _HELLO, "coe": {"deny": ["general"]}}
        status, _, answer = await s.ask(body, "/api/chat")
        assert (status, answer.keys()) == (400, {"error"})
        del body["coe"]
        async with s.post({**body, "stream": True}, "/api/chat") as reply:
            assert reply.headers["x-coe-expert"] == "general"
            assert reply.headers["content-type"] == "application/x-ndjson"
            lines = [json.loads(line) for line in (await reply.text()).splitlines()]
        assert lines[-1]["done"]
        (asked,) = [request for engine in s.pools["cpu"].engines for request in engine.asked]
        assert asked.endpoint == "/v1/chat/completions"


async def test_vectors_and_lists_of_models() -> None:
    async with _service() as (_, client):
        found = await client.embed("vectors", ["a", "b c"])
        assert (len(found.embeddings), found.prompt_eval_count) == (2, 3)
        assert (await client.embeddings("vectors", "a")).embedding == found.embeddings[0]
        assert [m.model for m in (await client.list()).models] == ["auto", "general", "vectors"]
        assert {m.model for m in (await client.ps()).models} == {"general", "vectors"}
        known = await client.show("general:latest")
        assert known.capabilities == ["completion", "tools"]
        assert known.modelinfo is not None
        assert known.modelinfo["coe.context_length"] == 512


async def test_errors_are_texts_with_their_status() -> None:
    async with _service() as (s, client):
        asked: list[tuple[int, Any]] = [
            (404, client.chat("nobody", _HELLO)),
            (404, client.show("nobody")),
            (404, client.pull("general")),
            (404, client.chat("nobody")),
            (400, client.chat("vectors", _HELLO)),
            (400, client.embed("general", "x")),
            (400, client.chat("general", _HELLO, options={"warmth": 1})),
            (400, client.chat("general", _HELLO, keep_alive="soon")),
            (400, client.generate("general", "x", suffix="y")),
            (400, client.chat("general", [{"role": "user", "content": "a " * 600}])),
        ]
        for status, asking in asked:
            with pytest.raises(ollama.ResponseError) as caught:
                await asking
            assert caught.value.status_code == status
            assert caught.value.error
            assert "{" not in caught.value.error
        with pytest.raises(ollama.ResponseError) as caught:
            async for _ in await client.chat("nobody", _HELLO, stream=True):
                pass
        assert caught.value.status_code == 404
        async with s.get("/api/chat") as reply:
            assert (reply.status, (await reply.json()).keys()) == (405, {"error"})
        # As `curl -d` sends it; aiohttp adds no header of a browser.
        raw, kind = json.dumps({"model": "general"}), "application/x-www-form-urlencoded"
        for headers, status in (({}, 200), ({"origin": "null"}, 403), ({"referer": "x"}, 415)):
            headers |= {"content-type": kind}
            async with s.client.post(s.url + "/api/chat", data=raw, headers=headers) as reply:
                assert reply.status == status
        async with s.get("/api/version") as reply:
            assert (await reply.json())["version"]


async def _released(s: RunningGateway) -> bool:
    async with s.get("/v1/models/general") as reply:
        return bool((await reply.json())["coe"].get("released"))


async def _is_held(s: RunningGateway) -> bool:
    return not await _released(s)


async def test_keep_alive_of_0_gives_the_memory_back_and_the_next_request_takes_it() -> None:
    async with _service() as (s, client):
        told = await client.chat("general", _HELLO, keep_alive=0)
        assert told.done
        await until(lambda: _released(s), "the expert gives its memory back")
        assert (await client.chat("general", _HELLO, keep_alive="5m")).done
        await until(lambda: _is_held(s), "the expert has its memory again")
        gone = await client.generate("general", keep_alive=0)
        assert (gone.done, gone.done_reason, gone.response) == (True, "unload", "")
        await until(lambda: _released(s), "the expert gives its memory back")
        back = await client.chat("general")
        assert (back.done_reason, back.message.content) == ("load", "")


async def test_keep_alive_of_a_key_unloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("A_KEY", key)
    keys = {"a": {"tenant": "acme", "key_env": "A_KEY", "experts": ["general"]}}
    async with _service(keys=keys, tenants={"acme": {}}) as (s, client):
        for asking in (client.chat("general", _HELLO), client.list()):
            with pytest.raises(ollama.ResponseError) as caught:
                await asking
            assert caught.value.status_code == 401
        own = ollama.AsyncClient(host=s.url, headers={"authorization": f"Bearer {key}"})
        assert [model.model for model in (await own.list()).models] == ["auto", "general"]
        assert (await own.chat("general", _HELLO, keep_alive=0)).done
        assert (await own.generate("general", keep_alive=0)).done_reason == "unload"
        assert s.pools["cpu"].process.pool.unload_counts() == {}
        with pytest.raises(ollama.ResponseError):
            await own.embed("vectors", "x")
        await own.close()


async def test_requests_without_a_prompt_count_against_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("A_KEY", key)
    keys = {"a": {"tenant": "acme", "key_env": "A_KEY"}}
    async with _service(keys=keys, tenants={"acme": {"requests_per_min": 2}}) as (s, _):
        own = {"headers": {"authorization": f"Bearer {key}"}}
        bodies: list[dict[str, Any]] = [{"model": "general"}, {"model": "general", "keep_alive": 0}]
        seen = [await s.ask(body, "/api/generate", **own) for body in [*bodies, *bodies]]
        assert [status for status, _, _ in seen] == [200, 200, 429, 429]
        assert seen[-1][2].keys() == {"error"}
