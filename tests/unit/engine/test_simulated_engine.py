"""The simulated engine answers Messages and Responses in vLLM's shapes and order of events."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from service.config import SimulatedOptions
from service.engine.engine_interface import EngineRequest
from service.engine.simulated_engine import SimulatedEngine
from tests.support.engine_requests import MESSAGES, RESPONSES, Reply, ask, run
from tests.support.polling import until

# Three words of prompt, and four of answer.
BODIES: dict[str, dict[str, Any]] = {
    MESSAGES: {
        "system": "brief",
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": 4,
    },
    RESPONSES: {
        "instructions": "brief",
        "input": [{"role": "user", "content": "hello there"}],
        "max_output_tokens": 4,
    },
}
PATHS = tuple(BODIES)


def engine(**options: Any) -> SimulatedEngine:
    return SimulatedEngine(("e",), SimulatedOptions(**options))


async def whole(path: str, **more: Any) -> Any:
    return (await ask(engine(), path, "e", {**BODIES[path], **more})).json


async def streamed(path: str, **more: Any) -> list[Any]:
    reply = await ask(engine(), path, "e", {**BODIES[path], **more, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    return reply.named_events


async def test_engine_declares_messages_and_responses() -> None:
    assert (await engine().start()).endpoints >= set(PATHS)


async def test_messages_answer_has_anthropic_s_shape() -> None:
    answer = await whole(MESSAGES)
    (block,) = answer["content"]
    assert (block["type"], len(block["text"].split())) == ("text", 4)
    assert answer.keys() == {"id", "type", "role", "model", "content", "stop_reason", "usage"}
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "e")
    assert answer["stop_reason"] == "max_tokens"
    assert answer["usage"] == {"input_tokens": 3, "output_tokens": 4}


async def test_messages_stream_has_vllm_s_order_of_events() -> None:
    events = await streamed(MESSAGES)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert message["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    text = "".join(event["delta"]["text"] for event in events[2:6])
    assert text == (await whole(MESSAGES))["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"] == {"input_tokens": 3, "output_tokens": 4}


async def test_messages_stop_sequence_is_named() -> None:
    text = (await whole(MESSAGES))["content"][0]["text"]
    stop = text.split()[2]
    answer = await whole(MESSAGES, stop_sequences=[stop])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]
    events = await streamed(MESSAGES, stop_sequences=[stop])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}


async def test_messages_stream_without_text_has_no_block() -> None:
    events = await streamed(MESSAGES, stop_sequences=["e:"])
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]
    assert (await whole(MESSAGES, stop_sequences=["e:"]))["content"] == [
        {"type": "text", "text": ""}
    ]


async def test_responses_answer_has_openai_s_shape() -> None:
    answer = await whole(RESPONSES)
    response = Response.model_validate(answer, strict=True)
    assert len(response.output_text.split()) == 4
    assert (response.object, response.model, response.status) == ("response", "e", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
    }
    assert (await whole(RESPONSES, max_output_tokens=None))["status"] == "completed"


async def test_responses_stream_has_vllm_s_order_of_events() -> None:
    events = await streamed(RESPONSES)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    text = "".join(event["delta"] for event in events[4:8])
    assert text == events[8]["text"] == last["output"][0]["content"][0]["text"]
    assert events[2]["item"]["id"] == events[4]["item_id"] == last["output"][0]["id"]
    alike = await whole(RESPONSES)
    assert (last["status"], last["usage"]) == (alike["status"], alike["usage"])


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (MESSAGES, {"max_tokens": None}, "max_tokens"),
        (MESSAGES, {"messages": "hello"}, "messages"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": ["hello"]}, "input"),
        (RESPONSES, {"input": 7}, "input"),
    ],
)
async def test_invalid_body_is_a_400_with_the_field(
    path: str, change: dict[str, Any], param: str
) -> None:
    reply = await ask(engine(), path, "e", {**BODIES[path], **change})
    assert (reply.status, reply.fault["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_abandoned_request_reports_prompt_and_what_was_made(path: str, stream: bool) -> None:
    made = engine(decode_ms=5, max_model_len=10_000)
    given: list[tuple[int, int]] = []
    long = {"max_tokens": 2000} if path == MESSAGES else {"max_output_tokens": 2000}
    body = orjson.dumps({**BODIES[path], **long, "stream": stream})
    request = EngineRequest(
        path, "e", body, "left", on_abandoned=lambda *counts: given.append(counts)
    )
    task = asyncio.create_task(made.run(request, Reply()))

    async def running() -> bool:
        return await made.in_flight() == 1

    await until(running, "the engine has it")
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    ((prompt, answer),) = given
    assert prompt == 3
    assert 1 < answer < 2000


@pytest.mark.parametrize("path", PATHS)
async def test_death_in_mid_stream_ends_it_with_an_error_event(path: str) -> None:
    made = engine(fail="mid_stream")
    reply = Reply()
    await run(made, path, "e", {**BODIES[path], "stream": True}, reply)
    kinds = [event["type"] for event in reply.named_events]
    assert kinds[-1] == ("error" if path == MESSAGES else "response.failed")
    assert "error" in kinds
    assert (await ask(made, path, "e", BODIES[path])).status == 503
