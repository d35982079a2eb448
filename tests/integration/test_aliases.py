"""Aliases over HTTP: on every endpoint, in replies, lists and limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import cli
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import (
    ADMIN_KEY,
    CHAT,
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)

EXPERTS = {
    "small": {"model": "m", "categories": ["general"], "price": {"completion": 5e5}},
    "new": {"model": "n", "price": {"completion": 1e6}},
    "vectors": {"model": "v", "capabilities": ["embeddings"]},
}
ALIASES = {
    "gpt-4o-mini": "auto",
    "small-please": "small",
    "prod": {"small": 60, "new": 40},
    "gpt-4o": "prod",
    "claude-*": "new",
    "claude-haiku-*": "small",
    "text-embedding-*": "vectors",
}
SECRET = "sk-" + "a" * 40


def config(**more: Any) -> Any:
    return simulated({"p": {}}, experts=EXPERTS, aliases=ALIASES, **more)


MESSAGES = [{"role": "user", "content": "q"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/v1/completions": {"prompt": "q"},
    "/v1/responses": {"input": "q"},
    "/v1/responses/input_tokens": {"input": "q"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "q"},
}


async def test_alias_works_on_every_endpoint_and_the_engine_sees_its_target() -> None:
    async with run_gateway(config()) as stage:
        for path, body in BODIES.items():
            for model, expert in (("claude-3-opus", "new"), ("claude-haiku-4", "small")):
                status, headers, _ = await stage.ask({**body, "model": model}, path)
                direct, *_ = await stage.ask({**body, "model": expert}, path)
                assert (path, status) == (path, direct)
                assert headers["x-coe-expert"] == expert
                pattern = "claude-*" if expert == "new" else "claude-haiku-*"
                assert headers["x-coe-alias"] == f"{pattern}; target={expert}"
                if status != 200:
                    continue  # The simulated engine counts no tokens for Anthropic's clients.
                asked = [
                    json.loads(request.body)["model"]
                    for engine in stage.pools["p"].engines
                    for request in engine.asked
                    if (request.endpoint, request.expert) == (path, expert)
                ]
                assert asked == [expert, expert]
        status, headers, reply = await stage.ask(
            {"model": "text-embedding-3", "input": "q"}, "/v1/embeddings"
        )
        assert (status, headers["x-coe-alias"]) == (200, "text-embedding-*; target=vectors")
        # As for `auto`, the reply names the expert.
        _, headers, reply = await stage.ask(chat(model="gpt-4o-mini"))
        assert headers["x-coe-alias"] == "gpt-4o-mini; target=auto"
        assert reply["model"] == headers["x-coe-expert"]
        _, headers, _ = await stage.ask(chat(model="small"))
        assert "x-coe-alias" not in headers
        # No label has what a client made up.
        async with stage.get("/metrics") as answer:
            text = await answer.text()
        assert "claude-3-opus" not in text


async def test_alias_with_weights_keeps_a_session_at_its_target() -> None:
    async with run_gateway(config()) as stage:
        targets = set()
        for session in range(8):
            found = set()
            for model in ("prod", "gpt-4o"):
                for turn in range(2):
                    body = chat(f"turn {turn}", model=model, max_tokens=1)
                    _, headers, reply = await stage.ask(
                        body, headers={"x-session-id": str(session)}
                    )
                    assert headers["x-coe-alias"] == f"{model}; target={reply['model']}"
                    found.add(reply["model"])
            assert len(found) == 1
            targets |= found
        assert targets == {"small", "new"}
        # Without a name the conversation's beginning counts, for its tokens as well.
        for number in range(5):
            messages = [{"role": "user", "content": f"conversation {number}"}]
            later = [*messages, {"role": "assistant", "content": "a"}, *MESSAGES]
            found = set()
            for path, said in (
                (CHAT, messages),
                (CHAT, later),
                ("/v1/messages/count_tokens", later),
            ):
                body = {"model": "prod", "messages": said, "max_tokens": 1}
                found.add((await stage.ask(body, path))[1]["x-coe-expert"])
            assert len(found) == 1


async def test_alias_is_no_way_round_a_key_s_experts() -> None:
    from hashlib import sha256

    digest = sha256(SECRET.encode()).hexdigest()
    keys = {"k": {"sha256": digest, "experts": ["small"]}}
    headers = {"authorization": f"Bearer {SECRET}"}
    async with run_gateway(config(keys=keys)) as stage:
        status, _, reply = await stage.ask(chat(model="claude-3"), headers=headers)
        assert status == 403
        assert "'claude-*'" in reply["error"]["message"]
        assert "new" not in reply["error"]["message"]
        # The shares are those of the targets that it may use.
        for session in range(8):
            body = chat(model="prod", max_tokens=1, prompt_cache_key=str(session))
            status, got, _ = await stage.ask(body, headers=headers)
            assert (status, got["x-coe-expert"]) == (200, "small")
        async with stage.get("/v1/models", headers=headers) as answer:
            models = {one["id"]: one["coe"] for one in (await answer.json())["data"]}
        assert models.keys() == {"auto", "small", "gpt-4o-mini", "small-please", "prod", "gpt-4o"}
        assert models["prod"]["targets"] == {"small": 60}
        async with stage.get("/v1/models/claude-3", headers=headers) as answer:
            assert answer.status == 404


async def test_alias_counts_in_the_budget_and_the_cache_of_its_target() -> None:
    tenants = {"default": {"cache": {"mode": "exact"}}}
    budgets = {"all": {"amount": 5, "period": "day"}}
    async with run_gateway(config(tenants=tenants, budgets=budgets)) as stage:
        cache = {"x-coe-cache": "exact"}
        await stage.ask(chat(model="small", max_tokens=2), headers=cache)
        status, headers, _ = await stage.ask(
            chat(model="small-please", max_tokens=2), headers=cache
        )
        assert (status, headers["x-coe-cache"]) == (200, "exact")
        assert headers["x-coe-alias"] == "small-please; target=small"
        await stage.ask(chat(model="claude-3", max_tokens=2))
        async with stage.get("/v1/usage") as answer:
            usage = await answer.json()
        day = next(iter(usage["days"].values()))
        assert {name: one["cost"] for name, one in day["experts"].items()} == {"small": 1, "new": 2}
        # Two units are left, and a token of the target costs one.
        status, headers, _ = await stage.ask(chat(model="claude-3", max_tokens=9))
        assert (status, headers["x-coe-max-tokens"]) == (200, "2")
        status, _, reply = await stage.ask(chat(model="claude-3", max_tokens=9))
        assert (status, reply["error"]["code"]) == (429, "insufficient_quota")


async def test_alias_is_listed_and_explained() -> None:
    async with run_gateway(config()) as stage:
        async with stage.get("/v1/models") as answer:
            models = {one["id"]: one for one in (await answer.json())["data"]}
        assert {"gpt-4o-mini", "prod", "gpt-4o", "small-please"} <= models.keys()
        assert not any("*" in name for name in models)
        assert models["prod"]["coe"]["targets"] == {"small": 60, "new": 40}
        assert models["prod"]["max_model_len"] == models["small"]["max_model_len"]
        async with stage.get("/v1/models/claude-haiku-9") as answer:
            assert (await answer.json())["coe"]["targets"] == {"small": 1}
        status, _, decision = await stage.ask(chat(model="claude-3"), "/v1/route")
        assert status == 200
        assert decision["alias"] == {"name": "claude-*", "target": "new"}
        assert decision["chosen"] == "new"
        status, _, reply = await stage.ask(chat(model="gpt-4o-minj"))
        assert status == 404
        assert "Did you mean 'gpt-4o-mini'?" in reply["error"]["message"]


class Failing:
    """An endpoint whose model fails on purpose, or refuses."""

    def __init__(self) -> None:
        self.fails = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await read_body(receive, 10**6))
        message = {"role": "assistant", "content": "fine"}
        if self.fails:
            message = {"role": "assistant", "content": None, "refusal": "I can't help."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        reply = {"model": body["model"], "choices": [choice], "usage": usage}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})


async def sessions_at(stage: RunningGateway, count: int) -> list[str]:
    """The target of each of some sessions."""
    found = []
    for session in range(count):
        body = chat(model="prod", max_tokens=1, prompt_cache_key=str(session))
        status, headers, _ = await stage.ask(body)
        assert status == 200
        found.append(headers["x-coe-alias"].removeprefix("prod; target="))
    return found


async def test_alias_rolls_back_a_target_that_refuses_until_it_is_restored() -> None:
    failing = Failing()
    async with serving(failing) as upstream:
        experts = {
            "old": {"model": "m", "categories": ["general"]},
            "new": {"remote": {"url": upstream.url + "/v1", "model": "n"}},
        }
        alias = {"to": {"old": 60, "new": 40}, "rollback": {"min_requests": 4}}
        given = simulated({"p": {}}, experts=experts, aliases={"prod": alias})
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with run_gateway(given) as stage:
            before = await sessions_at(stage, 18)
            assert "new" in before
            # Its sessions have moved, and nobody else's.
            after = await sessions_at(stage, 18)
            assert set(after) == {"old"}
            async with stage.get("/admin/aliases", headers=admin) as reply:
                told = (await reply.json())["aliases"]["prod"]
            assert told["new"]["rolled_back"]["reason"] == "refusals"
            assert told["new"]["requests"] == told["new"]["refusals"] >= 4
            assert told["old"]["baseline"]
            async with stage.get("/metrics") as reply:
                text = await reply.text()
            assert (
                'coe_alias_rollback_state{alias="prod",gateway="gateway",target="new"} 1.0' in text
            )
            assert stage.gateway.current.events.state()["aliases"]["prod"] == told
            failing.fails = False
            path = "/admin/aliases/prod/restore"
            status, _, reply = await stage.ask({}, path, headers=admin)
            assert (status, reply) == (200, {"alias": "prod", "restored": ["new"]})
            again = await sessions_at(stage, 18)
            assert again.count("new") >= 5
            assert all(a == b for a, b in zip(again, before, strict=True) if b == "new")
            # A config that is read again begins anew as well.
            failing.fails = True
            for _ in range(4):
                await sessions_at(stage, 18)
            assert "new" in stage.gateway.current.alias_traffic.left_out("prod")
            failing.fails = False
            await stage.gateway.reload(given)
            assert await sessions_at(stage, 18) == again
            status, _, reply = await stage.ask({}, path.replace("prod", "none"), headers=admin)
            assert status == 404
            status, _, _ = await stage.ask({}, path)
            assert status == 401


@pytest.mark.parametrize("model", ["prod", "claude-3", "gpt-4o-mini"])
def test_route_command_knows_aliases(model: str, tmp_path: Any) -> None:
    file = tmp_path / "c.json"
    file.write_text(config().model_dump_json(include={"router", "experts", "aliases", "pools"}))
    arguments = ["route", "hello", "-c", str(file), "--model", model]
    printed = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    assert printed.startswith("alias     ")
    given = json.loads(
        CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).output
    )
    assert given["chosen"] in ("small", "new")
