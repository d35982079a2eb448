"""The contract of engines, tested with the simulated engine and with vLLM, dense and MoE.

The last tests kill the engine: nothing may stand after them.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from typing import Any

import jsonschema
import pytest

from service.errors import EngineDeadError, InvalidRequestError
from tests.contract.conftest import Subject
from tests.support.engine_requests import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    Reply,
    ask,
    run,
)
from tests.support.polling import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # vLLM and torch run in this process here; only our own warnings are errors.
    pytest.mark.filterwarnings("ignore", "error:::service"),
]

HELLO = [{"role": "user", "content": "Say hello to a friend."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "strict": True,  # without it a tool parser's grammar leaves the arguments free
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "enum": ["cat", "dog"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": HELLO, "temperature": 0, "max_tokens": 8, **more}


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    )


async def test_engine_start_returns_a_report(subject: Subject) -> None:
    report = subject.report
    assert report.max_model_len == 1024
    endpoints = {CHAT, COMPLETIONS, MESSAGES, RESPONSES, "/tokenize", "/detokenize"}
    assert endpoints <= report.endpoints
    assert subject.engine.failure() is None
    if subject.real:
        assert report.engine == "vllm"
        assert report.details["dtype"] == "float32"
        assert report.details["eager"] == "true"
        assert (report.details["moe_backend"] != "none") == (subject.name == "vllm-moe")
    else:
        assert report.engine == "simulated"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_engine_chat_returns_a_whole_answer(subject: Subject, path: str) -> None:
    body = chat() if path == CHAT else {"prompt": "Once upon", "temperature": 0, "max_tokens": 8}
    reply = await ask(subject.engine, path, subject.expert, body)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("application/json")
    data = reply.json
    assert data["model"] == subject.expert
    assert data["object"] == ("chat.completion" if path == CHAT else "text_completion")
    (choice,) = data["choices"]
    assert choice["finish_reason"] in ("length", "stop")
    assert isinstance(choice["message"]["content"] if path == CHAT else choice["text"], str)
    usage = data["usage"]
    assert 1 <= usage["completion_tokens"] <= 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_engine_stream_has_the_text_of_the_whole_answer(subject: Subject, path: str) -> None:
    body = chat() if path == CHAT else {"prompt": "Once upon", "temperature": 0, "max_tokens": 8}
    whole = (await ask(subject.engine, path, subject.expert, body)).json
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    reply = await ask(subject.engine, path, subject.expert, streamed)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    assert {event["model"] for event in events} == {subject.expert}
    choice = whole["choices"][0]
    assert text_of(events) == (choice["message"]["content"] if path == CHAT else choice["text"])
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert reasons == [choice["finish_reason"]]
    assert events[-1]["choices"] == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-1]["usage"][count] == whole["usage"][count]
    assert all(not event.get("usage") for event in events[:-1])


async def test_engine_messages_stream_has_the_whole_answer_s_text_and_usage(
    subject: Subject,
) -> None:
    whole = (await ask(subject.engine, MESSAGES, subject.expert, chat())).json
    reply = await ask(subject.engine, MESSAGES, subject.expert, chat(stream=True))
    events = reply.named_events
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    (block,) = whole["content"]
    assert (block["type"], block["text"]) == ("text", "".join(texts))
    assert (whole["type"], whole["role"], whole["model"]) == (
        "message",
        "assistant",
        subject.expert,
    )
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert end["delta"]["stop_reason"] == whole["stop_reason"]
    assert start["usage"]["input_tokens"] == whole["usage"]["input_tokens"] >= 1
    assert start["usage"]["output_tokens"] == 0
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"] >= 1


async def test_engine_responses_stream_has_the_whole_answer_s_text_and_usage(
    subject: Subject,
) -> None:
    body = {"input": HELLO[0]["content"], "temperature": 0, "max_output_tokens": 8}
    whole = (await ask(subject.engine, RESPONSES, subject.expert, body)).json
    reply = await ask(subject.engine, RESPONSES, subject.expert, {**body, "stream": True})
    events = reply.named_events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    (item,) = whole["output"]
    assert [part["text"] for part in item["content"]] == ["".join(texts)]
    assert (whole["object"], whole["model"]) == ("response", subject.expert)
    last = events[-1]["response"]
    assert (last["status"], last["model"]) == (whole["status"], subject.expert)
    for count in ("input_tokens", "output_tokens", "total_tokens"):
        assert last["usage"][count] == whole["usage"][count] >= 1


async def test_engine_stream_without_include_usage_has_no_usage(subject: Subject) -> None:
    reply = await ask(subject.engine, CHAT, subject.expert, chat(stream=True))
    assert all(not event.get("usage") for event in reply.events)


async def test_engine_equal_requests_get_equal_answers_alone_or_batched(
    subject: Subject,
) -> None:
    alone = (await ask(subject.engine, CHAT, subject.expert, chat(seed=7))).json
    company = await asyncio.gather(
        *(ask(subject.engine, CHAT, subject.expert, chat(seed=7)) for _ in range(3))
    )
    answers = {reply.json["choices"][0]["message"]["content"] for reply in company}
    assert answers == {alone["choices"][0]["message"]["content"]}


async def test_engine_seed_reproduces_sampling(subject: Subject) -> None:
    body = chat(temperature=1.0, seed=11)
    first, second = [await ask(subject.engine, CHAT, subject.expert, body) for _ in range(2)]
    assert first.json["choices"] == second.json["choices"]


async def test_engine_returns_n_choices(subject: Subject) -> None:
    # Greedy answers may not be several in vLLM.
    body = chat(n=2, temperature=0.5, seed=3)
    answer = (await ask(subject.engine, CHAT, subject.expert, body)).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    reply = await ask(subject.engine, CHAT, subject.expert, {**body, "stream": True})
    indexes = {c["index"] for event in reply.events for c in event["choices"]}
    assert indexes == {0, 1}


async def test_engine_obeys_max_tokens_and_stop(subject: Subject) -> None:
    answer = (await ask(subject.engine, CHAT, subject.expert, chat(max_tokens=3))).json
    assert answer["usage"]["completion_tokens"] <= 3
    text = answer["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :]
    answer = (await ask(subject.engine, CHAT, subject.expert, chat(max_tokens=3, stop=[stop]))).json
    assert answer["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_engine_returns_logprobs(subject: Subject) -> None:
    if not subject.real:
        pytest.skip("the simulated engine computes no probabilities")
    answer = (
        await ask(subject.engine, CHAT, subject.expert, chat(logprobs=True, top_logprobs=2))
    ).json
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for token in content:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) >= 2
    # The greedy answer is the likeliest one.
    assert content[0]["logprob"] == max(t["logprob"] for t in content[0]["top_logprobs"])


async def test_engine_obeys_a_json_schema(subject: Subject) -> None:
    if not subject.real:
        pytest.skip("the simulated engine knows no grammar")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    body = chat(response_format=form, max_tokens=100)
    for stream in (False, True):
        reply = await ask(subject.engine, CHAT, subject.expert, {**body, "stream": stream})
        assert reply.status == 200
        text = text_of(reply.events) if stream else reply.json["choices"][0]["message"]["content"]
        if subject.name == "vllm":
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            # Random weights may count digits for ever; the form must hold as far as it goes.
            assert text.lstrip().startswith("{")


async def test_engine_calls_a_named_tool(subject: Subject) -> None:
    if not subject.real:
        pytest.skip("the simulated engine calls no tools")
    if subject.name == "vllm-moe":
        pytest.skip("random weights never finish a call")
    choice = {"type": "function", "function": {"name": "look_up"}}
    body = chat(tools=[TOOL], tool_choice=choice, max_tokens=60)
    answer = (await ask(subject.engine, CHAT, subject.expert, body)).json
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"])["word"] in ("cat", "dog")


async def test_engine_tokenize_and_detokenize_round_trip(subject: Subject) -> None:
    text = "Tokens are pieces of words."
    reply = await ask(subject.engine, "/tokenize", subject.expert, {"prompt": text})
    data = reply.json
    assert data["count"] == len(data["tokens"])
    assert data["max_model_len"] == 1024
    reply = await ask(subject.engine, "/detokenize", subject.expert, {"tokens": data["tokens"]})
    assert isinstance(reply.json["prompt"], str)
    if subject.real:
        assert reply.json["prompt"] == text


async def test_engine_unknown_endpoint_is_a_404(subject: Subject) -> None:
    reply = await ask(subject.engine, "/v1/nothing", subject.expert, chat())
    assert reply.status == 404
    assert reply.fault["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(max_tokens=-1), "max_tokens"),
        (CHAT, chat(n=0), "n"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, chat(n="two"), "n"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
async def test_engine_invalid_body_is_a_400_with_the_field(
    subject: Subject, path: str, body: dict[str, Any], param: str
) -> None:
    reply = await ask(subject.engine, path, subject.expert, body)
    assert reply.status == 400
    fault = reply.fault
    assert fault["type"] == "invalid_request_error"
    assert param in (fault["param"] or "") or param in fault["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_prompt_above_the_context_is_a_400_with_both_numbers(
    subject: Subject, stream: bool
) -> None:
    words = [{"role": "user", "content": "word " * 2000}]
    reply = await ask(subject.engine, CHAT, subject.expert, chat(messages=words, stream=stream))
    assert reply.status == 400
    fault = reply.fault
    assert fault["code"] == "context_length_exceeded"
    numbers = [int(number) for number in re.findall(r"\d+", fault["message"])]
    assert 1024 in numbers
    assert max(numbers) > 1024


async def test_engine_cancelled_request_is_aborted(subject: Subject) -> None:
    for stream in (True, False):
        reply = Reply()
        body = chat(max_tokens=900, stream=stream, ignore_eos=True)
        task = asyncio.create_task(run(subject.engine, CHAT, subject.expert, body, reply))
        if stream:
            await asyncio.wait_for(reply.begun.wait(), 60)
        await until(subject.busy, "the engine has it", 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(subject.idle, "the engine has dropped it")
        assert not reply.ended
    assert (await ask(subject.engine, CHAT, subject.expert, chat())).status == 200


def _form(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


def _tool(parameters: Any, choice: Any = "required") -> dict[str, Any]:
    function = {"name": "f", "strict": True, "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}


CRASHING = "(" * 17_000 + "a" + ")?" * 17_000
COSTLY = "^(((a|b|cd){1,100}c){1,100}d){1,100}$"
UNFIT = {"properties": {"m": {"type": "string", "pattern": "^[a-z]{1,2000}$"}}}
TAG = {"type": "structural_tag"}
# What no engine of ours can, or may, make an answer fit.
REFUSED_GRAMMARS: dict[str, tuple[str, dict[str, Any]]] = {
    "a pattern that crashes": (CHAT, chat(**_form({"pattern": CRASHING, "type": "string"}))),
    "a pattern that costs": (CHAT, chat(**_form({"pattern": COSTLY, "type": "string"}))),
    "a pattern that can't be compiled": (CHAT, chat(**_form({"type": "object", **UNFIT}))),
    "a pattern that is none": (CHAT, chat(**_form({"pattern": "(((", "type": "string"}))),
    "what xgrammar leaves out": (CHAT, chat(**_form({"type": "integer", "multipleOf": 3}))),
    "a type that there is not": (CHAT, chat(**_form({"type": "nothing"}))),
    "a type that is a number": (CHAT, chat(**_form({"type": 7}))),
    "properties that are a list": (CHAT, chat(**_form({"type": "object", "properties": [1]}))),
    "a reference to nowhere": (CHAT, chat(**_form({"$ref": "#/$defs/nowhere"}))),
    "a schema that is a list": (CHAT, chat(**_form([1]))),
    "no schema": (CHAT, chat(response_format={"type": "json_schema"})),
    "a schema that is null": (CHAT, chat(**_form(None))),
    "an unknown form": (CHAT, chat(response_format={"type": "nothing"})),
    "a form that is text": (CHAT, chat(response_format="json")),
    "a regex": (CHAT, chat(structured_outputs={"regex": "((("})),
    "a regex with a null": (CHAT, chat(structured_outputs={"regex": "a\0b"})),
    "a regex that crashes": (CHAT, chat(structured_outputs={"regex": CRASHING})),
    "a regex that looks ahead": (CHAT, chat(structured_outputs={"regex": "(?=a)a"})),
    "no choice": (CHAT, chat(structured_outputs={"choice": []})),
    "choices that are numbers": (CHAT, chat(structured_outputs={"choice": [1, {}]})),
    "a grammar": (CHAT, chat(structured_outputs={"grammar": "root ::= ((("})),
    "an empty grammar": (CHAT, chat(structured_outputs={"grammar": "  "})),
    "a Lark grammar": (CHAT, chat(structured_outputs={"grammar": "start: ((("})),
    "an empty schema": (CHAT, chat(structured_outputs={"json": ""})),
    "text that is no schema": (CHAT, chat(structured_outputs={"json": "{"})),
    "no object": (CHAT, chat(structured_outputs={"json_object": False})),
    "nothing": (CHAT, chat(structured_outputs={})),
    "two at once": (CHAT, chat(structured_outputs={"json": {}, "regex": "a"})),
    "a tag": (CHAT, chat(response_format=TAG)),
    "a tag without triggers": (CHAT, chat(response_format={**TAG, "structures": []})),
    "a tag of nothing": (CHAT, chat(response_format={**TAG, "format": {"type": "nothing"}})),
    "a tag that crashes": (
        CHAT,
        chat(response_format={**TAG, "format": {"type": "regex", "pattern": CRASHING}}),
    ),
    "a tag that is text": (CHAT, chat(structured_outputs={"structural_tag": "{"})),
    "a tag of completions": (
        "/v1/completions",
        {"prompt": "a", "response_format": {**TAG, "format": {"type": "nothing"}}},
    ),
    "a regex of completions": (
        "/v1/completions",
        {"prompt": "a", "structured_outputs": {"regex": CRASHING}},
    ),
    "a tool that crashes": (CHAT, chat(**_tool({"type": "string", "pattern": CRASHING}))),
    "a tool": (CHAT, chat(**_tool({"type": "string", "pattern": "((("}))),
    "a named tool": (
        CHAT,
        chat(
            **_tool(
                {"type": "string", "pattern": "((("},
                {"type": "function", "function": {"name": "f"}},
            )
        ),
    ),
    "a schema of Responses": (
        "/v1/responses",
        {
            "input": "a",
            "text": {
                "format": {
                    "type": "json_schema",
                    "name": "x",
                    "schema": {"type": "string", "pattern": CRASHING},
                }
            },
        },
    ),
    "a tool of Messages": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 5,
            "tools": [
                {
                    "name": "f",
                    "strict": True,
                    "input_schema": {"type": "string", "pattern": CRASHING},
                }
            ],
            "tool_choice": {"type": "any"},
        },
    ),
    "a schema of Messages": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 5,
            "output_config": {
                "format": {
                    "type": "json_schema",
                    "schema": {"type": "string", "pattern": CRASHING},
                }
            },
        },
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED_GRAMMARS)
async def test_engine_invalid_grammar_is_a_400(subject: Subject, name: str, stream: bool) -> None:
    if subject.name != "vllm":
        pytest.skip("the simulated engine knows no grammar; one real engine is enough")
    path, body = REFUSED_GRAMMARS[name]
    reply = await ask(subject.engine, path, subject.expert, {**body, "stream": stream})
    assert subject.engine.failure() is None
    if isinstance(reply.error, InvalidRequestError):
        return
    assert reply.error is None
    assert reply.status == 400, reply.body
    assert reply.fault["type"] == "invalid_request_error"


async def test_engine_obeys_choices_grammars_and_structural_tags(subject: Subject) -> None:
    if subject.name != "vllm":
        pytest.skip("the simulated engine knows no grammar; one real engine is enough")
    tag = {**TAG, "format": {"type": "json_schema", "json_schema": SCHEMA}}
    for more in (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "(yes|no)"}},
        {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    ):
        answer = (await ask(subject.engine, CHAT, subject.expert, chat(max_tokens=20, **more))).json
        assert answer["choices"][0]["message"]["content"] in ("yes", "no")
    answer = (
        await ask(subject.engine, CHAT, subject.expert, chat(max_tokens=100, response_format=tag))
    ).json
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)


# --- from here on the engine dies


async def test_engine_death_during_a_stream_ends_it_with_an_error_event(subject: Subject) -> None:
    reply = Reply()
    body = chat(max_tokens=900, stream=True, ignore_eos=True)
    task = asyncio.create_task(run(subject.engine, CHAT, subject.expert, body, reply))
    await asyncio.wait_for(reply.begun.wait(), 60)
    waiting = Reply()
    late = asyncio.create_task(run(subject.engine, CHAT, subject.expert, chat(), waiting))
    await asyncio.sleep(0)
    if subject.real:
        (core,) = subject.children()
        core.send_signal(signal.SIGKILL)
    else:
        subject.engine.kill("a test killed it")
    async with asyncio.timeout(60):
        await asyncio.gather(task, late)
    assert reply.status == 200
    assert reply.events[-1]["error"]["message"]
    # One that had no byte yet may be tried elsewhere, or was just quick enough.
    assert isinstance(waiting.error, EngineDeadError) or waiting.status == 200
    assert await subject.engine.in_flight() == 0


async def test_engine_after_death_answers_nothing(subject: Subject) -> None:
    await until(lambda: subject.engine.failure() is not None, "the death is noticed")
    for stream in (False, True):
        reply = await ask(subject.engine, CHAT, subject.expert, chat(stream=stream))
        assert isinstance(reply.error, EngineDeadError)


async def test_engine_stop_leaves_no_process(subject: Subject) -> None:
    await subject.engine.stop()
    assert subject.children() == []
    assert subject.engine.failure() is not None
