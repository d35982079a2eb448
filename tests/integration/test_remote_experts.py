"""Remote experts against an upstream whose behaviour the tests script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.config import Config
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import (
    RunningGateway,
    chat,
    events,
    run_gateway,
    serving,
    simulated,
)
from tests.support.polling import until

KEY = "sk-very-secret"


class Upstream:
    """An OpenAI-like server: the user's words say how it shall answer."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[bytes] = []
        self.gone = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        self.keys.append(headers.get(b"authorization", b""))
        body = json.loads(await read_body(receive, 10**6))
        self.asked.append(body)
        words = body["messages"][0]["content"]
        assert scope["path"] == "/base/v1/chat/completions"
        if words.startswith("deep"):
            levels = int(words.split()[1])
            extra = "[" * levels + "]" * levels
            event = (
                f'{{"model":"m","choices":[{{"index":0,"delta":{{"content":"x"}}}}],"x":{extra}}}'
            )
            called = b"text/event-stream" if body.get("stream") else b"application/json"
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-type", called)]})
            data = f"data: {event}\n\ndata: [DONE]\n\n" if body.get("stream") else event
            await send({"type": "http.response.body", "body": data.encode()})
            return

        async def reply(status: int, data: bytes, *more: tuple[bytes, bytes]) -> None:
            kind = (b"content-type", b"application/json")
            start = {"type": "http.response.start", "status": status, "headers": [kind, *more]}
            await send(start)
            await send({"type": "http.response.body", "body": data})

        async def part(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        if words.startswith("status "):
            status = int(words.split()[1])
            error = {"message": f"upstream says {status}", "param": "n", "code": None}
            place = (b"location", b"http://127.0.0.1:1/")
            echoed = {"error": {**error, "key": headers[b"authorization"].decode()}}
            await reply(status, json.dumps(echoed).encode(), place)
        elif words == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
        elif body.get("stream"):
            start = {"type": "http.response.start", "status": 200}
            kind = [(b"content-type", b"text/event-stream")]
            await send({**start, "headers": kind})
            await part(b'data: {"model": "their-name", "choices": [{"text": "a"}]}\n\nda')
            await part(b'ta: {"mod')
            await self.go_on.wait()
            await part(b'el":"their-name","choices":[{"text":"\\"model\\":\\"their-name\\""}]}\n\n')
            if words == "break":
                raise ConnectionResetError
            await part(b"data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b""})
        else:
            text = 'I am "model":"their-name".'
            fields = {"model": "their-name", "choices": [{"message": {"content": text}}]}
            await reply(200, json.dumps(fields).encode())


def config(url: str, **more: Any) -> Config:
    remote = {"url": url + "/base/v1", "model": "their-name", "api_key_env": "FAR_KEY", **more}
    return simulated(
        {"cpu": {}},
        experts={
            "general": {"model": "m", "categories": ["general"]},
            "far": {"remote": remote, "categories": ["far"]},
        },
    )


@asynccontextmanager
async def far_site(**more: Any) -> AsyncIterator[tuple[RunningGateway, Upstream]]:
    upstream = Upstream()
    async with serving(upstream) as served, run_gateway(config(served.url, **more)) as s:
        yield s, upstream
        upstream.go_on.set()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)


def far(words: str = "hello", **more: Any) -> dict[str, Any]:
    return chat(words, model="far", **more)


async def test_remote_expert_whole_answer_has_our_model_name() -> None:
    async with far_site() as (s, upstream):
        status, headers, body = await s.ask(far(seed=3))
        assert (status, body["model"], headers["x-coe-expert"]) == (200, "far", "far")
        # What the model says is not ours to change.
        assert body["choices"][0]["message"]["content"] == 'I am "model":"their-name".'
        assert upstream.asked[0]["model"] == "their-name"
        assert upstream.asked[0]["seed"] == 3
        assert upstream.keys == [f"Bearer {KEY}".encode()]


async def test_remote_expert_stream_cut_anywhere_has_our_model_name() -> None:
    async with far_site() as (s, upstream):
        async with s.post(far(stream=True)) as reply:
            first = await reply.content.readany()
            assert b'"model":"far"' in first
            upstream.go_on.set()
            received = events(first + await reply.read())
        assert received[-1] == "[DONE]"
        chunks = [json.loads(item) for item in received[:-1]]
        assert [chunk["model"] for chunk in chunks] == ["far", "far"]
        assert chunks[1]["choices"][0]["text"] == '"model":"their-name"'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (400, 400),
        (404, 404),
        (422, 422),
        (401, 502),
        (403, 502),
        (302, 502),
        (429, 503),
        (500, 502),
        (503, 503),
    ],
)
async def test_remote_expert_errors_become_ours_without_its_key(
    theirs: int, ours: int, stream: bool
) -> None:
    async with far_site() as (s, upstream):
        async with s.post(far(f"status {theirs}", stream=stream)) as reply:
            assert reply.status == ours
            text = await reply.text()
            headers = str(reply.headers)
        error = json.loads(text)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        if ours == theirs < 500:
            assert (error["message"], error["param"]) == (f"upstream says {theirs}", "n")
        else:
            assert error["code"] == "upstream_error"
        assert KEY not in text + headers
        assert "127.0.0.1" not in text + headers
        assert len(upstream.asked) == 1


