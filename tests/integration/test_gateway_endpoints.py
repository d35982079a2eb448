"""The gateway's endpoints over HTTP, with one simulated pool behind it."""

from __future__ import annotations

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from service.errors import ArtifactError, CoeError, ConfigError, ModelStoreError
from service.telemetry.json_logging import JsonLines
from tests.support.in_process_service import ADMIN_KEY, CHAT, chat, events, run_gateway, simulated

ONE = simulated({"cpu": {"tokens": 4}}, server={"max_body_bytes": 2000})


async def test_chat_whole_answer_has_usage_and_headers() -> None:
    async with run_gateway(ONE) as s:
        status, headers, body = await s.ask(chat(), headers={"x-request-id": "mine"})
        assert status == 200
        assert body["model"] == "general"
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"].startswith("general:")
        assert body["usage"]["completion_tokens"] == 4
        assert headers["x-coe-expert"] == "general"
        assert headers["x-request-id"] == "mine"
        assert float(headers["x-coe-route-ms"]) >= 0
        assert float(headers["x-coe-queue-ms"]) >= 0
        assert "x-coe-category" not in headers


async def test_auto_has_category_and_confidence_headers() -> None:
    async with run_gateway(ONE) as s:
        for model in ("auto", "auto/general"):
            status, headers, body = await s.ask(chat(model=model))
            assert (status, body["model"]) == (200, "general")
            assert headers["x-coe-category"] == "general"
            assert 0 <= float(headers["x-coe-confidence"]) <= 1


