"""Several ways of asking one model: variants, and two names of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.http.asgi_helpers import read_body
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import CHAT, chat, events, run_gateway, serving, simulated

PERSONA = {"system": "Answer as a pirate.", "max_tokens": 5, "stop": ["END"], "temperature": 0.1}


def experts(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "general": {"model": str(folder), "description": "plain", "price": {"completion": 1e6}},
        "twin": {"model": str(folder), "categories": ["law"], "price": {"completion": 5e5}},
        "pirate": {"base": "general", "defaults": PERSONA, "categories": ["sea"]},
        **more,
    }


async def test_names_of_one_model_share_its_engine_and_keep_their_own_name_and_price(
    tmp_path: Path,
) -> None:
    async with run_gateway(simulated({"p": {}}, experts=experts(tmp_path))) as stage:
        pool = stage.pools["p"]
        texts = {}
        for name, price in (("general", 1), ("twin", 0.5), ("pirate", 1)):
            status, headers, reply = await stage.ask(chat(model=name, max_tokens=4))
            assert (status, reply["model"], headers["x-coe-expert"]) == (200, name, name)
            assert reply["usage"]["coe"]["cost"] == 4 * price
            texts[name] = reply["choices"][0]["message"]["content"]
            async with stage.post(chat(model=name, stream=True)) as answer:
                data = await answer.read()
            parsed = [json.loads(event) for event in events(data) if event != "[DONE]"]
            assert {event["model"] for event in parsed} == {name}
        assert texts["general"] == texts["twin"] != texts["pirate"]
        assert len(pool.engines) == 1
        assert {request.expert for request in pool.engine.asked} == {"general"}
        async with stage.get("/v1/models") as answer:
            models = {one["id"]: one for one in (await answer.json())["data"]}
        assert models["pirate"]["coe"]["kind"] == "variant"
        assert models["pirate"]["parent"] == "general"
        assert models["twin"]["coe"]["state"] == models["pirate"]["coe"]["state"] == "device"
        assert models["twin"]["coe"]["categories"] == ["law"]
        # Categories and routing are those of any expert.
        status, headers, reply = await stage.ask(chat(model="auto/sea"))
        assert (headers["x-coe-expert"], reply["model"]) == ("pirate", "pirate")
        asked = json.loads(pool.engine.asked[-1].body)
        assert asked["messages"][0] == {"role": "system", "content": "Answer as a pirate."}
        assert (asked["max_tokens"], asked["stop"]) == (5, ["END"])


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": "q"}]},
            {"max_tokens": 5, "stop": ["END"], "temperature": 0.1},
        ),
        (
            "/v1/completions",
            {"prompt": "q"},
            {"max_tokens": 5, "stop": ["END"], "temperature": 0.1},
        ),
        (
            "/v1/responses",
            {"input": "q"},
            {"instructions": "Answer as a pirate.", "max_output_tokens": 5, "stop": ["END"]},
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "q"}]},
            {"system": "Answer as a pirate.", "max_tokens": 5, "stop_sequences": ["END"]},
        ),
    ],
)
async def test_variant_s_defaults_reach_the_engine_in_each_endpoint_s_form(
    tmp_path: Path, path: str, body: dict[str, Any], form: dict[str, Any]
) -> None:
    async with run_gateway(simulated({"p": {}}, experts=experts(tmp_path))) as stage:
        status, _, reply = await stage.ask({"model": "pirate", **body}, path)
        assert (status, reply["model"]) == (200, "pirate")
        asked = json.loads(stage.pools["p"].engine.asked[-1].body)
        assert form.items() <= asked.items()
        assert asked["model"] == "general"
        used = reply["usage"]
        assert used.get("completion_tokens", used.get("output_tokens")) == 5


async def test_admission_and_cost_bound_see_a_variant_s_defaults(tmp_path: Path) -> None:
    long = {"base": "general", "defaults": {"system": "x" * 4000, "max_tokens": 7}}
    priced = {
        "general": {"model": str(tmp_path), "price": {"prompt": 1.0, "completion": 1000.0}},
        "long": long,
    }
    config = simulated(
        {"p": {"max_model_len": 8192}},
        experts=priced,
        tenants={"default": {"tokens_per_min": 3000}},
    )
    async with run_gateway(config) as stage:
        # 7 tokens of answer fit, a prompt of 4,000 bytes costs more than that.
        body = chat(model="long", coe={"max_cost": 0.003})
        status, _, reply = await stage.ask(body)
        assert (status, reply["error"]["param"]) == (400, "coe.max_cost")
        status, _, _ = await stage.ask(chat(coe={"max_cost": 0.003}, max_tokens=1))
        assert status == 200
        # A request by name reserves the default length, not the whole context.
        status, _, reply = await stage.ask(chat(model="long"))
        assert (status, reply["usage"]["completion_tokens"]) == (200, 7)


async def test_auto_weighs_what_a_variant_s_system_prompt_costs(tmp_path: Path) -> None:
    priced = {
        "general": {"model": str(tmp_path), "price": {"prompt": 1e6}, "categories": ["sea"]},
        "long": {
            "base": "general",
            "quality": {"sea": 1},
            "defaults": {"system": "x" * 400},
        },
    }
    async with run_gateway(simulated({"p": {}}, experts=priced)) as stage:
        async with stage.post(chat(model="auto/sea"), "/v1/route") as answer:
            told = await answer.json()
        cost = {one["recipe"]: one["cost"] for one in told["candidates"]}
        assert cost["long"] == cost["general"] + 100


async def test_response_cache_keeps_the_answers_of_names_and_defaults_apart(
    tmp_path: Path,
) -> None:
    config = simulated(
        {"p": {}}, experts=experts(tmp_path), tenants={"default": {"cache": {"mode": "exact"}}}
    )
    cached = {"headers": {"x-coe-cache": "exact"}}
    async with run_gateway(config) as stage:
        for name in ("general", "twin", "pirate"):
            for found in ("miss", "exact"):
                _, headers, reply = await stage.ask(chat(model=name), **cached)
                assert (headers["x-coe-cache"], reply["model"]) == (found, name)
        # What the defaults would add is the same request.
        _, headers, _ = await stage.ask(chat(model="pirate", max_tokens=5), **cached)
        assert headers["x-coe-cache"] == "exact"
        _, headers, _ = await stage.ask(chat(model="pirate", max_tokens=6), **cached)
        assert headers["x-coe-cache"] == "miss"


async def test_reload_without_the_first_name_ends_no_stream_and_starts_no_engine(
    tmp_path: Path,
) -> None:
    options: dict[str, dict[str, Any]] = {"p": {}}
    before = simulated(options, experts=experts(tmp_path))
    changed = {
        "twin": {"model": str(tmp_path)},
        "pirate": {"base": "twin", "defaults": {"max_tokens": 3}},
    }
    after = simulated(options, experts=changed)
    async with run_gateway(before) as stage:
        pool = stage.pools["p"]
        with held_answers(limit=100) as gate:
            answer = await stage.post(chat(model="twin", stream=True, max_tokens=100))
            data = await answer.content.readany()
            await stage.gateway.reload(after)
            await pool.process.reload(after)
            for name, tokens in (("twin", 16), ("pirate", 3)):
                status, _, reply = await stage.ask(chat(model=name, max_tokens=None))
                assert (status, reply["model"]) == (200, name)
                assert reply["usage"]["completion_tokens"] == tokens
            assert (await stage.ask(chat()))[0] == 404
            gate.open()
            data += await answer.read()
        assert data.endswith(b"data: [DONE]\n\n")
        parsed = [json.loads(event) for event in events(data) if event != "[DONE]"]
        assert {event["model"] for event in parsed} == {"twin"}
        # And back, with the name that the weights were loaded under.
        await stage.gateway.reload(before)
        await pool.process.reload(before)
        assert (await stage.ask(chat()))[2]["model"] == "general"
        assert len(pool.engines) == 1


async def test_variant_is_a_member_of_a_recipe(tmp_path: Path) -> None:
    other = {"base": "general", "defaults": {"system": "Answer as a cook."}}
    recipe = {"kind": "vote", "members": ["general", "pirate", "cook"]}
    config = simulated({"p": {}}, experts=experts(tmp_path, cook=other), recipes={"three": recipe})
    async with run_gateway(config) as stage:
        status, headers, reply = await stage.ask(chat(model="three"))
        assert (status, headers["x-coe-recipe"]) == (200, "vote([general, pirate, cook])")
        assert reply["model"] == headers["x-coe-expert"]
        asked = [json.loads(request.body) for request in stage.pools["p"].engine.asked]
        systems = {body["messages"][0]["content"] for body in asked}
        assert systems <= {"hello there", "Answer as a pirate.", "Answer as a cook."}
        assert len(systems) >= 2


async def test_variant_of_a_remote_expert_asks_its_endpoint_by_its_own_name() -> None:
    asked: list[dict[str, Any]] = []

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        asked.append(json.loads(await read_body(receive, 10**6)))
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        message = {"role": "assistant", "content": "yes"}
        reply = {"model": "theirs", "choices": [{"message": message, "finish_reason": "stop"}]}
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})

    async with serving(upstream) as far:
        remote = {"url": f"{far.url}/v1", "model": "theirs", "max_in_flight": 2}
        given = {
            "general": {"model": "m"},
            "far": {"remote": remote},
            "kind": {"base": "far", "defaults": {"system": "Be kind.", "max_tokens": 9}},
        }
        async with run_gateway(simulated({"p": {}}, experts=given)) as stage:
            status, headers, reply = await stage.ask(chat(model="kind"))
            assert (status, headers["x-coe-expert"], reply["model"]) == (200, "kind", "kind")
            assert asked[0]["messages"][0] == {"role": "system", "content": "Be kind."}
            assert (asked[0]["model"], asked[0]["max_tokens"]) == ("theirs", 9)
            _, _, reply = await stage.ask(chat(model="far"))
            assert reply["model"] == "far"
            assert len(asked[1]["messages"]) == 1
            assert set(stage.gateway.remote_pools) == {"far"}
            view = stage.gateway.current.dispatcher.views()[-1].snapshot
            assert view.shares == {"kind": "far"}
            assert view.experts["kind"] == view.experts["far"]
