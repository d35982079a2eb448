"""Files and batches, driven by OpenAI's own client, with a simulated pool behind the gateway."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from service.pool.pool import Pool
from service.rpc.call_headers import Call
from service.store.api_keys import digest_of
from tests.support.in_process_service import RunningGateway, run_gateway, simulated
from tests.support.polling import until
from tests.support.redis_server import redis_server
from tests.support.third_party_clients import run_node

KEY, OTHER = "a-key-of-the-tests-a", "a-key-of-the-tests-b"
CHAT = "/v1/chat/completions"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "batches.md"


def config(tmp_path: Path, **given: Any) -> Any:
    batches = {"folder": str(tmp_path / "batches"), "lease_s": 1, **given.pop("batches", {})}
    base = simulated({"cpu": {"tokens": 4, **given.pop("pool", {})}})
    sections = {"batches": batches, **given}
    return type(base).model_validate({**json.loads(base.model_dump_json()), **sections})


def with_keys(tmp_path: Path, **given: Any) -> Any:
    keys = {
        "a": {"tenant": "acme", "sha256": digest_of(KEY)},
        "b": {"tenant": "other", "sha256": digest_of(OTHER)},
    }
    return config(tmp_path, keys=keys, **given)


def client(s: RunningGateway, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=s.url + "/v1", api_key=key, max_retries=0)


def line(number: int, url: str = CHAT, **body: Any) -> str:
    given = {"model": "general", "messages": [{"role": "user", "content": f"question {number}"}]}
    return json.dumps(
        {"custom_id": f"c{number}", "method": "POST", "url": url, "body": {**given, **body}}
    )


async def upload(api: openai.AsyncOpenAI, *lines: str) -> Any:
    data = "\n".join(lines).encode() + b"\n"
    return await api.files.create(file=("in.jsonl", data), purpose="batch")


async def create(api: openai.AsyncOpenAI, file_id: str, **more: Any) -> Any:
    given: Any = {"endpoint": CHAT, "completion_window": "24h", **more}
    return await api.batches.create(input_file_id=file_id, **given)


async def ended(api: openai.AsyncOpenAI, batch_id: str, timeout_s: float = 120) -> Any:
    async def over() -> bool:
        batch = await api.batches.retrieve(batch_id)
        return batch.status in ("completed", "failed", "expired", "cancelled")

    await until(over, "the batch ends", timeout_s)
    return await api.batches.retrieve(batch_id)


async def completed(api: openai.AsyncOpenAI, batch_id: str) -> int:
    counts = (await api.batches.retrieve(batch_id)).request_counts
    assert counts is not None
    return counts.completed


async def read(api: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    text = (await api.files.content(file_id)).text
    assert text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]


async def test_batch_with_official_client_answers_every_line_once(tmp_path: Path) -> None:
    async with run_gateway(with_keys(tmp_path)) as s, client(s) as api:
        file = await upload(api, *(line(i) for i in range(40)))
        assert (file.object, file.purpose, file.status) == ("file", "batch", "processed")
        assert file.filename == "in.jsonl"
        made = await create(api, file.id, metadata={"job": "nightly"})
        assert made.status == "validating"
        assert made.object == "batch"
        batch = await ended(api, made.id)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (40, 40, 0)
        assert batch.metadata == {"job": "nightly"}
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.expires_at == batch.created_at + 86_400
        assert batch.error_file_id is None
        assert batch.errors is None
        lines = await read(api, batch.output_file_id)
        assert [each["custom_id"] for each in lines] == [f"c{i}" for i in range(40)]
        assert len({each["id"] for each in lines}) == 40
        for each in lines:
            assert each["error"] is None
            assert each["response"]["status_code"] == 200
            assert each["response"]["body"]["choices"][0]["message"]["content"]
        used = sum(each["response"]["body"]["usage"]["total_tokens"] for each in lines)
        assert batch.usage.total_tokens == used
        output = await api.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output"
        # The whole way of a request: usage and metering hold.
        headers = {"authorization": f"Bearer {KEY}"}
        async with s.get("/v1/usage", headers=headers) as reply:
            (day,) = (await reply.json())["days"].values()
        assert day["requests"] == 40
        assert day["prompt_tokens"] + day["completion_tokens"] == used
        listed = [each.id async for each in api.files.list(limit=1)]
        assert set(listed) == {file.id, batch.output_file_id}
        assert [each.id async for each in api.files.list(purpose="batch")] == [file.id]
        assert [each.id async for each in api.batches.list(limit=1)] == [batch.id]
        deleted = await api.files.delete(file.id)
        assert deleted.deleted
        with pytest.raises(openai.NotFoundError):
            await api.files.content(file.id)
        assert [p.name for p in (tmp_path / "batches/files").iterdir()] == [batch.output_file_id]


async def test_batch_of_each_endpoint_is_answered(tmp_path: Path) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hello", "max_tokens": 4},
        "/v1/responses": {"input": "hello"},
        "/v1/embeddings": {"input": ["hello", "there"], "model": "vectors"},
    }
    experts = {
        "general": {"model": "m"},
        "vectors": {"model": "v", "capabilities": ["embeddings"]},
    }
    async with run_gateway(config(tmp_path, experts=experts)) as s, client(s) as api:
        for url, body in bodies.items():
            given = {"custom_id": "x", "method": "POST", "url": url}
            file = await upload(api, json.dumps({**given, "body": {"model": "general", **body}}))
            made = await create(api, file.id, endpoint=url)
            batch = await ended(api, made.id)
            assert batch.status == "completed", batch
            (only,) = await read(api, batch.output_file_id or batch.error_file_id)
            assert only["custom_id"] == "x"
            assert only["response"]["status_code"] == 200, only


async def test_bad_lines_are_error_lines_and_others_run(tmp_path: Path) -> None:
    bad = [
        "{",
        "[]",
        json.dumps({"custom_id": "", "method": "POST", "url": CHAT, "body": {}}),
        json.dumps({"custom_id": "get", "method": "GET", "url": CHAT, "body": {}}),
        line(100, url="/v1/embeddings"),
        line(0),
        json.dumps({"custom_id": "body", "method": "POST", "url": CHAT, "body": []}),
        line(101, stream=True),
        line(102, model="nobody"),
        line(103, messages="x"),
    ]
    # It would take a gigabyte as objects.
    bad.insert(8, line(104, prompt=["LISTS"]).replace('"LISTS"', "[]," * 600_000 + "[]"))
    codes = [
        "invalid_json_line",
        "invalid_line",
        "invalid_custom_id",
        "invalid_method",
        "invalid_url",
        "duplicate_custom_id",
        "invalid_body",
        "invalid_body",
        "invalid_line",
    ]
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        file = await upload(api, line(0), *bad, "", line(1))
        batch = await ended(api, (await create(api, file.id)).id)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (13, 2, 11)
        good = await read(api, batch.output_file_id)
        assert [each["custom_id"] for each in good] == ["c0", "c1"]
        faults = await read(api, batch.error_file_id)
        assert [each["error"]["code"] for each in faults if each["error"]] == codes
        for number, each in enumerate(faults[:9], start=2):
            assert each["response"] is None
            assert each["error"]["message"].startswith(f"line {number}: ")
        unknown, wrong = faults[9:]
        assert unknown["response"]["status_code"] == 404
        assert unknown["response"]["body"]["error"]["code"] == "model_not_found"
        assert wrong["response"]["status_code"] == 400


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["", ""], "empty_file"),
        (["{", "{"], "invalid_json_line"),
        ([line(i) for i in range(6)], "too_many_lines"),
    ],
)
async def test_unusable_file_fails_the_batch(tmp_path: Path, lines: list[str], code: str) -> None:
    given = config(tmp_path, batches={"max_lines": 5})
    async with run_gateway(given) as s, client(s) as api:
        file = await upload(api, *lines)
        batch = await ended(api, (await create(api, file.id)).id)
        assert batch.status == "failed"
        assert batch.failed_at
        assert batch.errors.object == "list"
        assert batch.errors.data[0].code == code
        assert batch.output_file_id is None


async def test_other_tenants_know_nothing(tmp_path: Path) -> None:
    async with run_gateway(with_keys(tmp_path)) as s, client(s) as api, client(s, OTHER) as other:
        file = await upload(api, line(0))
        batch = await ended(api, (await create(api, file.id)).id)
        calls = [
            other.files.retrieve(file.id),
            other.files.content(file.id),
            other.files.delete(file.id),
            other.files.retrieve("file-" + "0" * 24),
            other.files.retrieve("..%2f..%2fstate.sqlite3"),
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            create(other, file.id),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError) as raised:
                await call
            assert raised.value.code in ("file_not_found", "batch_not_found")
        assert [each async for each in other.files.list()] == []
        assert [each async for each in other.batches.list()] == []


async def test_cancelled_batch_stops_soon_and_gives_what_is_there(tmp_path: Path) -> None:
    given = config(tmp_path, pool={"tokens": 50, "decode_ms": 20}, batches={"max_in_flight": 2})
    async with run_gateway(given) as s, client(s) as api:
        file = await upload(api, *(line(i) for i in range(200)))
        made = await create(api, file.id)

        async def some() -> bool:
            return await completed(api, made.id) >= 2

        await until(some, "two lines are answered")
        with pytest.raises(openai.ConflictError):
            await api.files.delete(file.id)
        assert (await api.batches.cancel(made.id)).status == "cancelling"
        batch = await ended(api, made.id)
        assert batch.status == "cancelled"
        assert batch.request_counts.completed < 100, "all of them would take 100 s"
        lines = await read(api, batch.output_file_id)
        assert len(lines) == batch.request_counts.completed >= 2
        assert batch.request_counts.total == 200


async def test_expired_batch_has_an_error_line_for_each_line_left(tmp_path: Path) -> None:
    # All of them take 10 s at least.
    given = config(tmp_path, pool={"tokens": 50, "decode_ms": 4}, batches={"max_in_flight": 1})
    async with run_gateway(given) as s, client(s) as api:
        file = await upload(api, *(line(i) for i in range(50)))
        made = await create(api, file.id, extra_body={"coe": {"deadline": "2s"}})
        batch = await ended(api, made.id)
        assert batch.status == "expired"
        assert batch.expired_at
        answered = await read(api, batch.output_file_id)
        overdue = await read(api, batch.error_file_id)
        assert len(answered) + len(overdue) == 50
        assert {each["error"]["code"] for each in overdue} == {"batch_expired"}
        # There are none where its time was over before it was planned.
        models = [*batch.coe["models"].values()]
        assert len(models) == 1 or not answered
        for model in models:
            assert (model["total"], model["completed"]) == (50, len(answered))
            assert model["failed"] == len(overdue)
        names = [each["custom_id"] for each in (*answered, *overdue)]
        assert sorted(names) == sorted(f"c{i}" for i in range(50))


async def partly_answered(api: openai.AsyncOpenAI) -> Any:
    """A batch of 30 lines, of which some are answered."""
    file = await upload(api, *(line(i) for i in range(30)))
    made = await create(api, file.id)

    async def some() -> bool:
        return await completed(api, made.id) >= 3

    await until(some, "three lines are answered")
    return made


async def test_restarted_gateway_goes_on_where_it_was(tmp_path: Path) -> None:
    given = config(tmp_path, pool={"tokens": 5, "decode_ms": 20}, batches={"max_in_flight": 2})
    async with run_gateway(given) as s, client(s) as api:
        made = await partly_answered(api)
    async with run_gateway(given) as s, client(s) as api:
        batch = await ended(api, made.id)
        assert batch.status == "completed"
        lines = await read(api, batch.output_file_id)
        assert [each["custom_id"] for each in lines] == [f"c{i}" for i in range(30)]
        assert sum(len(pool.engine.asked) for pool in s.pools.values()) <= 27


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"coe": "x"}}, "metadata.coe"),
        ({"extra_body": {"coe": {"max_cost": -1}}}, "coe.max_cost"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
    ],
)
async def test_batch_with_wrong_field_is_refused(
    tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    async with run_gateway(config(tmp_path)) as s, client(s) as api:
        file = await upload(api, line(0))
        with pytest.raises(openai.BadRequestError) as raised:
            await create(api, file.id, **fields)
        assert raised.value.param == param


async def test_uploads_are_bounded_and_leave_nothing_behind(tmp_path: Path) -> None:
    given = config(tmp_path, batches={"max_file_bytes": 2000, "tenant_bytes": 3000})
    async with run_gateway(given) as s, client(s) as api:
        with pytest.raises(openai.APIStatusError) as raised:
            await api.files.create(file=("big", b"x" * 2001), purpose="batch")
        assert raised.value.status_code == 413
        with pytest.raises(openai.BadRequestError) as wrong:
            await api.files.create(file=("x", b"x"), purpose="fine-tune")
        assert wrong.value.param == "purpose"
        await api.files.create(file=("half", b"x" * 2000), purpose="batch")
        with pytest.raises(openai.BadRequestError) as full:
            await api.files.create(file=("more", b"x" * 1500), purpose="batch")
        assert full.value.code == "storage_quota_exceeded"
        async with s.client.post(s.url + "/v1/files", data=b"{", headers={}) as reply:
            assert reply.status == 415
        assert len(list((tmp_path / "batches/files").iterdir())) == 1


async def test_uploads_at_once_keep_to_the_tenant_s_bytes(tmp_path: Path) -> None:
    most = 700_000
    given = with_keys(tmp_path, batches={"max_file_bytes": most, "tenant_bytes": most})
    folder = tmp_path / "batches/files"
    piece, go_on = b"x" * 300_000, asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + piece
        await go_on.wait()

    async with run_gateway(given) as s, client(s, OTHER) as other:
        headers = {
            "authorization": f"Bearer {KEY}",
            "content-type": "multipart/form-data; boundary=b",
        }
        posts = [
            asyncio.create_task(s.client.post(s.url + "/v1/files", data=slow(), headers=headers))
            for _ in range(5)
        ]
        try:
            await until(lambda: sum(post.done() for post in posts) == 3, "three have no room")
            refused = [await (await post).json() for post in posts if post.done()]
            assert {each["error"]["code"] for each in refused} == {"storage_quota_exceeded"}
            assert sum(path.stat().st_size for path in folder.iterdir()) <= most
            # It is the tenant's own room.
            await other.files.create(file=("x", piece), purpose="batch")
        finally:
            go_on.set()
            for reply in await asyncio.gather(*posts):
                reply.release()


async def test_outputs_beyond_the_tenant_s_bytes_end_further_batches(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path, batches={"tenant_bytes": 1500})) as s, client(s) as api:
        file = await upload(api, line(0), *("{" for _ in range(10)))
        await ended(api, (await create(api, file.id)).id)
        with pytest.raises(openai.BadRequestError) as full:
            await create(api, file.id)
        assert full.value.code == "storage_quota_exceeded"


async def test_line_over_a_limit_waits_and_comes_again(tmp_path: Path) -> None:
    keys = {"a": {"tenant": "acme", "sha256": digest_of(KEY), "concurrent": 1}}
    given = config(tmp_path, keys=keys, pool={"tokens": 5, "decode_ms": 5})
    async with run_gateway(given) as s, client(s) as api:
        file = await upload(api, *(line(i) for i in range(6)))
        batch = await ended(api, (await create(api, file.id)).id)
        assert batch.status == "completed"
        assert batch.request_counts.completed == 6


async def test_batch_at_rest_costs_no_files(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)):
        await asyncio.sleep(0)
    assert not (tmp_path / "batches").exists()


async def test_batch_with_redis_is_charged_once_and_runs_in_the_lowest_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priorities: set[str] = set()
    run = Pool.run

    async def noted(pool: Pool, call: Call, *rest: Any) -> None:
        priorities.add(call.tenant.priority)
        await run(pool, call, *rest)

    monkeypatch.setattr(Pool, "run", noted)
    with redis_server(tmp_path) as server:
        given = with_keys(
            tmp_path,
            store={"kind": "redis", "url": server.url},
            budgets={"all": {"amount": 1000, "period": "month"}},
            experts={"general": {"model": "m", "price": {"prompt": 100, "completion": 200}}},
            pool={"tokens": 5, "decode_ms": 5},
            batches={"max_in_flight": 3},
        )
        async with run_gateway(given) as s, client(s) as api:
            made = await partly_answered(api)
        async with run_gateway(given) as s, client(s) as api:
            batch = await ended(api, made.id)
            assert batch.status == "completed"
            lines = await read(api, batch.output_file_id)
            assert [each["custom_id"] for each in lines] == [f"c{i}" for i in range(30)]
            headers = {"authorization": f"Bearer {KEY}"}
            async with s.get("/v1/usage", headers=headers) as reply:
                used = await reply.json()
            (day,) = used["days"].values()
            assert day["requests"] == 30
            tokens = sum(each["response"]["body"]["usage"]["total_tokens"] for each in lines)
            assert day["prompt_tokens"] + day["completion_tokens"] == tokens
            cost = sum(each["response"]["body"]["usage"]["coe"]["cost"] for each in lines)
            (budget,) = [each for each in used["limits"] if each["name"] == "budget/all"]
            assert cost > 0
            assert not budget.get("used_up")
            spent = (await s.gateway.ledger.state())["all"]
            assert spent.spent == pytest.approx(cost, abs=1e-9)
            assert spent.reserved == 0
    assert priorities == {"batch"}


async def test_guide_s_example_is_answered(tmp_path: Path) -> None:
    (example, terms) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    async with run_gateway(config(tmp_path)) as s:
        code = example.replace("http://127.0.0.1:8000", s.url) + terms
        names: dict[str, Any] = {}
        await asyncio.to_thread(exec, compile(code, str(GUIDE), "exec"), names)
        async with client(s) as api:
            batch = await ended(api, names["batch"].id)
            assert batch.status == "completed"
            assert len(await read(api, batch.output_file_id)) == 100
            listed = [each async for each in api.batches.list()]
            # The newest comes first.
            assert [each.id for each in listed][1] == names["batch"].id
            for each in listed:
                assert (await ended(api, each.id)).status == "completed"
        names["client"].close()


async def test_line_whose_answer_takes_too_long_is_charged_once_and_ends(tmp_path: Path) -> None:
    given = with_keys(
        tmp_path,
        experts={"general": {"model": "m", "price": {"prompt": 100, "completion": 200}}},
        tenants={"acme": {"budget": {"amount": 1000, "period": "month"}}, "other": {}},
        # An answer of 2,000 tokens takes minutes, and a line may take a second.
        pool={"decode_ms": 100, "max_model_len": 4096},
        batches={"line_timeout_s": 1},
    )
    async with run_gateway(given) as s, client(s) as api:
        file = await upload(api, line(1, max_tokens=2000))
        batch = await ended(api, (await create(api, file.id)).id, 60)
        assert batch.status == "completed"
        assert batch.output_file_id is None
        (late,) = await read(api, batch.error_file_id)
        assert (late["custom_id"], late["response"]["status_code"]) == ("c1", 504)
        cost = batch.coe["cost"]
        assert cost > 0
        headers = {"authorization": f"Bearer {KEY}"}
        async with s.get("/v1/usage", headers=headers) as reply:
            found = await reply.json()
        (day,) = found["days"].values()
        assert day["requests"] == 1
        assert day["cost"] == pytest.approx(cost)
        (budget,) = [one for one in found["limits"] if one["unit"] == "cost"]
        assert budget["spent"] == pytest.approx(cost)
        # Some tokens of the answer were made by then, and not all.
        assert 0 < batch.usage.output_tokens < 2000


async def test_lines_that_name_aliases_are_answered_and_counted_by_target(tmp_path: Path) -> None:
    expert = {"model": "m", "categories": ["general"]}
    given = config(
        tmp_path,
        experts={"general": expert, "new": {"model": "n"}},
        aliases={"prod": {"general": 1, "new": 1}, "gpt-4o": "prod", "any-*": "auto"},
    )
    async with run_gateway(given) as s, client(s) as api:
        names = ["prod", "gpt-4o", "any-thing", "general"]
        file = await upload(api, *(line(i, model=names[i % 4]) for i in range(48)))
        batch = await ended(api, (await create(api, file.id)).id)
        assert batch.request_counts.completed == 48
        experts = [
            each["response"]["body"]["usage"]["coe"]["expert"]
            for each in await read(api, batch.output_file_id)
        ]
        async with s.get("/metrics") as reply:
            text = await reply.text()
    found = re.findall(r'^coe_alias_requests_total{alias="(.+?)",(.+)} (\S+)$', text, re.MULTILINE)
    counts: dict[tuple[str, str], float] = {}
    for alias, labels, count in found:
        assert 'result="ok"' in labels
        target = re.search(r'target="(.+?)"', labels)
        assert target is not None
        counts[alias, target[1]] = float(count)
    targets: set[str] = set()
    for at, alias in enumerate(names[:2]):
        drawn = experts[at::4]
        targets |= set(drawn)
        for target in set(drawn):
            assert counts.pop((alias, target)) == drawn.count(target)
    assert targets == {"general", "new"}
    assert counts == {("any-*", "auto"): 12}


async def test_batch_with_official_node_client(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as s:
        answer = await asyncio.to_thread(run_node, "batches_node.mjs", s.url)
    assert answer == {
        "first": "validating",
        "status": "completed",
        "counts": {"total": 3, "completed": 3, "failed": 0},
        "lives_s": 7200,
        "ids": ["c0", "c1", "c2"],
        "files": True,
        "batches": True,
        "unknown": 404,
        "late": 409,
        "deleted": True,
    }


async def test_batch_whose_terms_no_plan_keeps_fails(tmp_path: Path) -> None:
    experts = {"general": {"model": "m", "price": {"prompt": 0, "completion": 1_000_000}}}
    async with run_gateway(config(tmp_path, experts=experts)) as s, client(s) as api:
        # Each answer has four tokens, of one unit each.
        file = await upload(api, *(line(i, max_tokens=4) for i in range(10)))
        terms = {"coe": {"max_cost": 12.5}}
        batch = await ended(api, (await create(api, file.id, extra_body=terms)).id)
        assert batch.status == "failed"
        assert batch.errors.data[0].param == "coe.max_cost"