async def test_chat_stream_with_usage() -> None:
    async with run_gateway(ONE) as s:
        body = chat(stream=True, stream_options={"include_usage": True})
        async with s.post(body) as reply:
            assert reply.status == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            received = events(await reply.read())
        assert received[-1] == "[DONE]"
        chunks = [json.loads(item) for item in received[:-1]]
        text = "".join(c["choices"][0]["delta"]["content"] for c in chunks if c["choices"])
        assert text.startswith("general:")
        assert chunks[-1]["usage"]["completion_tokens"] == 4
        assert {c["model"] for c in chunks} == {"general"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, chat(model="nobody"), 404, "model", "model_not_found"),
        (CHAT, chat(model="auto/poetry"), 404, "model", "model_not_found"),
        (CHAT, {"model": "general"}, 400, "messages", "invalid_request_error"),
        (CHAT, chat(stream="yes"), 400, "stream", "invalid_request_error"),
        (CHAT, chat(max_tokens=10**5), 400, "messages", "context_length_exceeded"),
        (CHAT, chat(n=0), 400, "n", "invalid_request_error"),
        (CHAT, chat("x" * 3000), 413, None, "request_too_large"),
        ("/v1/embeddings", {"model": "general", "input": "x"}, 400, "model", None),
        ("/v1/responses", {"model": "general"}, 400, "input", "invalid_request_error"),
        ("/v1/nothing", {}, 404, None, "not_found"),
    ],
)
async def test_refused_request_has_openai_s_error_shape(
    path: str, body: object, status: int, param: str | None, code: str | None
) -> None:
    async with run_gateway(ONE) as s:
        got, headers, answer = await s.ask(body, path)
        assert got == status
        error = answer["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["param"] == param
        assert error["code"] == (code or "invalid_request_error")
        assert headers["content-type"] == "application/json"


async def test_prompt_above_the_context_names_both_numbers() -> None:
    async with run_gateway(ONE) as s:
        _, _, answer = await s.ask(chat("a b c", max_tokens=5000))
        assert "2048" in answer["error"]["message"]
        assert "5000" in answer["error"]["message"]


async def test_invalid_json_and_wrong_method_are_refused() -> None:
    async with run_gateway(ONE) as s:
        json_type = {"content-type": "application/json"}
        async with s.client.post(s.url + CHAT, data=b"{", headers=json_type) as reply:
            assert reply.status == 400
            assert "valid JSON" in (await reply.json())["error"]["message"]
        async with s.get(CHAT) as reply:
            assert reply.status == 405
            assert reply.headers["allow"] == "POST"
            assert "takes POST, not GET" in (await reply.json())["error"]["message"]


async def test_health_ready_models_and_other_endpoints_answer() -> None:
    async with run_gateway(ONE) as s:
        async with s.get("/health") as reply:
            assert (reply.status, await reply.json()) == (200, {"status": "ok"})
        async with s.get("/ready") as reply:
            assert (await reply.json())["experts"]["general"]["state"] == "device"
        async with s.get("/v1/models") as reply:
            assert [m["id"] for m in (await reply.json())["data"]] == ["auto", "general"]
        async with s.get("/v1/models/general") as reply:
            assert (await reply.json())["coe"]["engine"]["name"] == "simulated"
        async with s.get("/v1/models/nobody") as reply:
            assert reply.status == 404
            assert (await reply.json())["error"]["code"] == "model_not_found"
        async with s.get("/openapi.json") as reply:
            assert CHAT in (await reply.json())["paths"]
        status, _, body = await s.ask({"model": "general", "prompt": "a b"}, "/tokenize")
        assert (status, body["count"]) == (200, 2)
        status, _, body = await s.ask({"model": "general", "tokens": [1, 2]}, "/detokenize")
        assert (status, body["prompt"]) == (200, "small answer")


async def test_metrics_count_every_outcome_once() -> None:
    async with run_gateway(ONE) as s:
        await s.ask(chat())
        await s.ask(chat(model="auto"))
        await s.ask(chat(model="nobody"))
        await s.ask(chat(n=0))
        async with s.get("/metrics") as reply:
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
            families = list(text_string_to_metric_families(await reply.text()))
        counted = {
            tuple(sample.labels[name] for name in ("expert", "category", "outcome")): sample.value
            for family in families
            for sample in family.samples
            if sample.name == "coe_requests_total"
        }
        assert counted == {
            ("general", "", "ok"): 1,
            ("general", "general", "ok"): 1,
            ("", "", "model_not_found"): 1,
            ("general", "", "client_error"): 1,
        }
        pools = {s.labels["pool"] for f in families for s in f.samples if "pool" in s.labels}
        assert len(pools) == 1


async def test_prompts_are_in_no_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    secret = "a very private question"
    config = simulated({"cpu": {"fail": "first_byte"}}, server={"access_log": True})
    async with run_gateway(config) as s:
        status, _, answer = await s.ask(chat(secret))
        assert status == 500
        await s.ask(chat(secret, stream="yes"))
        await s.ask({"model": secret, "messages": []})
    out = capfd.readouterr()
    lines = [record.getMessage() + str(record.__dict__) for record in caplog.records]
    assert any("coe.access" in line for line in lines)
    assert secret not in "".join(lines) + out.out + out.err
    assert secret not in answer["error"]["message"]


async def test_unexpected_exception_is_a_500_without_its_text(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway(ONE) as s:

        def broken(*args: object) -> None:
            raise RuntimeError("a very private question")

        monkeypatch.setattr(s.pools["cpu"].engine, "run", broken)
        status, _, answer = await s.ask(chat())
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "private" not in answer["error"]["message"]
        monkeypatch.setattr(s.gateway.current.services.planner, "plan", broken)
        status, _, answer = await s.ask(chat())
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert "private" not in str(answer)
    assert {r.name for r in caplog.records if r.exc_info} <= {"coe.api", "coe.link"}


async def test_feedback_body_has_the_same_timeout_as_a_prompt() -> None:
    slow = simulated({"cpu": {}}, server={"limits": {"body_timeout_s": 1}})
    async with run_gateway(slow) as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(s.url).port)
        head = b"POST /v1/feedback HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: 50\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("kind", [ConfigError, ArtifactError, ModelStoreError])
async def test_reload_of_an_invalid_config_is_a_409(kind: type[CoeError]) -> None:
    async def reload() -> dict[str, list[str]]:
        raise kind("experts.a: it is wrong")

    async with run_gateway(ONE, reload) as s:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        status, _, answer = await s.ask({}, "/admin/reload", headers=headers)
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert answer["error"]["message"] == "experts.a: it is wrong"


async def test_exception_in_routing_is_a_500_and_is_logged_without_its_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def plan(request: object) -> None:
        raise RuntimeError("hello there")

    async with run_gateway(ONE) as s:
        monkeypatch.setattr(s.gateway.current.services.planner, "plan", plan)
        for path in ("/v1/route", CHAT):
            status, headers, answer = await s.ask(chat("hello there"), path)
            assert (status, answer["error"]["code"]) == (500, "internal_error"), path
            assert headers["x-coe-fault"] == "internal_error"
            assert "hello" not in str(answer)
    logged = [record for record in caplog.records if record.exc_info]
    # Our own logger's alone, which leaves texts out.
    assert [record.name for record in logged] == ["coe.api", "coe.api"]
    assert not any("hello" in JsonLines().format(record) for record in logged)


async def test_auto_max_tokens_above_the_context_are_clipped_with_a_header() -> None:
    config = simulated({"cpu": {"tokens": 4, "max_model_len": 50}})
    async with run_gateway(config) as s:
        for name in ("auto", "auto:fast"):
            status, headers, body = await s.ask(chat(model=name, max_completion_tokens=64_000))
            assert (status, headers["x-coe-max-tokens"]) == (200, "50")
            assert body["usage"]["completion_tokens"] == 48
        status, headers, body = await s.ask(chat(max_tokens=64_000))
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        status, headers, _ = await s.ask(chat(model="auto", max_tokens=7))
        assert status == 200
        assert "x-coe-max-tokens" not in headers
