"""Other clients against the running demo, each as its own users would use it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.clients.python_clients import PLACE
from tests.support.coe_serve_process import Service
from tests.support.third_party_clients import ROOT, SCRIPTS, last_json, python, run, run_node

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

EXPERTS = ["general", "math", "intents", "code", "brief"]
RECIPES = ["second-try"]


def test_anthropic_client(demo: Service) -> None:
    given: Any = {
        "model": "auto",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Say hello."}],
    }
    with anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(**given)
        assert whole.content[0].type == "text"
        assert whole.usage.output_tokens > 0
        with client.messages.stream(**given) as stream:
            assert "".join(stream.text_stream)
        counted = client.messages.count_tokens(model="general", messages=given["messages"])
        assert counted.input_tokens > 5
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**given, "model": "nobody"})
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(**{**given, "messages": []})


def test_openai_node_client(demo: Service) -> None:
    answer = run_node("openai_node.mjs", demo.url)
    assert answer["whole"]
    assert answer["stream"]
    assert answer["model"] in EXPERTS
    jsonschema.validate(answer["place"], PLACE)
    assert answer["call"]["name"] == "look_up"
    jsonschema.validate(json.loads(answer["call"]["arguments"]), PLACE)
    assert set(EXPERTS) < set(answer["models"])
    assert answer["unknown"] == {"kind": "NotFoundError", "status": 404, "code": "model_not_found"}
    assert answer["wrong"]["kind"] == "BadRequestError"
    assert answer["embeddings"] == "BadRequestError"


def test_litellm_client(demo: Service) -> None:
    answer = last_json(run([python(), SCRIPTS / "python_clients.py", "litellm", demo.url]))
    assert answer["whole"]
    assert answer["stream"]
    assert answer["fault"] == "NotFoundError"


def test_langchain_client(demo: Service) -> None:
    answer = last_json(run([python(), SCRIPTS / "python_clients.py", "langchain", demo.url]))
    assert answer["whole"]
    assert answer["expert"] in EXPERTS
    assert answer["stream"]
    jsonschema.validate(answer["place"], PLACE)
    assert answer["fault"] == "model_not_found"


def test_llm_client(demo: Service, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: coe\n  model_name: auto\n  api_base: {demo.url}/v1\n  api_key_name: coe\n"
    )
    llm = python().with_name("llm")
    prompt = ["-m", "coe", "-o", "max_tokens", "8", "--key", "none", "Say hello."]
    assert run([llm, *prompt], LLM_USER_PATH=str(tmp_path)).strip()
    assert run([llm, *prompt, "--no-stream"], LLM_USER_PATH=str(tmp_path)).strip()


def test_examples_run(demo: Service) -> None:
    scripts = sorted((ROOT / "examples").glob("[a-z]*"))
    assert len(scripts) == 5
    for script in scripts:
        if script.suffix == ".py":
            command: list[Any] = [sys.executable, script]
        else:
            command = ["bash", script]
        output = run(command, COE_URL=demo.url)
        assert output.strip(), f"{script.name} says nothing"


def test_official_client_lists_every_expert_and_recipe(demo: Service) -> None:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["auto", *EXPERTS, *RECIPES]
