"""OpenAI's client sends recordings: who transcribes them, what they cost, and who is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest

from tests.support.in_process_service import (
    ADMIN_KEY,
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)
from tests.support.recordings import wav

PATH = "/v1/audio/transcriptions"
_PRICE = {"prompt": 10**6, "completion": 10**6}
_EXPERTS: dict[str, Any] = {
    "text": {"model": "m", "categories": ["general"]},
    "ear": {"model": "w", "capabilities": ["transcription"], "price": _PRICE},
}


@asynccontextmanager
async def _service(
    experts: dict[str, Any] = _EXPERTS, **more: Any
) -> AsyncIterator[tuple[RunningGateway, openai.AsyncOpenAI]]:
    async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=experts, **more)) as s:
        client = openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="none", max_retries=0)
        async with client:
            yield s, client


async def _post(s: RunningGateway, **fields: Any) -> tuple[int, Any]:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, value, filename="a.wav" if name == "file" else None)
    async with s.client.post(s.url + PATH, data=form) as reply:
        return reply.status, await reply.json()


async def test_auto_asks_an_expert_that_transcribes() -> None:
    async with _service() as (s, client):
        async with s.get("/v1/models/ear") as reply:
            assert (await reply.json())["coe"]["capabilities"] == ["transcription"]
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with s.get("/admin/experts", headers=admin) as reply:
            (account,) = (await reply.json())["pools"].values()
        assert account["ear"]["capabilities"] == ["transcription"]
        sent: dict[str, Any] = {"file": ("a.wav", wav(2.0)), "language": "en"}
        told = await client.audio.transcriptions.create(model="auto", **sent)
        assert told.text.startswith("ear: ")
        form = "verbose_json"
        more = await client.audio.transcriptions.create(model="ear", response_format=form, **sent)
        assert (more.text, more.duration) == (told.text, 2.0)
        text = await client.audio.transcriptions.create(model="ear", response_format="text", **sent)
        assert str(text) == told.text
        with pytest.raises(openai.BadRequestError, match=r"can't do transcription.*these can: ear"):
            await client.audio.transcriptions.create(model="text", **sent)
        with pytest.raises(openai.NotFoundError):
            await client.audio.transcriptions.create(model="nobody", **sent)
        status, _, answer = await s.ask(chat(model="ear"))
        assert (status, answer["error"]["param"]) == (400, "model")


async def test_transcription_is_priced_by_its_seconds() -> None:
    async with _service() as (s, _):
        status, answer = await _post(s, model="ear", file=wav(3.0))
        assert status == 200
        assert answer["usage"]["seconds"] == 3
        assert answer["usage"]["coe"]["cost"] == pytest.approx(3 * 50)
        form = aiohttp.FormData({"model": "ear"})
        form.add_field("file", wav(3.0), filename="a.wav")
        headers = {"x-coe-max-cost": "10"}
        async with s.client.post(s.url + PATH, data=form, headers=headers) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (
                400,
                "infeasible_bounds",
            )


async def test_recordings_that_are_none_or_too_large_are_refused() -> None:
    limits = {"limits": {"max_audio_bytes": 50_000}, "max_body_bytes": 1000}
    async with _service(server=limits) as (s, _):
        status, _ = await _post(s, file=wav(2.0))
        assert status == 200, "larger than other bodies"
        for fields, status, param in (
            ({"file": wav(4.0)}, 413, None),
            ({"file": b"no sound"}, 400, "file"),
            ({"file": b""}, 400, "file"),
            ({"model": "ear"}, 400, "file"),
            ({"file": wav(1.0), "stream": "true"}, 400, "stream"),
            ({"file": wav(1.0), "response_format": "srt"}, 400, "response_format"),
        ):
            got, answer = await _post(s, **fields)
            assert (got, answer["error"]["param"]) == (status, param), fields
        status, _, answer = await s.ask({"model": "ear", "file": "UklGRg=="}, PATH)
        assert status == 415
        assert "multipart/form-data" in answer["error"]["message"]


class _Whisper:
    """Somebody else's server: it repeats what it got."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.asked.append((scope["path"], dict(scope["headers"])[b"content-type"], body))
        kind, text = b"application/json", b'{"text": "heard"}'
        if b"srt" in body:
            kind, text = b"text/plain", b"1\n00:00:00,000 --> 00:00:01,000\nheard\n"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


async def test_remote_experts_get_the_recording_as_a_form() -> None:
    whisper = _Whisper()
    async with serving(whisper) as upstream:
        remote = {"url": f"{upstream.url}/v1", "model": "theirs"}
        far = {"remote": remote, "capabilities": ["transcription"], "price": _PRICE}
        async with _service({"text": _EXPERTS["text"], "far": far}) as (s, client):
            told = await client.audio.transcriptions.create(model="auto", file=("a.wav", wav(1.0)))
            assert told.text == "heard"
            path, kind, body = whisper.asked[0]
            assert path == PATH
            assert kind.startswith(b"multipart/form-data; boundary=")
            assert wav(1.0) in body
            assert b"theirs" in body
            srt = await client.audio.transcriptions.create(
                model="far", file=("a.wav", wav(1.0)), response_format="srt"
            )
            assert str(srt).endswith("heard\n")
            async with s.get("/v1/usage") as reply:
                assert reply.status == 200
