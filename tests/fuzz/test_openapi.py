"""Schemathesis against the OpenAPI description of the service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.support.gateway_thread import GatewayThread, gateway_in_thread
from tests.support.in_process_service import simulated

CONFIG = simulated(
    {"cpu": {"tokens": 2, "max_model_len": 100_000}},
    experts={
        "general": {"model": "m", "categories": ["general"]},
        "vectors": {"model": "m", "capabilities": ["embeddings"]},
    },
)


@pytest.fixture(scope="module")
def apart() -> Iterator[GatewayThread]:
    with gateway_in_thread(CONFIG) as made:
        yield made


thorough = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_operation_matches_its_openapi_description(apart: GatewayThread) -> None:
    schema = schemathesis.openapi.from_url(apart.gateway.url + "/openapi.json")
    count: Counter[str] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        thorough(given(case=operation.as_strategy())(keeping(count, operation)))()
    assert len(count) >= 15
    assert sum(count.values()) > 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stream_matches_its_openapi_description(apart: GatewayThread, path: str) -> None:
    schema = schemathesis.openapi.from_url(apart.gateway.url + "/openapi.json")
    words = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    body = {"model": "general", "max_tokens": 2, "stream": True, **words}
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    reply = case.call(timeout=20)
    assert "text/event-stream" in reply.headers["content-type"][0]
    case.validate_response(reply, checks=[not_a_server_error, response_schema_conformance])


def keeping(asked: Counter[str], operation: Any) -> Any:
    name = f"{operation.method.upper()} {operation.path}"

    def holds(case: Any) -> None:
        # A deadline that is really short is answered by a 504, which is right.
        if "x-coe-deadline-ms" in (case.headers or {}):
            case.headers["x-coe-deadline-ms"] = "86400000"
        reply = case.call(timeout=20)
        asked[name] += 1
        if name == "GET /ready":
            return  # 503 is its way to say no
        case.validate_response(reply, checks=[not_a_server_error, response_schema_conformance])
        assert "Traceback" not in reply.text

    return holds
