"""Pictures and embeddings over HTTP: which experts answer, and which requests are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.in_process_service import chat, run_gateway, simulated
from tests.unit.gateway.request.test_media_tokens import picture, png

_TEXT = {"model": "m", "categories": ["general"], "description": "reads"}
_SEES = {"model": "m", "capabilities": ["chat", "vision"], "description": "sees"}


def _shown(model: str, **more: Any) -> dict[str, Any]:
    text = {"type": "text", "text": "what is this?"}
    message = {"role": "user", "content": [text, picture(png(640, 480, 100_000))]}
    return {**chat(model=model, **more), "messages": [message]}


@pytest.mark.parametrize("stream", [False, True])
async def test_picture_request_is_answered_by_vision_experts_only(stream: bool) -> None:
    experts = {"text": _TEXT, "sees": _SEES}
    async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=experts)) as s:
        async with s.get("/v1/models") as reply:
            answer = await reply.json()
        able = {item["id"]: item["coe"]["capabilities"] for item in answer["data"]}
        assert "vision" in able["sees"]
        assert "vision" in able["auto"]
        assert "vision" not in able["text"]
        for model in ("auto", "sees"):
            async with s.post(_shown(model, stream=stream)) as reply:
                assert (reply.status, reply.headers["x-coe-expert"]) == (200, "sees")
        status, _, answer = await s.ask(_shown("text", stream=stream))
        assert (status, answer["error"]["param"]) == (400, "model")
        assert "expert 'text' can't do vision" in answer["error"]["message"]


async def test_auto_embeddings_use_one_vector_space() -> None:
    def embeds(space: str) -> dict[str, Any]:
        return {"model": "m", "capabilities": ["embeddings"], "space": space}

    for spaces, status in ((("s", "s"), 200), (("s", "t"), 400)):
        experts = {"chat": _TEXT, "a": embeds(spaces[0]), "b": embeds(spaces[1])}
        async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=experts)) as s:
            body = {"model": "auto", "input": ["one", "two"]}
            got, headers, answer = await s.ask(body, "/v1/embeddings")
            assert got == status
            if status == 200:
                assert headers["x-coe-expert"] in ("a", "b")
                assert len(answer["data"]) == 2
            else:
                assert "vectors of several spaces" in answer["error"]["message"]
            got, headers, _ = await s.ask({**body, "model": "b"}, "/v1/embeddings")
            assert (got, headers["x-coe-expert"]) == (200, "b")
