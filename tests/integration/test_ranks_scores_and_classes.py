"""Rerank, score and classify over HTTP: who answers, who is refused, and what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.http.asgi_helpers import read_body
from tests.support.in_process_service import chat, run_gateway, serving, simulated

_TEXT = {"model": "m", "categories": ["general"]}
_RANKER = {"model": "r", "capabilities": ["rerank", "score"], "price": {"prompt": 10**6}}
_CLASSIFIER = {"model": "c", "capabilities": ["classify"]}
_EXPERTS = {"text": _TEXT, "ranker": _RANKER, "classifier": _CLASSIFIER}
_DOCUMENTS = ["two trains leave", "the ship is in the harbour", "a harbour"]
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": "a ship in the harbour", "documents": _DOCUMENTS},
    "/v1/score": {"text_1": "a ship in the harbour", "text_2": _DOCUMENTS},
    "/v1/classify": {"input": _DOCUMENTS},
}
_ABLE = {"/v1/rerank": "ranker", "/v1/score": "ranker", "/v1/classify": "classifier"}


async def test_auto_asks_experts_that_can_and_others_are_refused() -> None:
    async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=_EXPERTS)) as s:
        async with s.get("/v1/models") as reply:
            able = {m["id"]: m["coe"]["capabilities"] for m in (await reply.json())["data"]}
        assert {"rerank", "score", "classify"} <= set(able["auto"])
        for path, body in _BODIES.items():
            what = path.removeprefix("/v1/")
            assert what in able[_ABLE[path]]
            for model in ("auto", _ABLE[path]):
                status, headers, answer = await s.ask({"model": model, **body}, path)
                assert (status, headers["x-coe-expert"]) == (200, _ABLE[path])
                assert answer["model"] == _ABLE[path]
                assert answer["usage"]["prompt_tokens"] > 0
            status, _, answer = await s.ask({"model": "text", **body}, path)
            assert (status, answer["error"]["param"]) == (400, "model")
            assert f"can't do {what}" in answer["error"]["message"]
            assert answer["error"]["message"].endswith(f"these can: {_ABLE[path]}")
        assert (await s.ask(chat(model="auto")))[1]["x-coe-expert"] == "text"


async def test_documents_are_ranked_and_priced_by_the_tokens_of_all_pairs() -> None:
    body = {**_BODIES["/v1/rerank"], "model": "ranker", "top_n": 2}
    async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=_EXPERTS)) as s:
        status, _, answer = await s.ask(body, "/v1/rerank")
        assert status == 200
        assert [item["index"] for item in answer["results"]] == [1, 2]
        tokens = answer["usage"]["prompt_tokens"]
        assert tokens == 3 * 5 + 3 + 6 + 2
        assert answer["usage"]["coe"]["cost"] == pytest.approx(tokens)
        low = {**body, "coe": {"max_cost": 50}}
        status, _, answer = await s.ask(low, "/v1/rerank")
        assert (status, answer["error"]["code"]) == (400, "infeasible_bounds")


@pytest.mark.parametrize("path", _BODIES)
async def test_more_texts_than_allowed_are_refused(path: str) -> None:
    config = simulated(
        {"cpu": {"tokens": 4}}, experts=_EXPERTS, server={"limits": {"max_inputs": 2}}
    )
    async with run_gateway(config) as s:
        status, _, answer = await s.ask({"model": "auto", **_BODIES[path]}, path)
        assert status == 400
        assert "holds 3 prompts; at most 2" in answer["error"]["message"]


class _Ranker:
    """Somebody else's server, which tells total tokens only, and numbers that are none."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await read_body(receive, 10**6))
        self.asked.append((scope["path"], body))
        score = float("nan") if "nan" in json.dumps(body) else 0.5
        answer = {
            "model": "theirs",
            "results": [{"index": 0, "relevance_score": score}],
            "data": [{"index": 0, "label": "x", "probs": [score], "num_classes": 1}],
            "usage": {"total_tokens": 12},
        }
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def test_remote_experts_rank_and_classify() -> None:
    ranker = _Ranker()
    async with serving(ranker) as upstream:
        remote = {"url": f"{upstream.url}/v1", "model": "theirs"}
        able = ["rerank", "classify"]
        price = {"prompt": 10**6, "completion": 10**6}
        experts = {"text": _TEXT, "far": {"remote": remote, "capabilities": able, "price": price}}
        async with run_gateway(simulated({"cpu": {"tokens": 4}}, experts=experts)) as s:
            for path, theirs in (("/v1/rerank", "/v1/rerank"), ("/v1/classify", "/classify")):
                status, headers, answer = await s.ask({"model": "auto", **_BODIES[path]}, path)
                assert (status, headers["x-coe-expert"]) == (200, "far")
                assert answer["model"] == "far"
                assert answer["usage"]["coe"]["cost"] == pytest.approx(12)
                assert ranker.asked[-1] == (theirs, {"model": "theirs", **_BODIES[path]})
            body = {"model": "far", "query": "nan", "documents": ["a"]}
            status, _, answer = await s.ask(body, "/v1/rerank")
            assert (status, answer["error"]["code"]) == (502, "upstream_error")
