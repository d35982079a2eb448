"""Keys, limits, budgets and usage over HTTP, with a simulated pool behind the gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.engine.simulated_engine import SimulatedEngine
from service.errors import ExpertFailedError
from service.gateway.gateway_reload import GatewayRuntime
from service.store.api_keys import digest_of
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import (
    ADMIN_KEY,
    CHAT,
    SECRET,
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)
from tests.support.polling import until
from tests.support.redis_server import redis_server

KEY = "a-key-of-the-tests-a"
OTHER = "a-key-of-the-tests-b"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def config(
    limits: dict[str, Any] | None = None,
    *,
    pool: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    **sections: Any,
) -> Any:
    given = {
        "keys": {
            "a": {"tenant": "acme", "sha256": digest_of(KEY), **(limits or {})},
            "b": {"tenant": "other", "sha256": digest_of(OTHER)},
        },
        **sections,
    }
    base = simulated({"cpu": {"tokens": 4, **(pool or {})}}, experts=experts)
    return type(base).model_validate({**json.loads(base.model_dump_json()), **given})


async def usage(s: RunningGateway, key: str = KEY) -> Any:
    async with s.client.get(s.url + "/v1/usage", headers=bearer(key)) as reply:
        assert reply.status == 200
        return await reply.json()


async def limit(s: RunningGateway, kind: str, key: str = KEY) -> Any:
    (found,) = [item for item in (await usage(s, key))["limits"] if item["name"].endswith(kind)]
    return found


async def test_key_is_required_once_one_exists() -> None:
    async with run_gateway(config()) as s:
        for path in ("/v1/models", "/v1/models/general", "/v1/usage"):
            async with s.get(path) as reply:
                assert reply.status == 401, path
        status, _, answer = await s.ask(chat())
        assert status == 401
        assert answer["error"]["type"] == "authentication_error"
        assert answer["error"]["code"] == "invalid_api_key"
        status, _, answer = await s.ask(chat(), headers=bearer(KEY + "x"))
        assert status == 401
        assert KEY not in json.dumps(answer)
        for path in ("/health", "/ready", "/openapi.json"):
            async with s.get(path) as reply:
                assert reply.status == 200, path
                assert b"general" not in await reply.read(), "experts are named to strangers"
        for who, status in (({}, 401), (bearer(KEY), 401), (bearer(ADMIN_KEY), 200)):
            async with s.get("/metrics", headers=who) as reply:
                assert reply.status == status
            async with s.get("/ready", headers=who) as reply:
                answer = await reply.json()
                assert ("experts" in answer) == (status == 200)
                assert answer["ready"]
        for headers in (bearer(KEY), {"x-api-key": KEY}):
            status, _, _ = await s.ask(chat(), headers=headers)
            assert status == 200


async def test_key_sees_only_the_experts_that_it_may_use() -> None:
    experts = {
        "mine": {"model": "m", "categories": ["general"]},
        "secret-base": {
            "model": "n",
            "capabilities": ["chat", "embeddings"],
            "categories": ["a-secret-subject"],
        },
        "tuned": {"base": "secret-base", "adapter": "a"},
        "far-secret": {"remote": {"url": "http://127.0.0.1:1/v1", "model": "m"}},
    }
    recipes = {
        "ours": {"kind": "cascade", "members": ["mine"], "later": ["tuned"]},
        "theirs": {"kind": "cascade", "members": ["mine"], "later": ["secret-base"]},
    }
    given = config({"experts": ["mine", "tuned"]}, experts=experts, recipes=recipes)
    async with run_gateway(given) as s:
        collected: list[str] = []
        async with s.get("/v1/models", headers=bearer(KEY)) as reply:
            collected.append(await reply.text())
            listed = {item["id"] for item in json.loads(collected[0])["data"]}
            assert listed == {"auto", "mine", "tuned", "ours"}
            auto = json.loads(collected[0])["data"][0]["coe"]
            assert "embeddings" not in auto["capabilities"]
        async with s.get("/v1/models", headers=bearer(OTHER)) as reply:
            listed = {item["id"] for item in (await reply.json())["data"]}
            assert listed == {"auto", *experts, *recipes}
        for name in ("secret-base", "far-secret", "theirs", "nobody"):
            async with s.get(f"/v1/models/{name}", headers=bearer(KEY)) as reply:
                assert reply.status == 404
                collected.append((await reply.text()).replace(name, ""))
        for name in ("mine", "tuned", "ours", "auto", "auto:fast", "auto:best/general"):
            async with s.get(f"/v1/models/{name}", headers=bearer(KEY)) as reply:
                entry = await reply.json()
                assert (reply.status, entry["id"]) == (200, name)
                collected.append(json.dumps(entry))
        for name in ("auto:", "auto:slow", "auto/nothing", "auto/", "auto:fast/"):
            async with s.get(f"/v1/models/{name}", headers=bearer(OTHER)) as reply:
                assert reply.status == 404, name
        statuses = {"theirs": 403, "secret-base": 403, "nobody": 404, "auto/x": 404}
        statuses["auto/a-secret-subject"] = 404
        for name, status in statuses.items():
            for more in ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
                answered, _, answers = await s.ask(chat(model=name, **more), headers=bearer(KEY))
                assert answered == status
                collected.append(json.dumps(answers).replace(name.removeprefix("auto/"), ""))
        for path in ("/openapi.json", "/ready"):
            async with s.get(path, headers=bearer(KEY)) as reply:
                collected.append(await reply.text())
        for text in collected:
            assert "secret" not in text


async def test_key_does_not_see_what_others_spend_of_a_shared_budget() -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 0, "completion": 1_000_000}}}
    budgets = {
        "all": {"amount": 8, "period": "day"},
        "mine": {"amount": 8, "period": "day", "tenant": "acme"},
    }

    async def told(s: RunningGateway) -> dict[str, Any]:
        return {item["name"]: item for item in (await usage(s))["limits"]}

    async with run_gateway(config(experts=experts, budgets=budgets)) as s:
        before = await told(s)
        assert before["budget/all"]["shared"]
        assert not before["budget/all"]["used_up"]
        assert before["budget/mine"]["left"] == 8
        assert (await s.ask(chat(max_tokens=4), headers=bearer(OTHER)))[0] == 200
        assert await told(s) == before
        assert (await s.ask(chat(max_tokens=4), headers=bearer(OTHER)))[0] == 200
        assert (await told(s))["budget/all"]["used_up"]
        assert not {"spent", "reserved", "left"} & (await told(s))["budget/all"].keys()


async def test_failure_reasons_hide_paths_from_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: SimulatedEngine) -> Any:
        raise ExpertFailedError("/srv/weights/m/model.safetensors: damaged", retry_after_s=30)

    monkeypatch.setattr(SimulatedEngine, "start", refuse)
    async with run_gateway(config()) as s:

        async def failed() -> bool:
            status, _, _ = await s.ask(chat(), headers=bearer(KEY))
            return status == 503

        await until(failed, "the expert has failed")
        _, _, answers = await s.ask(chat(), headers=bearer(KEY))
        async with s.get("/v1/models", headers=bearer(KEY)) as reply:
            listed = await reply.text()
        for text in (json.dumps(answers), listed):
            assert "model.safetensors: damaged" in text
            assert "/srv" not in text
        async with s.get("/ready", headers=bearer(ADMIN_KEY)) as reply:
            assert "/srv/weights/m/model.safetensors" in await reply.text()


async def test_key_may_use_its_experts_only() -> None:
    experts = {"general": {"model": "m"}, "math": {"model": "n", "categories": ["math"]}}
    async with run_gateway(config({"experts": ["general"]}, experts=experts)) as s:
        status, _, answer = await s.ask(chat(model="math"), headers=bearer(KEY))
        assert (status, answer["error"]["code"]) == (403, "permission_denied")
        status, _, body = await s.ask(chat(model="auto"), headers=bearer(KEY))
        assert (status, body["model"]) == (200, "general")
        # A category of experts that the key may not use does not exist for it.
        status, _, answer = await s.ask(chat(model="auto/math"), headers=bearer(KEY))
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        status, _, body = await s.ask(chat(model="math"), headers=bearer(OTHER))
        assert (status, body["model"]) == (200, "math")


async def test_usage_is_reported_and_charged_at_the_expert_s_price() -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 1000, "completion": 5000}}}
    budget = {"budget": {"amount": 1000}}
    async with run_gateway(config(budget, experts=experts)) as s:
        await s.ask(chat("a b c", max_tokens=3), headers=bearer(KEY))
        async with s.post(chat("a b", max_tokens=5, stream=True), headers=bearer(KEY)) as reply:
            assert b"usage" not in await reply.read()
        answer = await usage(s)
        assert (answer["tenant"], answer["key"]) == ("acme", "a")
        (day,) = answer["days"].values()
        want = {"requests": 2, "prompt_tokens": 5, "completion_tokens": 8, "cost": 0.045}
        assert day == {**want, "experts": {"general": want}}
        assert (await limit(s, "budget"))["spent"] == 0.045
        assert (await limit(s, "budget"))["reserved"] == 0
        assert (await usage(s, OTHER))["days"] == {}


async def test_requests_per_minute_limit() -> None:
    async with run_gateway(config({"requests_per_min": 5})) as s:
        answers = await asyncio.gather(*(s.ask(chat(), headers=bearer(KEY)) for _ in range(20)))
        assert sorted(status for status, _, _ in answers) == [200] * 5 + [429] * 15
        _, headers, result = next(answer for answer in answers if answer[0] == 429)
        assert result["error"]["type"] == "rate_limit_error"
        assert result["error"]["code"] == "rate_limit_exceeded"
        assert 30 <= int(headers["retry-after"]) <= 61
        assert (await s.ask(chat(), headers=bearer(OTHER)))[0] == 200


async def test_concurrent_requests_limit() -> None:
    async with run_gateway(config({"concurrent": 2})) as s:
        with held_answers() as gate:
            asked = [asyncio.create_task(s.ask(chat(), headers=bearer(KEY))) for _ in range(6)]
            await until(lambda: sum(task.done() for task in asked) == 4, "four have no room")
            gate.open()
            answers = await asyncio.gather(*asked)
        assert sorted(status for status, _, _ in answers) == [200] * 2 + [429] * 4
        assert (await limit(s, "concurrent"))["reserved"] == 0
        assert (await s.ask(chat(), headers=bearer(KEY)))[0] == 200


async def test_max_tokens_is_clipped_to_the_budget() -> None:
    async with run_gateway(config({"tokens_per_min": 300})) as s:
        status, headers, body = await s.ask(chat(max_tokens=1000), headers=bearer(KEY))
        assert status == 200
        clipped = int(headers["x-coe-max-tokens"])
        assert 0 < clipped < 300
        assert body["usage"]["completion_tokens"] == clipped
        found = await limit(s, "tokens")
        assert found["spent"] == body["usage"]["total_tokens"]
        assert found["reserved"] == 0


async def test_list_of_prompts_counts_with_all_of_them() -> None:
    """Each may fill the context: ten times a hundred tokens are more than five hundred."""
    experts = {"vectors": {"model": "m", "capabilities": ["embeddings", "completions"]}}
    pool = {"max_model_len": 100}
    texts = ["word " * 90] * 10
    async with run_gateway(config({"tokens_per_min": 500}, pool=pool, experts=experts)) as s:
        for path, body in (
            ("/v1/embeddings", {"model": "vectors", "input": texts}),
            ("/v1/completions", {"model": "vectors", "prompt": texts, "max_tokens": 1}),
        ):
            status, _, answer = await s.ask(body, path, headers=bearer(KEY))
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded"), path
        assert (await limit(s, "tokens"))["spent"] == 0
        few = {"model": "vectors", "input": texts[:2]}
        assert (await s.ask(few, "/v1/embeddings", headers=bearer(KEY)))[0] == 200


async def test_refused_request_counts_once() -> None:
    experts = {
        "general": {"model": "m", "price": {"prompt": 0, "completion": 500_000}},
        "dear": {"model": "n", "price": {"prompt": 0, "completion": 1_000_000}},
    }
    async with run_gateway(config({"budget": {"amount": 5}}, experts=experts)) as s:
        with held_answers() as gate:
            body = chat(max_tokens=10)
            holding = asyncio.create_task(s.ask(body, headers=bearer(KEY)))
            engine = s.pools["cpu"].engines[0]
            await until(lambda: engine.now == 1, "all that there is, is reserved")
            for model in ("general", "auto"):
                status, _, answer = await s.ask({**body, "model": model}, headers=bearer(KEY))
                assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
            gate.open()
            assert (await holding)[0] == 200
        async with s.get("/metrics", headers=bearer(ADMIN_KEY)) as reply:
            text = await reply.text()
        counts = {
            line.split('outcome="')[1].split('"')[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("coe_tenant_requests_total")
        }
        assert counts == {"insufficient_quota": 2, "ok": 1}


async def test_budget_is_not_overspent_by_a_burst() -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 0, "completion": 1_000_000}}}
    budget = {"all": {"amount": 25, "window_s": 86_400}}
    async with run_gateway(config(experts=experts, budgets=budget, pool={"decode_ms": 2})) as s:
        asking = (s.ask(chat(max_tokens=10), headers=bearer(KEY)) for _ in range(30))
        answers = await asyncio.gather(*asking)
        spent = sum(body["usage"]["completion_tokens"] for st, _, body in answers if st == 200)
        assert spent == 25
        refused = [result for status, _, result in answers if status == 429]
        assert {result["error"]["code"] for result in refused} == {"insufficient_quota"}
        state = (await s.gateway.ledger.state())["all"]
        assert (state.spent, state.reserved) == (25, 0)


async def test_client_disconnect_is_charged_for_what_went_out_only() -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 0, "completion": 1_000_000}}}
    limits = {"budget": {"amount": 10_000}}
    pool = {"decode_ms": 5, "max_model_len": 10_000}
    async with run_gateway(config(limits, experts=experts, pool=pool)) as s:
        body = chat(max_tokens=8000, stream=True)  # 40 s
        async with s.post(body, headers=bearer(KEY)) as reply:
            await reply.content.readuntil(b"\n\n")
            held = await limit(s, "budget")
            assert (held["spent"], held["reserved"]) == (0, 8000)
        await until(s.idle, "the pool is idle")

        async def settled() -> bool:
            return bool((await limit(s, "budget"))["reserved"] == 0)

        await until(settled, "what was reserved is free again")
        assert 1 <= (await limit(s, "budget"))["spent"] < 4000


async def test_failed_request_is_not_charged() -> None:
    async with run_gateway(config({"concurrent": 1, "tokens_per_min": 5000})) as s:
        for _ in range(3):
            status, _, _ = await s.ask(chat(max_tokens=100, n=0), headers=bearer(KEY))
            assert status == 400
        for kind in ("tokens", "concurrent"):
            found = await limit(s, kind)
            assert (found["spent"], found["reserved"]) == (0, 0)


async def test_admin_endpoints_create_rotate_and_revoke_a_key() -> None:
    async with run_gateway(config()) as s:

        async def admin(method: str, path: str, body: Any = None, status: int = 200) -> Any:
            asking = s.client.request(method, s.url + path, json=body, headers=ADMIN)
            async with asking as reply:
                data = await reply.json()
                assert reply.status == status, data
                return data

        made = await admin("POST", "/admin/keys", {"tenant": "acme", "requests_per_min": 9})
        assert (await s.ask(chat(), headers=bearer(made["key"])))[0] == 200
        listed = (await admin("GET", "/admin/keys"))["keys"]
        assert [item["id"] for item in listed] == [made["id"]]
        assert listed[0]["limits"]["requests_per_min"] == 9
        assert made["key"] not in json.dumps(listed)
        assert "digest" not in json.dumps(listed)
        path = f"/admin/keys/{made['id']}"
        rotated = await admin("POST", path + "/rotate", {"grace_s": 60})
        for key in (made["key"], rotated["key"]):
            assert (await s.ask(chat(), headers=bearer(key)))[0] == 200
        again = await admin("POST", path + "/rotate")
        assert (await s.ask(chat(), headers=bearer(rotated["key"])))[0] == 401
        assert (await s.ask(chat(), headers=bearer(again["key"])))[0] == 200
        assert (await admin("POST", path + "/revoke"))["state"] == "revoked"
        assert (await s.ask(chat(), headers=bearer(again["key"])))[0] == 401
        await admin("POST", path + "/rotate", status=409)
        await admin("POST", "/admin/keys/nothing/revoke", status=404)
        await admin("POST", "/admin/keys", {"tenant": "a", "expets": []}, status=400)
        await admin("POST", "/admin/keys", {"experts": ["nobody"]}, status=400)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/admin/keys"), ("POST", "/admin/keys/x/revoke")]
)
async def test_key_endpoints_require_the_admin_key(method: str, path: str) -> None:
    async with run_gateway(config()) as s:
        for headers in ({}, bearer(KEY)):
            async with s.client.request(method, s.url + path, headers=headers) as reply:
                assert reply.status == 401


async def test_without_any_key_requests_need_none() -> None:
    async with run_gateway(simulated({"cpu": {}})) as s:
        status, headers, _ = await s.ask(chat(), CHAT)
        assert status == 200
        assert "x-coe-max-tokens" not in headers


async def test_64_clients_through_two_gateways_do_not_overspend(tmp_path: Path) -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 0, "completion": 1_000_000}}}
    with redis_server(tmp_path) as redis:
        given = config(
            {"requests_per_min": 90},
            experts=experts,
            budgets={"other": {"amount": 200, "period": "day", "tenant": "other"}},
            store={"kind": "redis", "url": redis.url, "timeout_ms": 20_000},
        )
        async with run_gateway(given) as s, second_gateway(s, given) as other:
            urls = (s.url, other)
            served = {KEY: 0, OTHER: 0}

            async def client(i: int, key: str) -> None:
                for n in range(4):
                    url = urls[(i + n) % 2]
                    body = chat(max_tokens=3, stream=i % 8 == 0)
                    async with s.client.post(url + CHAT, json=body, headers=bearer(key)) as reply:
                        if reply.status == 200 and i % 8:
                            data = await reply.json()
                            tokens = data["usage"]["completion_tokens"]
                            served[key] += tokens if key == OTHER else 1
                        elif reply.status == 200:
                            # Leaves in mid-answer.
                            await reply.content.readany()
                            reply.close()
                        else:
                            assert reply.status == 429
                            assert int(reply.headers["retry-after"]) >= 1

            await asyncio.gather(*(client(i, KEY) for i in range(64)))
            await asyncio.gather(*(client(i, OTHER) for i in range(64)))

            def leaked() -> bool:
                with redis.client() as inside:
                    return not any(inside.hlen(n) for n in inside.scan_iter("?coe?:own:*"))

            await until(leaked, "nothing is reserved by anybody")
            assert 0 < served[KEY] <= (await limit(s, "requests"))["spent"] <= 90
            budget = (await s.gateway.ledger.state())["other"]
            assert 0 < served[OTHER] <= budget.spent <= 200
            assert (await usage(s, OTHER))["days"]


@asynccontextmanager
async def second_gateway(s: RunningGateway, given: Any) -> AsyncIterator[str]:
    """Another gateway to the same pools: its URL."""
    gateway = GatewayRuntime(
        given, "second", SECRET, admin_key=None, wake=lambda _: None, behind_serve=False
    )
    await gateway.start()
    gateway.directory.update([pool.address for pool in s.pools.values()])
    try:
        async with serving(gateway) as served:
            async with s.client.get(served.url + "/health") as reply:
                assert reply.status == 200
            await until(lambda: bool(gateway.directory.links()), "it knows the pools")
            yield served.url
    finally:
        await gateway.stop()


async def test_long_queue_of_one_tenant_does_not_delay_another() -> None:
    async with run_gateway(config(pool={"decode_ms": 50, "max_num_seqs": 2})) as s:
        heavy = [asyncio.ensure_future(s.ask(chat(), headers=bearer(KEY))) for _ in range(30)]
        pool = s.pools["cpu"]
        await until(lambda: pool.waiting >= 20, "the queue is long")
        assert (await s.ask(chat(), headers=bearer(OTHER)))[0] == 200
        # First come, first served would have emptied it first.
        assert pool.waiting > 0
        for task in heavy:
            task.cancel()
        await asyncio.gather(*heavy, return_exceptions=True)


@pytest.mark.parametrize("days", ["%C2%B2", "0", "-1", "1.5", "99999", ""])
async def test_usage_days_that_are_not_a_number_are_a_400(days: str) -> None:
    async with (
        run_gateway(config()) as s,
        s.get(f"/v1/usage?days={days}", headers=bearer(KEY)) as reply,
    ):
        assert reply.status == 400, await reply.text()
