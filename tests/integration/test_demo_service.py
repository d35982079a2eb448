"""The demo composition with real vLLM behind `coe serve`: four prompts, four experts.

One service for these and the tests of clients, which come before; the last tests kill its
engine and stop it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact
from tests.project.test_dashboards import BOARDS, panels
from tests.support.coe_serve_process import Service, wait_until
from tests.support.prometheus_server import needs_prometheus, prometheus

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
HELLO: Any = [{"role": "user", "content": "Say hello."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def service(demo: Service) -> Service:
    """The running demo."""
    return demo


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The official client, without its own retries."""
    with openai.OpenAI(
        base_url=service.url + "/v1", api_key="none", max_retries=0, timeout=180
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("Tell me a joke", "general"),
        ("A farmer has 12 cows and buys 7 more. How many cows?", "math"),
        ("please freeze my bank account", "intents"),
        ("Write a Python function that reverses a string", "code"),
    ],
)
def test_demo_four_prompts_reach_the_best_experts_of_their_categories(
    client: openai.OpenAI, prompt: str, category: str
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=12,
        temperature=0,
    )
    completion = raw.parse()
    assert raw.headers["x-coe-category"] == category
    found = ExpertMap.from_artifact(load_artifact(ROOT / "router_models" / "artifacts" / "demo@2"))
    quality = found.score[found.categories.index(category)]
    expert = found.recipes[int(quality.argmax())].name
    assert completion.model == raw.headers["x-coe-expert"] == expert
    assert expert == category or category == "general"
    assert 0 < float(raw.headers["x-coe-confidence"]) <= 1
    assert completion.choices[0].message.content


def test_demo_experts_answer_differently(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "please freeze my bank account"}],
            max_tokens=10,
            temperature=0,
        )
        .choices[0]
        .message.content
        for model in ("general", "intents")
    }
    assert len(answers) == 2
    assert any("freeze" in (text or "").lower() for text in answers)


def test_demo_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="general",
            messages=HELLO,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    whole = client.chat.completions.create(
        model="general", messages=HELLO, max_tokens=8, temperature=0
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    # Times differ.
    counts = {"exclude": {"coe"}}
    assert chunks[-1].usage.model_dump(**counts) == whole.usage.model_dump(**counts)
    assert len([c for c in chunks if c.choices]) > 2


def test_demo_json_schema_from_an_adapter(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    completion = client.chat.completions.create(
        model="math", messages=HELLO, max_tokens=60, temperature=0, response_format=form
    )
    jsonschema.validate(json.loads(completion.choices[0].message.content or ""), SCHEMA)


def test_demo_named_tool_is_called(client: openai.OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "function": {"name": "look_up", "parameters": SCHEMA, "strict": True},
    }
    completion = client.chat.completions.create(
        model="general",
        messages=HELLO,
        max_tokens=60,
        temperature=0,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "look_up"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_demo_prompt_above_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="general", messages=[{"role": "user", "content": "word " * 5000}]
        )
    assert long.value.code == "context_length_exceeded"
    assert "2048" in long.value.message


def test_demo_missed_deadline_is_a_504(client: openai.OpenAI) -> None:
    # Its answers are short, so that such a deadline is expected to be met.
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(
            model="intents",
            messages=HELLO,
            max_tokens=1500,
            extra_body={"ignore_eos": True},
            extra_headers={"x-coe-deadline-ms": "4000"},
        )
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    wait_until(lambda: running(client) == 0, "the engine has stopped it")


def test_demo_client_disconnect_stops_the_generation(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="general",
        messages=HELLO,
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
        wait_until(lambda: running(client) == 1, "vLLM tells of it")
    wait_until(lambda: running(client) == 0, "the engine has stopped it")


@needs_prometheus
def test_demo_dashboards_show_vllm_s_own_metrics(
    service: Service, client: openai.OpenAI, tmp_path: Path
) -> None:
    board = next(board for board in BOARDS if board.stem == "coe-engines")
    vllm = [p for p in panels(board) if any("vllm:" in t["expr"] for t in p["targets"])]
    assert vllm
    with prometheus(service.url, tmp_path) as live:
        for model in ("general", "math"):
            for _ in range(2):
                client.chat.completions.create(model=model, messages=HELLO, max_tokens=8)

        def shown() -> bool:
            return all(live.series(t["expr"]) for p in vllm for t in p["targets"])

        wait_until(shown, "every panel of vLLM's metrics shows something")
        # Adapters have no engine of their own, and their tokens are told all the same.
        answers = live.series('sum by (expert) (coe_tokens_total{type="completion"}) > 0')
        assert {answer["metric"]["expert"] for answer in answers} >= {"general", "math"}


def test_demo_killed_engine_is_replaced_and_a_request_answered(
    service: Service, client: openai.OpenAI
) -> None:
    (core,) = service.named("EngineCore")
    core.kill()
    began_s = time.monotonic()
    # It waits for the next engine; the client notices nothing but the time.
    completion = client.chat.completions.create(
        model="intents",
        messages=HELLO,
        max_tokens=4,
        extra_headers={"x-coe-deadline-ms": "170000"},
    )
    assert completion.model == "intents"
    assert time.monotonic() - began_s < 175
    (new,) = service.named("EngineCore")
    assert new.pid != core.pid


def test_demo_stop_leaves_nothing(service: Service) -> None:
    run_dir = service.run_dir
    service.stop()
    assert service.process.returncode == 0
    wait_until(lambda: service.left() == [], "no process is left")
    assert not run_dir.exists()
    assert "Traceback" not in service.log


def running(client: openai.OpenAI) -> float:
    """Requests in vLLM, as /metrics tells."""
    text = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).get(
        "/metrics", cast_to=str
    )
    found = re.findall(r"^vllm:num_requests_running\{[^}]*\} (\S+)", text, re.MULTILINE)
    assert found, "vLLM's metrics are missing"
    return sum(map(float, found))
