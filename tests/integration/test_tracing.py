"""Traces as a collector receives them: one per request, from the client's span to the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.config import Config
from service.http.asgi_helpers import read_body
from tests.integration.test_recipes import Cast
from tests.support.in_process_service import chat, run_gateway, serving, simulated
from tests.support.traffic_for_every_metric import LINES, everything

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "a prompt that nobody else may read"


@dataclass
class Collector:
    """An OTLP collector: an ASGI application that keeps what it is sent."""

    spans: list[tuple[str, Span]] = field(default_factory=list)
    raw: bytes = b""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        assert scope["path"] == "/v1/traces"
        body = await read_body(receive, 10**7)
        self.raw += body
        sent = ExportTraceServiceRequest.FromString(body)
        for resource in sent.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scoped in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scoped.spans]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def named(self, name: str) -> list[Span]:
        return [span for _, span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        (found,) = self.named(name)
        return found

    def parent(self, span: Span) -> str:
        """The name of a span's parent; empty where it is not ours."""
        names = {other.span_id: f"{who} {other.name}" for who, other in self.spans}
        return names.get(span.parent_span_id, "")


def attributes(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    async with serving(collector) as served:
        yield collector, served.url + "/v1/traces"


def traced(url: str, **more: Any) -> Config:
    config = simulated({"cpu": {"tokens": 4, "decode_ms": 5, **more}})
    return config.model_copy(
        update={"telemetry": config.telemetry.model_copy(update={"traces_url": url})}
    )


async def test_trace_spans_from_the_client_to_the_engine() -> None:
    async with collecting() as (collector, url):
        async with run_gateway(traced(url)) as s:
            body = chat(SECRET, model="auto", stream=True, max_tokens=4, temperature=0.5)
            headers = {"traceparent": CLIENT, "x-request-id": "mine"}
            async with s.post(body, headers=headers) as reply:
                assert reply.status == 200
                await reply.read()
        # Everything has stopped, and so was sent.
        assert {span.trace_id.hex() for _, span in collector.spans} == {CLIENT.split("-")[1]}
        server = collector.one("POST /v1/chat/completions")
        assert server.parent_span_id.hex() == CLIENT.split("-")[2]
        spans, pooled = collector.named("chat general")
        assert {collector.parent(spans), collector.parent(pooled)} == {
            "coe-gateway POST /v1/chat/completions",
            "coe-gateway chat general",
        }
        for name, parent in (
            ("route", "coe-gateway POST /v1/chat/completions"),
            ("queue", "coe-pool chat general"),
            ("engine", "coe-pool chat general"),
            ("prefill", "coe-pool engine"),
            ("decode", "coe-pool engine"),
        ):
            span = collector.one(name)
            assert collector.parent(span) == parent
            assert server.start_time_unix_nano <= span.start_time_unix_nano
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= server.end_time_unix_nano + 10**7
        decode = collector.one("decode")
        assert decode.end_time_unix_nano - decode.start_time_unix_nano > 10**7
        found = attributes(server)
        assert found["gen_ai.operation.name"] == "chat"
        assert found["gen_ai.request.model"] == "auto"
        assert found["gen_ai.response.model"] == "general"
        assert found["gen_ai.request.max_tokens"] == 4
        assert found["gen_ai.request.temperature"] == 0.5
        assert found["http.response.status_code"] == 200
        assert "error.type" not in found
        assert SECRET.encode() not in collector.raw


async def test_trace_has_the_tokens_and_cost_of_the_reply() -> None:
    async with collecting() as (collector, url):
        config = traced(url).model_dump(mode="json", exclude_defaults=True)
        config["experts"] = {"general": {"model": "m", "price": {"prompt": 2, "completion": 3}}}
        async with run_gateway(Config.model_validate(config)) as s:
            status, _, body = await s.ask(chat("one two three", max_tokens=4))
            assert status == 200
        usage = body["usage"]
        found = attributes(collector.one("POST /v1/chat/completions"))
        assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] > 0
        assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 4
        assert found["coe.cost"] == usage["coe"]["cost"] > 0


