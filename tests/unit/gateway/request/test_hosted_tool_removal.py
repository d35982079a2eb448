"""Hosted tools that coding agents request and the service does not run."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.errors import DisallowedFieldError
from service.gateway.request.parsing import InferenceRequest, parse_request
from tests.support.in_process_service import run_gateway, simulated

FUNCTION = {"type": "function", "name": "run", "parameters": {"type": "object"}}
NAMESPACE = {"type": "namespace", "name": "mcp__notes__", "tools": [FUNCTION]}
SEARCH = {"type": "web_search"}
CUSTOM = {"type": "custom", "name": "edit", "format": {"type": "text"}}
CLAUDE = {"name": "Read", "input_schema": {"type": "object"}}
CLAUDE_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}


def request_for(path: str, tools: Any, **more: Any) -> InferenceRequest:
    prompt = {"messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 5}
    return parse_request(path, orjson.dumps({**prompt, "tools": tools, **more}), {}, 1000)


@pytest.mark.parametrize(
    ("path", "tools", "kept", "left_out"),
    [
        (
            "/v1/responses",
            [FUNCTION, SEARCH, NAMESPACE, CUSTOM],
            [FUNCTION, NAMESPACE, CUSTOM],
            ("web_search",),
        ),
        (
            "/v1/responses",
            [SEARCH, {"type": "image_generation"}, SEARCH],
            None,
            ("web_search", "image_generation"),
        ),
        (
            "/v1/responses",
            [{"type": "web_search_preview_2025_03_11"}, FUNCTION],
            [FUNCTION],
            ("web_search_preview_2025_03_11",),
        ),
        (
            "/v1/responses",
            [{"type": "local_shell"}, {"type": "apply_patch"}],
            None,
            ("local_shell", "apply_patch"),
        ),
        ("/v1/messages", [CLAUDE, CLAUDE_SEARCH], [CLAUDE], ("web_search_20250305",)),
        ("/v1/messages", [{"type": "bash_20250124", "name": "bash"}], None, ("bash_20250124",)),
        ("/v1/messages/count_tokens", [CLAUDE, CLAUDE_SEARCH], [CLAUDE], ("web_search_20250305",)),
    ],
)
@pytest.mark.parametrize("choice", ["auto", {"type": "auto"}, "none", None])
def test_hosted_tools_are_removed_and_named(
    path: str, tools: Any, kept: Any, left_out: tuple[str, ...], choice: Any
) -> None:
    found = request_for(path, tools, tool_choice=choice)
    assert found.left_out == left_out
    assert found.data.get("tools") == kept
    assert orjson.loads(found.body_for("e")).get("tools") == kept
    assert ("tool_choice" in found.data) is (kept is not None and choice is not None)
    assert ("tools" in found.needs) is (kept is not None and choice != "none")


@pytest.mark.parametrize(
    ("path", "tools", "choice"),
    [
        ("/v1/responses", [SEARCH, FUNCTION], {"type": "web_search"}),
        ("/v1/responses", [SEARCH], "required"),
        (
            "/v1/responses",
            [SEARCH, FUNCTION],
            {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]},
        ),
        ("/v1/messages", [CLAUDE_SEARCH], {"type": "tool", "name": "web_search"}),
        ("/v1/messages", [CLAUDE_SEARCH], {"type": "any"}),
    ],
)
def test_hosted_tool_required_by_tool_choice_raises_with_its_name(
    path: str, tools: Any, choice: Any
) -> None:
    with pytest.raises(DisallowedFieldError, match="web_search") as caught:
        request_for(path, tools, tool_choice=choice)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("path", "tools"),
    [
        ("/v1/responses", [FUNCTION, NAMESPACE, CUSTOM]),
        ("/v1/messages", [CLAUDE, {"type": "custom", **CLAUDE}]),
        # Who writes these means them: the bounds on requests refuse them.
        ("/v1/responses", [{"type": "mcp", "server_url": "https://x.example"}]),
        ("/v1/responses", [{"type": "code_interpreter"}]),
        ("/v1/chat/completions", [SEARCH]),
        ("/v1/responses", [None, 3, {"type": {}}, {"type": ["web_search"]}]),
        ("/v1/responses", "web_search"),
        ("/v1/responses", [{"type": "function", "name": {}}, {"type": "function", "name": []}]),
    ],
)
def test_other_tools_are_left_unchanged(path: str, tools: Any) -> None:
    found = request_for(path, tools)
    assert (found.left_out, found.data["tools"]) == ((), tools)
    assert found.raw


def test_function_named_like_a_hosted_tool_is_kept() -> None:
    own = {**FUNCTION, "name": "web_search"}
    choice = {"type": "function", "name": "web_search"}
    found = request_for("/v1/responses", [SEARCH, own], tool_choice=choice)
    assert (found.data["tools"], found.data["tool_choice"]) == ([own], choice)
    with pytest.raises(DisallowedFieldError):
        request_for("/v1/responses", [SEARCH, own], tool_choice=SEARCH)


@pytest.mark.parametrize("odd", [{}, [], 3, {"type": {}, "name": []}, {"type": "allowed_tools"}])
def test_malformed_tool_choice_is_left_to_the_engine(odd: Any) -> None:
    nameless = [{**SEARCH, "name": []}, {**FUNCTION, "name": {}}]
    assert request_for("/v1/responses", nameless, tool_choice=odd).data["tool_choice"] == odd


async def test_removed_tools_are_in_a_header_and_namespaces_are_searched() -> None:
    async with run_gateway(simulated({"cpu": {"tokens": 2}})) as s:
        body = {"model": "general", "input": "x", "tools": [SEARCH, FUNCTION]}
        insists = {**body, "tool_choice": {"type": "web_search"}}
        status, _, answer = await s.ask(insists, "/v1/responses")
        assert (status, answer["error"]["param"]) == (400, "tool_choice")
        hidden = {**NAMESPACE, "tools": [{"type": "mcp", "server_url": "https://x.example"}]}
        status, _, answer = await s.ask({**body, "tools": [hidden]}, "/v1/responses")
        assert (status, answer["error"]["code"]) == (400, "not_allowed")
