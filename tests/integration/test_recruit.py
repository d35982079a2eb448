"""Recruits over HTTP: who answers depends on the prompt, and an aggregator joins the answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.config import Config
from tests.support.in_process_service import RunningGateway, chat, events, run_gateway, serving
from tests.support.scripted_experts import ScriptedExperts, shown_in, text_of

LINES = {name: [f"The answer is {i}."] for i, name in enumerate("abcd")}


def config(url: str, recruit: dict[str, Any], **recipe: Any) -> Config:
    def far(name: str, price: float, **quality: float) -> dict[str, Any]:
        return {
            "remote": {"url": url + "/v1", "model": name},
            "price": {"prompt": price, "completion": price},
            "quality": quality,
        }

    return Config.model_validate(
        {
            "router": {"artifact": "none"},
            "experts": {
                "a": {
                    **far("a", 1, general=0.9, law=0.3, math=0.2),
                    "categories": ["general", "law", "math"],
                },
                "b": far("b", 1, general=0.7, law=0.9, math=0.1),
                "c": far("c", 1, general=0.2, law=0.8, math=0.8),
                "d": far("d", 1, general=0.1, law=0.1, math=0.7),
            },
            "recipes": {"panel": {"kind": "recruit", "recruit": recruit, **recipe}},
        }
    )


ALL = {"k": 2, "among": ["a", "b", "c", "d"]}


@asynccontextmanager
async def panel(
    recruit: dict[str, Any] | None = None, **recipe: Any
) -> AsyncIterator[tuple[RunningGateway, ScriptedExperts]]:
    cast = ScriptedExperts(LINES)
    async with (
        serving(cast) as served,
        run_gateway(config(served.url, recruit or ALL, **recipe)) as s,
    ):
        yield s, cast


def content(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def roles(reply: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["expert"], call["role"]) for call in reply["usage"]["coe"]["calls"]]


async def test_recruit_takes_the_best_experts_for_the_prompt() -> None:
    async with panel() as (s, cast):
        status, headers, reply = await s.ask(chat("hm?", model="panel"))
        assert status == 200
        assert re.fullmatch(r"recruit\(2 of 4, [0-9a-f]{4} -> best\)", headers["x-coe-recipe"])
        assert roles(reply) == [("a", "answer"), ("b", "answer"), ("a", "aggregate")]
        assert content(reply) == "together: The answer is 0. + The answer is 1."
        assert reply["usage"]["coe"]["cost"] == pytest.approx(3 * 15 / 1e6)
        [body] = cast.roles("aggregate")
        assert text_of(body).startswith("hm?\n\n")
        assert [title for title, _ in shown_in(text_of(body))] == ["Answer 1", "Answer 2"]


@pytest.mark.parametrize(
    ("category", "expected"), [("law", ["b", "c"]), ("math", ["c", "d"]), ("general", ["a", "b"])]
)
async def test_recruit_members_depend_on_the_category(category: str, expected: list[str]) -> None:
    among = {"k": 2, "among": ["a", "b", "c", "d"], "aggregator": "d"}
    quality = {"general": 1.0, "law": 1.0, "math": 1.0}
    async with panel(among, quality=quality) as (s, _):
        body = chat(model=f"auto:best/{category}")
        _, _, route = await s.ask(body, "/v1/route")
        found = next(c for c in route["candidates"] if c["kind"] == "recruit")
        assert found["members"] == expected
        assert found["later"] == ["d"]


async def test_recruit_streams_the_aggregator() -> None:
    body = chat(model="panel", stream=True, stream_options={"include_usage": True})
    async with panel() as (s, cast), s.post(body) as reply:
        assert reply.status == 200
        chunks = [json.loads(event) for event in events(await reply.read())[:-1]]
        parts = [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"]]
        assert len(parts) > 3, "it came in pieces"
        assert "".join(parts).strip() == "together: The answer is 0. + The answer is 1."
        calls = chunks[-1]["usage"]["coe"]["calls"]
        assert [call["role"] for call in calls] == ["answer", "answer", "aggregate"]
        assert [b.get("stream", False) for b in cast.asked] == [False, False, True]


@pytest.mark.parametrize("stream", [False, True])
async def test_recruit_broken_aggregator_leaves_the_best_member(stream: bool) -> None:
    async with panel() as (s, cast):
        cast.broken = {("a", "aggregate")}
        async with s.post(chat(model="panel", stream=stream)) as reply:
            assert (reply.status, reply.headers["x-coe-expert"]) == (200, "a")
            assert b"The answer is 0." in await reply.read()


async def test_recruit_members_that_agree_need_no_aggregator() -> None:
    async with panel() as (s, cast):
        cast.lines = {name: ["The answer is 5."] for name in "abcd"}
        _, _, reply = await s.ask(chat(model="panel"))
        assert roles(reply) == [("a", "answer"), ("b", "answer")]
        assert content(reply) == "The answer is 5."


@pytest.mark.parametrize("stream", [False, True])
async def test_recruit_deadline_gives_a_member_s_answer(stream: bool) -> None:
    async with panel() as (s, cast):
        cast.takes_s = {("a", "aggregate"): 30.0, ("b", "answer"): 0.05}
        body = chat(model="panel", stream=stream, coe={"deadline_ms": 1500})
        async with asyncio.timeout(25), s.post(body) as reply:
            assert reply.status == 200
            assert b"The answer is 0." in await reply.read()
        cast.takes_s = {("a", "answer"): 30.0}
        async with asyncio.timeout(25), s.post(body) as reply:
            assert reply.status == 200
            assert b"The answer is 1." in await reply.read()


async def test_recruit_keeps_the_bounds_of_a_request() -> None:
    async with panel() as (s, _):
        _, _, reply = await s.ask(chat(model="panel", coe={"deny": ["a"]}))
        assert {expert for expert, _ in roles(reply)} == {"b", "c"}
        status, _, reply = await s.ask(chat(model="panel", coe={"allow": ["a"]}))
        assert (status, reply["error"]["code"]) == (400, "infeasible_bounds")
        _, _, reply = await s.ask(chat(model="panel", max_tokens=20))
        full = reply["usage"]["coe"]["cost"]
        for most in (40 * full, 12 * full, 8 * full):
            body = chat(model="panel", max_tokens=20, coe={"max_cost": most})
            status, _, reply = await s.ask(body)
            assert status != 200 or reply["usage"]["coe"]["cost"] <= most


async def test_recruit_without_figures_counts_as_its_best_expert() -> None:
    async with panel() as (s, _):
        _, _, route = await s.ask(chat(model="auto"), "/v1/route")
        by_kind = {c["kind"]: c for c in route["candidates"] if c["expert"] == "a"}
        assert by_kind["recruit"]["quality"] == by_kind["single"]["quality"] == 0.9
        assert route["chosen"] == "a", "at equal quality the cheaper one wins"


async def test_recruit_by_auto_where_its_quality_is_stated() -> None:
    async with panel(quality={"general": 1.0}) as (s, _):
        _, headers, reply = await s.ask(chat(model="auto:best"))
        assert headers["x-coe-recipe"].startswith("recruit(")
        assert [role for _, role in roles(reply)] == ["answer", "answer", "aggregate"]


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": True}])
async def test_recruit_refuses_what_it_can_not_aggregate(more: dict[str, Any]) -> None:
    async with panel() as (s, _):
        status, _, reply = await s.ask(chat(model="panel", **more))
        assert status == 400
        assert "panel" in reply["error"]["message"]
