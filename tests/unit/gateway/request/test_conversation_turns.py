"""Where conversations of three APIs stand: beginnings, histories, and open tool calls."""

from __future__ import annotations

from typing import Any

import pytest

from service.gateway.request.conversation_turns import digest_of, reply_calls, turn_state

Items = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chat_call(*ids: str) -> dict[str, Any]:
    calls = [{"id": one, "type": "function", "function": {"name": "f"}} for one in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def chat_result(call: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": "42"}


def use(call: str) -> dict[str, Any]:
    block = {"type": "tool_use", "id": call, "name": "f", "input": {}}
    return {"role": "assistant", "content": [{"type": "text", "text": "I look."}, block]}


def used(call: str, *more: dict[str, Any]) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": call, "content": "42"}
    return {"role": "user", "content": [block, *more]}


def function_call(call: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call, "name": "f", "arguments": "{}"}


def function_output(call: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call, "output": "42"}


START = user("Look it up.")
REASONING = {"type": "reasoning", "summary": []}


@pytest.mark.parametrize(
    ("field", "items", "calls"),
    [
        ("messages", [START], None),
        ("messages", [START, said("no")], None),
        ("messages", [START, said("no"), user("why?")], None),
        ("messages", [START, chat_call("a"), chat_result("a")], "a"),
        ("messages", [START, chat_call("a", "b"), chat_result("b")], "ab"),
        ("messages", [START, chat_call("a"), chat_result("a"), user("and b")], "a"),
        ("messages", [START, chat_call("a"), chat_result("a"), said("42"), user("ok")], None),
        # A call that the client gave up is open until the model answers something else.
        ("messages", [START, chat_call("a"), user("stop")], "a"),
        ("messages", [START, chat_call("a"), user("stop"), said("ok"), user("next")], None),
        ("messages", [START, {"role": "tool", "content": "42"}], ""),
        ("messages", [START, {"role": "assistant", "function_call": {"name": "f"}}], ""),
        ("messages", [START, use("a"), used("a")], "a"),
        ("messages", [START, use("a"), used("a", {"type": "text", "text": "go on"})], "a"),
        ("messages", [START, use("a"), used("a"), said("42"), user("thanks")], None),
        ("input", [START, function_call("a"), function_output("a")], "a"),
        ("input", [START, said("I look."), function_call("a"), function_output("a")], "a"),
        ("input", [START, function_call("a"), said("I look."), function_output("a")], "a"),
        ("input", [START, REASONING, function_call("a"), function_output("a")], "a"),
        ("input", [START, function_call("a"), function_output("a"), said("42"), START], None),
        # With `previous_response_id` the call itself is not in the input.
        ("input", [function_output("a")], "a"),
        ("input", [{**function_call("a"), "type": "custom_tool_call"}], "a"),
        # The provider's own tools are no calls that the client answers.
        ("input", [START, {"type": "web_search_call", "id": "a"}, said("42"), START], None),
        ("input", "Look it up.", None),
    ],
)
def test_turn_state_open_calls_are_those_the_model_has_not_answered(
    field: str, items: Any, calls: str | None
) -> None:
    state = turn_state({field: items})
    assert state.open == (calls is not None)
    assert state.calls == {digest_of(one) for one in calls or ""}


LOOPS: dict[str, tuple[str, Items]] = {
    "chat": (
        "messages",
        [
            START,
            chat_call("a"),
            chat_result("a"),
            chat_call("b"),
            chat_result("b"),
            said("c"),
            START,
        ],
    ),
    "messages": ("messages", [START, use("a"), used("a"), use("b"), used("b"), said("c"), START]),
    "responses": (
        "input",
        [
            *(START, REASONING, said("I look."), function_call("a"), function_output("a")),
            *(function_call("b"), function_output("b"), said("c"), START),
        ],
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_turn_state_history_is_the_digest_of_the_turn_before(name: str) -> None:
    field, items = LOOPS[name]
    seen: list[str] = []
    beginnings = set()
    for end, item in enumerate(items):
        if "assistant" in str(item.get("role")) or str(item.get("type")) in (
            "reasoning",
            "function_call",
        ):
            continue
        # Agents write another system prompt into every request.
        system = {"role": "system", "content": f"It is {end} o'clock."}
        state = turn_state({field: [system, *items[: end + 1]]})
        beginnings.add(state.beginning)
        assert state.history == (seen[-1] if seen else None)
        assert state.digest not in seen
        seen.append(state.digest)
    assert len(seen) == 4
    assert len(beginnings) == 1


def test_turn_state_continued_answer_is_no_part_of_the_history() -> None:
    begun = turn_state({"messages": [START, said("The answer is")]})
    after = turn_state({"messages": [START, said("The answer is 42"), user("why?")]})
    assert after.history == begun.digest


def test_turn_state_mark_for_the_cache_that_moves_changes_no_digest() -> None:
    plain = {"type": "text", "text": "long manual"}
    marked = {**plain, "cache_control": {"type": "ephemeral"}}
    one, other = (
        turn_state({"messages": [{"role": "user", "content": [p]}]}) for p in (plain, marked)
    )
    assert one == other


def test_turn_state_texts_that_differ_at_either_end_or_in_length_differ() -> None:
    long = "x" * 100_000
    texts = [long, "y" + long[1:], long[:-1] + "y", long + "x"]
    assert len({turn_state({"messages": [user(text)]}).digest for text in texts}) == 4


@pytest.mark.parametrize("list_field", ["messages", "input"])
@pytest.mark.parametrize(
    "field",
    ["role", "type", "call_id", "tool_call_id", "tool_use_id", "id", "text", "content", "output",
     "arguments", "tool_calls", "function_call"],
)  # fmt: skip
def test_turn_state_of_a_body_nested_as_deep_as_json_allows(list_field: str, field: str) -> None:
    deep: list[Any] = []
    for _ in range(1100):
        deep = [deep]
    holders = [{field: deep}, {"content": [{field: deep}]}, {"tool_calls": [{field: deep}]}]
    for holder in holders:
        for role in ("user", "assistant", "tool"):
            turn_state({list_field: [{"role": role, **holder}, holder, user("why?")]})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": [1, None, "x"]},
        {"messages": [{"role": ["user"], "content": {"a": 1}, "tool_calls": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [None, {"id": 7}]}]},
        {"input": [{"type": ["x"], "call_id": {}}, {"type": "function_call", "call_id": None}]},
        {"messages": [{"role": "user", "content": [None, 3, {"type": "tool_result"}]}]},
    ],
)
def test_turn_state_malformed_body_raises_nothing(body: dict[str, Any]) -> None:
    state = turn_state(body)
    assert turn_state(body) == state


@pytest.mark.parametrize(
    ("reply", "ids"),
    [
        ({"choices": [{"message": chat_call("a", "b")}]}, "ab"),
        ({"choices": [{"message": said("x")}]}, ""),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "a"}]}}]}, "a"),
        ({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {}}]}}]}, ""),
        ({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}, ""),
        ({"type": "message", **use("a")}, "a"),
        ({"type": "content_block_start", "content_block": {"type": "tool_use", "id": "a"}}, "a"),
        ({"type": "content_block_start", "content_block": {"type": "text", "text": ""}}, ""),
        ({"output": [REASONING, function_call("a")]}, "a"),
        ({"type": "response.output_item.added", "item": function_call("a")}, "a"),
        ({"type": "response.completed", "response": {"output": [function_call("a")]}}, "a"),
        ({"choices": "x", "output": 3, "item": [], "content": None}, ""),
    ],
)
def test_reply_calls_of_replies_and_events(reply: dict[str, Any], ids: str) -> None:
    assert reply_calls(reply) == [digest_of(one) for one in ids]
