from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.config import CommandConfig, Config, ExpertConfig
from service.config.command_experts import with_port

RUN = ["server", "--port", "{port}"]
SLEEP: dict[str, Any] = {"sleep": {"url": "/sleep"}, "wake": {"url": "/wake"}}


def given(**changed: Any) -> dict[str, Any]:
    return {"run": RUN, "memory_bytes": "1GiB", **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": []}, "at least 1 item"),
        ({"run": ["", "{port}"]}, "the program is empty"),
        ({"run": [" ", "{port}"]}, "the program is empty"),
        ({"run": ["s", "{prot}", "{port}"]}, "run.1: unknown placeholder {prot}"),
        ({"run": ["s", "${HOME}/x", "{port}"]}, "unknown placeholder {HOME}"),
        ({"env": {"A": "{model}"}}, "env.A: unknown placeholder {model}"),
        ({"run": ["s", "--port", "8000"]}, "{port} is in no argument"),
        ({"run": ["s", "{{port}}"]}, "{port} is in no argument"),
        ({"run": ["s", "{port}\x00"]}, "NUL"),
        ({"run": "server --port {port}"}, "tuple"),
        ({"url": "http://127.0.0.1:8000/v1"}, "url"),
        ({"url": "http://example.com:{port}/v1"}, "url"),
        ({"url": "https://127.0.0.1:{port}/v1"}, "url"),
        ({"ready": "health"}, "ready"),
        ({"ready": "/a b"}, "ready"),
        ({"sleep": {"url": "/sleep"}}, "sleep and wake go together"),
        ({"wake": {"url": "/wake"}}, "sleep and wake go together"),
        ({"sleep": {"url": "http://other/"}, "wake": {"url": "/"}}, "sleep.url"),
        ({"env": {"A_KEY": "x"}, "secret_env": ["A_KEY"]}, "secret_env: A_KEY is in env as well"),
        ({"env": {"no name": "x"}}, "no name"),
        ({"stop_signal": "SIGSTOP"}, "stop_signal"),
        ({"endpoints": ["/v1/images"]}, "endpoints"),
    ],
)
def test_command_that_cannot_work_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CommandConfig.model_validate(given(**changed))
    assert message in str(caught.value)


def test_command_needs_its_memory() -> None:
    with pytest.raises(ValidationError, match="memory_bytes"):
        CommandConfig.model_validate({"run": RUN})


@pytest.mark.parametrize(
    "text",
    ['{"enable_thinking": false}', "{{ messages }}", "{{messages}}", "{}", "{ port }", "a{b"],
)
def test_command_leaves_other_braces_as_they_are(text: str) -> None:
    config = CommandConfig.model_validate(given(run=[*RUN, text]))
    assert with_port(config.run[-1], 8000) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{port}", "80"), ("a:{port},b:{port}", "a:80,b:80"), ("{{port}}", "{{port}}"), ("p", "p")],
)
def test_with_port_replaces_the_placeholder_alone(text: str, expected: str) -> None:
    assert with_port(text, 80) == expected


@pytest.mark.parametrize(
    ("changed", "asleep"),
    [
        ({}, 0),
        (SLEEP, 1024**3),
        ({**SLEEP, "sleep": {"url": "/sleep", "memory_bytes": 7}}, 7),
    ],
)
def test_sleep_bytes_are_those_of_a_server_that_can_sleep(
    changed: dict[str, Any], asleep: int
) -> None:
    assert CommandConfig.model_validate(given(**changed)).sleep_bytes == asleep


@pytest.mark.parametrize(
    "other",
    [
        {"model": "m"},
        {"base": "b", "defaults": {}},
        {"remote": {"url": "https://x/v1", "model": "m"}},
        {"vllm": {"moe_backend": "triton"}},
    ],
)
def test_expert_has_one_source(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExpertConfig.model_validate({"command": given(), **other})


def test_config_command_expert_is_a_unit_of_its_own() -> None:
    config = Config.model_validate(
        {
            "experts": {
                "a": {"command": given()},
                "b": {"command": given()},
                "m": {"model": "m"},
                "v": {"base": "a", "defaults": {"system": "x"}},
            },
            "pools": {"p": {}},
        }
    )
    assert config.units("p") == (("a",), ("b",), ("m",))
    assert config.model_sources() == {"m": "m"}
    assert config.owner_of("v") == "a"


@pytest.mark.parametrize("more", [{"adapter": "x"}, {"profile": "x"}])
def test_config_command_expert_is_no_base_of_weights(more: dict[str, Any]) -> None:
    experts = {"a": {"command": given()}, "b": {"base": "a", **more}}
    with pytest.raises(ValidationError, match="'a' has no full weights of its own"):
        Config.model_validate({"experts": experts, "pools": {"p": {}}})
