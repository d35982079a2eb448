"""Planned batches through a gateway with simulated pools: forecasts, choices and their order."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.integration.test_batches import CHAT, client, create, ended, read, upload
from tests.support.in_process_service import run_gateway, simulated

EXPERTS = {
    "general": {"model": "m", "quality": {"general": 0.5}, "price": {"prompt": 1, "completion": 1}},
    "big": {"model": "m2", "quality": {"general": 0.9}, "price": {"prompt": 9, "completion": 9}},
    "named": {"model": "m3", "auto": False, "price": {"prompt": 1, "completion": 1}},
}


def config(tmp_path: Path) -> Any:
    base = simulated(
        {"cpu": {"tokens": 4}},
        experts=EXPERTS,
        batches={"folder": str(tmp_path / "batches"), "lease_s": 1},
        router={"fallback": "general"},
    )
    return base


def body(number: int, model: str = "auto", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}]
    return {"model": model, "max_tokens": 4, "messages": messages, **more}


def whole(number: int, given: dict[str, Any]) -> str:
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": given})


async def test_plan_endpoint_forecasts_without_running(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        requests = [body(i) for i in range(30)] + [body(99, "named"), body(98, "nobody")]
        given = {"endpoint": CHAT, "requests": requests}
        async with s.post(given, "/v1/batches/plan") as reply:
            assert reply.status == 200
            found = await reply.json()
        assert (found["lines"], found["unplanned"], found["invalid"]) == (31, 1, 0)
        plan = found["plan"]
        assert plan["shares"] == {"big": round(30 / 31, 6), "named": round(1 / 31, 6)}
        assert plan["seconds"] > 0
        qualities = [point["quality"] for point in found["curve"]]
        assert qualities == sorted(qualities)
        assert qualities[0] < qualities[-1] == plan["quality"]
        half = found["curve"][0]["cost"] * 2
        file = await upload(api, *(whole(i, each) for i, each in enumerate(requests)), "{}")
        given = {
            "endpoint": CHAT,
            "input_file_id": file.id,
            "coe": {"max_cost": half},
            "budgets": [half, half / 1000],
        }
        async with s.post(given, "/v1/batches/plan") as reply:
            within = await reply.json()
        assert within["invalid"] == 1
        assert plan["cost"] > within["plan"]["cost"] <= half
        assert [point["max_cost"] for point in within["curve"]] == [half]
        async with s.get("/v1/usage") as reply:
            assert (await reply.json())["days"] == {}


async def test_plan_endpoint_refuses_what_is_wrong(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s:
        for given, word in [
            ({"endpoint": "/v1/nothing", "requests": [body(0)]}, "endpoint"),
            ({"endpoint": CHAT}, "input_file_id"),
            ({"endpoint": CHAT, "requests": []}, "requests"),
            ({"endpoint": CHAT, "requests": [1]}, r"requests[0]"),
            ({"endpoint": CHAT, "requests": [body(0)], "budgets": [0]}, "budgets"),
            ({"endpoint": CHAT, "requests": [body(0)], "coe": {"what": 1}}, "what"),
            ({"endpoint": CHAT, "requests": [body(0)], "more": 1}, "more"),
        ]:
            async with s.post(given, "/v1/batches/plan") as reply:
                assert reply.status == 400
                assert word in (await reply.json())["error"]["message"]
        given = {"endpoint": CHAT, "requests": [body(0)], "coe": {"max_cost": 1e-12}}
        async with s.post(given, "/v1/batches/plan") as reply:
            found = await reply.json()
        assert found["plan"] is None
        assert "cheapest" in found["problem"]


async def test_batch_runs_by_its_plan_grouped_and_within_its_budget(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        lines = [whole(i, body(i)) for i in range(20)]
        lines += [whole(20, body(20, "named"))]
        async with s.post(
            {"endpoint": CHAT, "requests": [body(i) for i in range(21)]}, "/v1/batches/plan"
        ) as reply:
            curve = (await reply.json())["curve"]
        budget = (curve[0]["cost"] + curve[-1]["cost"]) / 2
        file = await upload(api, *lines)
        made = await create(api, file.id, extra_body={"coe": {"max_cost": budget}})
        batch = await ended(api, made.id)
        assert batch.status == "completed"
        answers = await read(api, batch.output_file_id)
        models = {each["custom_id"]: each["response"]["body"]["model"] for each in answers}
        assert models["c20"] == "named"
        assert {"big", "general"} <= set(models.values())
        # The last lines may lack room: a prompt might have a token for each of its bytes.
        assert 19 <= len(answers) <= 21
        assert batch.coe["cost"] <= budget
        assert len(list(groupby(sorted(models.values())))) == 3


async def test_batch_with_cost_left_refuses_no_line_and_cuts_no_answer(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        # Prompts of few tokens and many bytes, of which requests are refused for a tight bound.
        asked = [
            {**body(i), "messages": [{"role": "user", "content": "words here " * (i % 8)}]}
            for i in range(64)
        ]
        async with s.post({"endpoint": CHAT, "requests": asked}, "/v1/batches/plan") as reply:
            curve = (await reply.json())["curve"]
        budget = (curve[0]["cost"] + curve[-1]["cost"]) / 2
        file = await upload(api, *(whole(i, given) for i, given in enumerate(asked)))
        made = await create(api, file.id, extra_body={"coe": {"max_cost": budget}})
        batch = await ended(api, made.id)
        answers = await read(api, batch.output_file_id)
        tokens = [each["response"]["body"]["usage"]["completion_tokens"] for each in answers]
        assert batch.coe["cost"] <= budget
        # The last lines may lack room.
        assert len(answers) >= 60
        assert sum(each < 4 for each in tokens) <= 4
        refused = await read(api, batch.error_file_id)
        assert all(each["error"]["code"] == "max_cost_reached" for each in refused)


async def test_batch_whose_terms_nothing_keeps_fails_with_the_reason(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        file = await upload(api, whole(0, body(0)))
        made = await create(api, file.id, extra_body={"coe": {"max_cost": 1e-12}})
        batch = await ended(api, made.id)
        assert batch.status == "failed"
        assert "cheapest" in batch.errors.data[0].message


async def test_batch_never_costs_more_than_its_bound_when_answers_are_long(tmp_path: Path) -> None:
    given = config(tmp_path)
    async with run_gateway(given) as s, client(s) as api:
        # Nothing is known of lengths, and the answers are longer than expected.
        lines = [whole(i, {**body(i, "general"), "max_tokens": 4000}) for i in range(30)]
        file = await upload(api, *lines)
        asked = {"endpoint": CHAT, "input_file_id": file.id, "coe": {"quality": "best"}}
        async with s.post(asked, "/v1/batches/plan") as reply:
            expected = (await reply.json())["plan"]["cost"]
        made = await create(api, file.id, extra_body={"coe": {"max_cost": expected}})
        batch = await ended(api, made.id)
        assert batch.status == "completed"
        assert batch.coe["cost"] <= expected
        assert batch.request_counts.completed + batch.request_counts.failed == 30
