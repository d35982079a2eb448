"""The response cache: opt-in twice, bounded, separate by tenant, exact and similar."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from service.config import Config
from service.gateway.cache.response_cache import CacheSession, ResponseCache
from service.gateway.request.parsing import parse_request
from service.store.volatile_store import MemoryVolatileStore
from service.types import Tenant
from tests.support.in_process_service import RunningGateway, chat, run_gateway, simulated
from tests.support.polling import until


def config(**cache: Any) -> Config:
    given = simulated(
        {"cpu": {"tokens": 4}}, experts={"general": {"model": "m"}, "x": {"model": "m"}}
    )
    data = given.model_dump(mode="json")
    data["tenants"] = {"default": {"cache": {"mode": "similar", **cache}}}
    return Config.model_validate(data)


async def ask(
    s: RunningGateway, wish: str | None, text: str = "What is the sea?", **more: Any
) -> Any:
    headers = {} if wish is None else {"x-coe-cache": wish}
    status, answer, body = await s.ask(chat(text, **more), headers=headers)
    assert status == 200
    return answer, body


async def test_cache_equal_request_is_a_hit() -> None:
    async with run_gateway(config()) as s:
        first, body = await ask(s, "exact")
        assert first["x-coe-cache"] == "miss"
        again, same = await ask(s, "exact")
        assert again["x-coe-cache"] == "exact"
        assert again["x-coe-expert"] == "general"
        for result in (same, body):
            result["usage"].pop("coe")
        assert same == body
        async with s.get("/metrics") as reply:
            text = await reply.text()
        assert re.search(r'coe_cache_lookups_total\{.*kind="exact",result="hit".*\} 1', text)


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 3},
        {"temperature": 0.5},
        {"model": "x"},
        {"seed": 1},
        {"stream": False},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "What is the sea?"},
            ]
        },
    ],
)
async def test_cache_other_parameters_are_a_miss(more: dict[str, Any]) -> None:
    async with run_gateway(config()) as s:
        await ask(s, "exact")
        answer, _ = await ask(s, "exact", **more)
        assert answer["x-coe-cache"] == "miss"


async def test_cache_needs_opt_in_of_tenant_and_request() -> None:
    async with run_gateway(config()) as s:
        for wish in (None, "off"):
            answer, _ = await ask(s, wish)
            assert "x-coe-cache" not in answer
        answer, _ = await ask(s, "exact")
        assert answer["x-coe-cache"] == "miss"
    async with run_gateway(simulated({"cpu": {"tokens": 4}})) as s:
        for _ in range(2):
            answer, _ = await ask(s, "exact")
            assert "x-coe-cache" not in answer
    async with run_gateway(config()) as s:
        status, _, answer = await s.ask(chat(), headers={"x-coe-cache": "always"})
        assert (status, answer["error"]["param"]) == (400, "x-coe-cache")


async def test_cache_similar_words_are_a_hit_in_semantic_mode() -> None:
    async with run_gateway(config()) as s:
        _, body = await ask(s, "similar", "What is the depth of the sea?")
        answer, same = await ask(s, "similar", "please, what is the depth of the sea")
        assert answer["x-coe-cache"] == "similar"
        assert float(answer["x-coe-cache-similarity"]) >= 0.8
        assert same["id"] == body["id"]
        assert same["choices"] == body["choices"]
        answer, _ = await ask(s, "exact", "please what is the depth of the sea")
        assert answer["x-coe-cache"] == "miss"
        answer, _ = await ask(s, "similar", "What is the depth of the lake?")
        assert answer["x-coe-cache"] == "miss"
        answer, _ = await ask(s, "similar", "please, what is the depth of the sea", max_tokens=2)
        assert answer["x-coe-cache"] == "miss"


async def test_cache_tenant_may_allow_exact_matches_only() -> None:
    async with run_gateway(config(mode="exact")) as s:
        await ask(s, "similar", "What is the depth of the sea?")
        answer, _ = await ask(s, "similar", "what is the depth of the sea")
        assert answer["x-coe-cache"] == "miss"


async def test_cache_entries_expire() -> None:
    async with run_gateway(config(ttl_s=0.05)) as s:
        await ask(s, "exact")

        async def gone() -> bool:
            answer, _ = await ask(s, "exact")
            return bool(answer["x-coe-cache"] == "miss")

        await until(gone, "it has expired")


async def test_cache_stream_is_stored_whole_and_replayed() -> None:
    async with run_gateway(config()) as s:
        bodies = []
        for kind in ("miss", "exact"):
            async with s.post(chat(stream=True), headers={"x-coe-cache": "exact"}) as reply:
                assert reply.headers["x-coe-cache"] == kind
                assert reply.headers["content-type"].startswith("text/event-stream")
                bodies.append(await reply.read())
        assert bodies[0] == bodies[1]


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("What is the sea?"),
    "/v1/completions": {"model": "general", "prompt": "What is the sea?"},
    "/v1/messages": {**chat("What is the sea?"), "max_tokens": 64},
    "/v1/responses": {"model": "general", "input": "What is the sea?"},
}
EXACT = {"x-coe-cache": "exact"}


async def kinds_of(
    s: RunningGateway, path: str, *bodies: dict[str, Any]
) -> list[tuple[str, bytes]]:
    """Send each body; return what the cache said of it, and the reply."""
    found = []
    for body in bodies:
        async with s.post(body, path, headers=EXACT) as reply:
            assert reply.status == 200, await reply.read()
            found.append((reply.headers["x-coe-cache"], await reply.read()))
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_cache_repeats_complete_answers_of_every_endpoint(path: str, stream: bool) -> None:
    body = {**BODIES[path], "stream": stream}
    async with run_gateway(config()) as s:
        (first, made), (second, same) = await kinds_of(s, path, body, body)
        assert (first, second) == ("miss", "exact")
        # All but what the reply cost.
        cost = re.compile(rb'"coe":\{.*?"calls":\[.*?\](?:,"cached":true)?[^}]*\}(?:,|(?=\}))')
        assert cost.sub(b"", same) == cost.sub(b"", made)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_cache_repeats_a_cut_answer_only_for_the_same_bound(path: str, stream: bool) -> None:
    bound = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**BODIES[path], "stream": stream, bound: 2}
    async with run_gateway(config()) as s:
        kinds = [kind for kind, _ in await kinds_of(s, path, body, body, {**body, bound: 3})]
        assert kinds == ["miss", "exact", "miss"]


@pytest.mark.parametrize("path", BODIES)
async def test_cache_keeps_no_broken_stream_of_any_endpoint(path: str) -> None:
    given = config().model_dump(mode="json")
    given["pools"]["cpu"]["simulated"]["fail"] = "mid_stream"
    body = {**BODIES[path], "stream": True}
    async with run_gateway(Config.model_validate(given)) as s:
        assert [kind for kind, _ in await kinds_of(s, path, body, body)] == ["miss", "miss"]


async def test_cache_repeats_no_metadata_of_another_response() -> None:
    bodies = [{**BODIES["/v1/responses"], "metadata": {"of": name}} for name in ("a", "b", "b")]
    async with run_gateway(config()) as s:
        found = await kinds_of(s, "/v1/responses", *bodies)
        assert [kind for kind, _ in found] == ["miss", "miss", "exact"]
        assert [json.loads(body)["metadata"]["of"] for _, body in found] == ["a", "b", "b"]


async def test_cache_stream_with_usage_is_no_hit_without_include_usage() -> None:
    async with run_gateway(config()) as s:
        for options, kind in (({"include_usage": True}, "miss"), ({}, "miss"), ({}, "exact")):
            body = chat(stream=True, stream_options=options)
            async with s.post(body, headers={"x-coe-cache": "exact"}) as reply:
                assert reply.headers["x-coe-cache"] == kind
                assert (b'"choices":[]' in await reply.read()) == bool(options)


async def test_cache_stores_no_errors_and_no_broken_streams() -> None:
    broken = config().model_dump(mode="json")
    broken["pools"]["cpu"]["simulated"]["fail"] = "mid_stream"
    async with run_gateway(Config.model_validate(broken)) as s:
        for _ in range(2):
            async with s.post(chat(stream=True), headers={"x-coe-cache": "exact"}) as reply:
                assert reply.headers["x-coe-cache"] == "miss"
                await reply.read()
    async with run_gateway(config()) as s:
        for _ in range(2):
            status, _, _ = await s.ask(chat(n=0), headers={"x-coe-cache": "exact"})
            assert status == 400


async def test_cache_size_is_bounded() -> None:
    async with run_gateway(config(max_entries=4, max_entry_bytes=100_000)) as s:
        for i in range(20):
            await ask(s, "similar", f"question {i} about the sea")
        volatile = s.gateway.volatile
        assert isinstance(volatile, MemoryVolatileStore)
        names = [name for name in volatile._values if name.startswith("cache/default/")]
        assert 0 < len([name for name in names if "/answer/" in name]) <= 4
        assert len([name for name in names if "/shelf/" in name]) <= 4
    async with run_gateway(config(max_entry_bytes=10)) as s:
        for _ in range(2):
            answer, _ = await ask(s, "exact")
            assert answer["x-coe-cache"] == "miss"


@pytest.mark.parametrize("stream", [False, True])
async def test_cache_hit_costs_nothing(stream: bool) -> None:
    priced = json.loads(config().model_dump_json())
    priced["experts"]["general"]["price"] = {"prompt": 1000.0, "completion": 1000.0}
    body = chat(stream=stream, stream_options={"include_usage": True} if stream else None)
    collected: list[dict[str, Any]] = []
    async with run_gateway(Config.model_validate(priced)) as s:
        for _ in range(2):
            async with s.post(body, headers={"x-coe-cache": "exact"}) as reply:
                text = (await reply.text()).strip()
            if stream:
                text = text.removesuffix("data: [DONE]").strip().rpartition("data: ")[2]
            collected.append(json.loads(text)["usage"])
    first, second = collected
    assert first["coe"]["cost"] > 0
    assert second["coe"] == {
        "expert": "general",
        "recipe": "general",
        "cost": 0.0,
        "calls": [],
        "cached": True,
    }
    assert {n: v for n, v in second.items() if n != "coe"} == {
        n: v for n, v in first.items() if n != "coe"
    }


async def test_cache_tenant_names_with_a_slash_do_not_collide() -> None:
    given = Config.model_validate(
        {
            "experts": {"big": {"model": "m"}},
            "pools": {"cpu": {"engine": "simulated"}},
            "tenants": {
                "a": {"cache": {"mode": "similar", "max_entries": 1}},
                "a/shelf": {"cache": {"mode": "exact", "max_entries": 1}},
                "a/answer": {"cache": {"mode": "exact", "max_entries": 1}},
            },
        }
    )
    cache = ResponseCache(given, MemoryVolatileStore(10**6))

    async def visit(tenant: str, how: bytes) -> CacheSession:
        raw = json.dumps(chat(model="big")).encode()
        request = parse_request(
            "/v1/chat/completions", raw, {b"x-coe-cache": how}, 1, Tenant(tenant, "k")
        )

        async def send(message: Any) -> None:
            del message

        return await cache.begin(request, send)

    for tenant in ("a/shelf", "a/answer"):
        made = await visit(tenant, b"exact")
        head = [(b"content-type", b"application/json"), (b"x-coe-expert", b"big")]
        await made.send({"type": "http.response.start", "status": 200, "headers": head})
        await made.send({"type": "http.response.body", "body": b"{}"})
        await made.store_answer(by_own_bound=False)
        assert (await visit(tenant, b"exact")).hit is not None
    assert (await visit("a", b"similar")).hit is None


async def test_cache_answer_clipped_by_max_cost_is_not_stored() -> None:
    given = config().model_dump(mode="json")
    given["experts"]["general"]["price"] = {"completion": 1_000_000}
    given["pools"]["cpu"]["simulated"]["tokens"] = 100
    async with run_gateway(Config.model_validate(given)) as s:
        answer, body = await ask(s, "exact", coe={"max_cost": 70.5})
        assert (answer["x-coe-cache"], answer["x-coe-max-tokens"]) == ("miss", "70")
        assert body["usage"]["completion_tokens"] == 70
        answer, body = await ask(s, "exact")
        assert (answer["x-coe-cache"], body["usage"]["completion_tokens"]) == ("miss", 100)
        # One's own bound is part of the request, and so of what is kept.
        for kind in ("miss", "exact"):
            answer, body = await ask(s, "exact", max_tokens=3)
            assert (answer["x-coe-cache"], body["choices"][0]["finish_reason"]) == (kind, "length")
        # A bound that cuts nothing is another request still: it decides who answers.
        for kind in ("miss", "exact"):
            answer, _ = await ask(s, "exact", coe={"max_cost": 10**6})
            assert answer["x-coe-cache"] == kind


async def test_cache_answer_clipped_by_a_budget_is_not_stored() -> None:
    given = config().model_dump(mode="json")
    given["experts"]["general"]["price"] = {"completion": 1_000_000}
    given["budgets"] = {"all": {"amount": 9, "period": "day"}}
    async with run_gateway(Config.model_validate(given)) as s:
        answer, body = await ask(s, "exact", max_tokens=8)
        assert body["usage"]["completion_tokens"] == 8
        answer, body = await ask(s, "exact", text="Another one?", max_tokens=8)
        assert (answer["x-coe-max-tokens"], body["usage"]["completion_tokens"]) == ("1", 1)
        status, answer, _ = await s.ask(
            chat("Another one?", max_tokens=8), headers={"x-coe-cache": "exact"}
        )
        # Not from the cache: there is nothing left to answer it with.
        assert status == 429
        # What was not cut is there.
        answer, _ = await ask(s, "exact", max_tokens=8)
        assert answer["x-coe-cache"] == "exact"


async def test_cache_hits_count_as_requests() -> None:
    given = config().model_dump(mode="json")
    given["tenants"]["default"]["requests_per_min"] = 3
    async with run_gateway(Config.model_validate(given)) as s:
        for kind in ("miss", "exact", "exact"):
            answer, _ = await ask(s, "exact")
            assert answer["x-coe-cache"] == kind
        status, _, answer = await s.ask(chat("What is the sea?"), headers={"x-coe-cache": "exact"})
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