async def test_trace_queue_time_includes_a_swap() -> None:
    async with collecting() as (collector, url):
        config = traced(url).model_dump(mode="json", exclude_defaults=True)
        config["experts"] = {name: {"model": "m"} for name in ("a", "b")}
        config["pools"]["cpu"] |= {"slots": 1, "swap": {"min_stay_s": 0.01}}
        config["pools"]["cpu"]["simulated"] |= {"swap_s": 0.05}
        async with run_gateway(Config.model_validate(config)) as s:
            for model in ("a", "b", "a"):
                status, _, _ = await s.ask(chat(model=model))
                assert status == 200
        swaps = collector.named("swap")
        assert swaps
        assert {collector.parent(span) for span in swaps} == {"coe-pool queue"}
        for span in swaps:
            assert span.end_time_unix_nano - span.start_time_unix_nano >= 4 * 10**7


async def test_trace_failed_attempt_and_refusal_are_errors() -> None:
    async with collecting() as (collector, url):
        async with run_gateway(traced(url, fail="first_byte")) as s:
            assert (await s.ask(chat()))[0] == 500
            assert (await s.ask(chat(model="nobody")))[0] == 404
        failed = [attributes(span).get("error.type") for _, span in collector.spans]
        assert "engine_dead" in failed
        refused = [
            attributes(span)
            for span in collector.named("POST /v1/chat/completions")
            if attributes(span)["http.response.status_code"] == 404
        ]
        assert [item["error.type"] for item in refused] == ["model_not_found"]


@pytest.mark.parametrize(("flag", "count"), [("00", 0), ("01", 1)])
async def test_trace_sampling_follows_the_client_s_flag(flag: str, count: int) -> None:
    async with collecting() as (collector, url):
        async with run_gateway(traced(url)) as s:
            given = {"traceparent": CLIENT[:-2] + flag}
            assert (await s.ask(chat(), headers=given))[0] == 200
        assert len(collector.named("POST /v1/chat/completions")) == count


async def test_trace_unreachable_collector_affects_no_request() -> None:
    async with run_gateway(traced("http://127.0.0.1:9/v1/traces")) as s:
        assert (await s.ask(chat()))[0] == 200


@pytest.mark.parametrize("on", [False, True])
async def test_trace_context_is_sent_to_a_remote_expert(on: bool) -> None:
    got: list[str] = []

    async def upstream(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await read_body(receive, 10**6)
        got.append(dict(scope["headers"])[b"traceparent"].decode())
        head = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"{}"})

    async with serving(upstream) as there, collecting() as (collector, url):
        config = Config.model_validate(
            {
                "telemetry": {"traces_url": url} if on else {},
                "experts": {"far": {"remote": {"url": there.url, "model": "m"}}},
            }
        )
        async with run_gateway(config) as s:
            status, _, _ = await s.ask(chat(model="far"), headers={"traceparent": CLIENT})
            assert status == 200
        if not on:
            # As the client gave it: nobody here has a span of its own.
            assert got == [CLIENT]
            return
        _, trace_id, parent, _ = got[0].split("-")
        assert trace_id == CLIENT.split("-")[1]
        assert collector.one("chat far").span_id.hex() == parent


async def test_trace_of_a_recipe_has_all_its_experts() -> None:
    cast = Cast()
    cast.lines = dict(LINES)
    async with serving(cast) as upstream, collecting() as (collector, url):
        config = everything(upstream.url)
        telemetry = config.telemetry.model_copy(update={"traces_url": url})
        async with run_gateway(config.model_copy(update={"telemetry": telemetry})) as s:
            status, headers, _ = await s.ask(chat(model="careful"))
            assert (status, headers["x-coe-expert"]) == (200, "strong")
        server = collector.one("POST /v1/chat/completions")
        for name in ("chat far", "chat near", "chat strong"):
            spans = collector.one(name)
            assert spans.trace_id == server.trace_id
            assert collector.parent(spans) == "coe-gateway POST /v1/chat/completions"
        assert attributes(server)["coe.recipe"].startswith("cascade(")