async def test_remote_expert_stream_that_breaks_ends_with_an_error_event() -> None:
    async with far_site() as (s, upstream):
        upstream.go_on.set()
        async with s.post(far("break", stream=True)) as reply:
            assert reply.status == 200
            received = events(await reply.read())
        assert json.loads(received[-1])["error"]["code"] == "upstream_error"


async def test_remote_expert_stream_that_stalls_ends_with_an_error_event() -> None:
    async with far_site(stall_timeout_s=1.0) as (s, _):
        async with s.post(far(stream=True)) as reply:
            received = events(await reply.read())
        assert '"model":"far"' in received[0]
        error = json.loads(received[-1])["error"]
        assert error["code"] == "upstream_error"
        assert "sent nothing for 1 s" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_remote_expert_request_is_closed_when_the_client_leaves(stream: bool) -> None:
    async with far_site() as (s, upstream):
        asking = asyncio.create_task(s.ask(far("hang", stream=stream)))
        await until(lambda: len(upstream.asked) == 1, "it is asked")
        asking.cancel()
        await asyncio.wait_for(upstream.gone.wait(), 60)


@pytest.mark.parametrize("stream", [False, True])
async def test_remote_expert_deadline_is_kept(stream: bool) -> None:
    async with far_site() as (s, _):
        late = {"x-coe-deadline-ms": "200"}
        status, _, body = await s.ask(far("hang", stream=stream), headers=late)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


async def test_remote_expert_concurrency_is_limited() -> None:
    async with far_site(max_in_flight=1, max_queued_requests=1) as (s, upstream):
        first = asyncio.create_task(s.ask(far("hang")))
        await until(lambda: len(upstream.asked) == 1, "one is there")
        second = asyncio.create_task(s.ask(far()))
        seat = s.gateway.remote_pools["far"]
        await until(lambda: seat.waiting == 1, "one waits here")
        status, headers, body = await s.ask(far())
        assert (status, body["error"]["code"]) == (503, "over_capacity")
        assert headers["retry-after"]
        first.cancel()
        assert (await second)[0] == 200
        await until(lambda: seat.running == 0, "its places are free")


async def test_remote_expert_without_its_key_is_failed_and_others_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FAR_KEY")
    async with far_site() as (s, upstream):
        async with s.get("/v1/models/far") as reply:
            data = (await reply.json())["coe"]
        assert data["state"] == "failed"
        assert "FAR_KEY" in data["reason"]
        status, _, body = await s.ask(far())
        assert (status, body["error"]["code"]) == (503, "expert_failed")
        assert (await s.ask(chat()))[0] == 200
        assert upstream.asked == []


async def test_remote_expert_unreachable_is_a_502_without_its_address() -> None:
    async with run_gateway(config("http://127.0.0.1:1")) as s:
        status, _, body = await s.ask(far())
        assert (status, body["error"]["code"]) == (502, "upstream_error")
        assert "127.0.0.1" not in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_auto_falls_back_from_a_remote_to_a_local_expert(stream: bool) -> None:
    async with run_gateway(config("http://127.0.0.1:1")) as s:
        body = chat(model="auto/far", stream=stream)
        async with s.post(body) as reply:
            assert reply.status == 200
            assert reply.headers["x-coe-expert"] == "general"
            assert b"general:" in await reply.read()


async def test_remote_expert_unsupported_endpoint_is_a_404() -> None:
    async with far_site() as (s, _):
        status, _, body = await s.ask({"model": "far", "prompt": "x"}, "/tokenize")
        assert (status, body["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_remote_expert_reply_nested_too_deep_is_a_502(path: str) -> None:
    async with far_site() as (s, _):
        for stream in (False, True):
            status, _, body = await s.ask(far("deep 254", stream=stream), path)
            assert status == 502
            error = body["error"] if path == "/api/chat" else body["error"]["message"]
            assert error == "expert 'far': its endpoint's reply is nested more than 254 levels deep"
        async with s.post(far("deep 253", stream=True), path) as reply:
            assert reply.status == 200


async def test_remote_expert_too_deeply_nested_body_is_refused() -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    async with far_site() as (s, upstream):
        raw = json.dumps({"model": "far", "messages": [{"role": "user", "content": deep}]})
        json_type = {"content-type": "application/json"}
        async with s.client.post(
            s.url + "/v1/chat/completions", data=raw, headers=json_type
        ) as reply:
            assert reply.status == 400
        assert upstream.asked == []
