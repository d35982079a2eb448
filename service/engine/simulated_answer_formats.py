"""The simulated engine's answers in the formats of the APIs that it speaks, whole and streamed.

Shapes and order of events are vLLM's. A format turns one answer into a whole reply, or into the
bytes of each step of a stream, one word a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from service.errors import EngineDeadError, InvalidRequestError
from service.http.error_formats import Dialect, sse_event

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_FINGERPRINT = "simulated"
_LOGPROB = -0.1
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer before it has a format.

    Attributes:
        endpoint: Path of the endpoint that was asked.
        expert: Name of the expert.
        request_id: ID of the request.
        body: The request's body.
        prompt_tokens: Tokens of the prompt.
        words: The answer's tokens, equal for all choices.
        choices: Number of choices.
        stop: The stop string that ended the answer, if any.
        cut: Whether a limit ended the answer.
    """

    endpoint: str
    expert: str
    request_id: str
    body: dict[str, Any]
    prompt_tokens: int
    words: list[str]
    choices: int
    stop: str | None
    cut: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self.words)

    @property
    def tokens(self) -> int:
        """Tokens of all choices together."""
        return self.choices * len(self.words)


class AnswerFormat(Protocol):
    """One answer in the format of one API."""

    def whole(self) -> dict[str, Any]:
        """Return the reply's JSON object."""

    def step(self, i: int) -> bytes:
        """Return the stream's bytes for the word at `i`. Step 0 also opens the stream."""

    def end(self) -> bytes:
        """Return the stream's bytes after its last step."""

    def failure(self, error: EngineDeadError) -> bytes:
        """Return the bytes that end the stream with an error."""


def format_of(answer: Answer) -> AnswerFormat:
    """Return an answer in the format of its endpoint.

    Raises:
        InvalidRequestError: The body's `stream_options` is no object.
    """
    if answer.endpoint == MESSAGES:
        return _Messages(answer)
    if answer.endpoint == RESPONSES:
        return _Responses(answer)
    return _Completions(answer)


class _Completions:
    """Chat and text completions."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._chat = answer.endpoint == CHAT
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + answer.request_id,
            "created": answer.created,
            "model": answer.expert,
            "system_fingerprint": _FINGERPRINT,
        }
        self._finish = "length" if answer.cut else "stop"
        self._usage = _usage(answer.prompt_tokens, answer.tokens)
        self._include_usage = self._each = False
        if answer.body.get("stream"):
            options = answer.body.get("stream_options") or {}
            if not isinstance(options, dict):
                raise InvalidRequestError(
                    "`stream_options` must be an object", param="stream_options"
                )
            self._include_usage = bool(options.get("include_usage"))
            self._each = self._include_usage and bool(options.get("continuous_usage_stats"))

    def whole(self) -> dict[str, Any]:
        answer = self._answer
        message: dict[str, Any] = {"text": answer.text}
        if self._chat:
            message = {"message": {"role": "assistant", "content": answer.text}}
        logprobs = _logprobs(answer.words) if self._chat and answer.body.get("logprobs") else None
        choices = [
            {"index": i, **message, "logprobs": logprobs, "finish_reason": self._finish}
            for i in range(answer.choices)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage}

    def step(self, i: int) -> bytes:
        answer = self._answer
        word = answer.words[i] if answer.words else ""
        choice: dict[str, Any] = {"text": word}
        if self._chat:
            role = {"role": "assistant"} if i == 0 else {}
            choice = {"delta": {**role, "content": word}}
        reason = self._finish if i >= len(answer.words) - 1 else None
        # As in vLLM, this is the usage of this choice.
        usage = {"usage": _usage(answer.prompt_tokens, i + 1)} if self._each else {}
        return b"".join(
            self._chunk(
                [{"index": index, **choice, "logprobs": None, "finish_reason": reason}], **usage
            )
            for index in range(answer.choices)
        )

    def end(self) -> bytes:
        usage = self._chunk([], usage=self._usage) if self._include_usage else b""
        return usage + _DONE

    def failure(self, error: EngineDeadError) -> bytes:
        detail = {
            "message": error.message,
            "type": "server_error",
            "param": None,
            "code": error.code,
        }
        return b"data: " + orjson.dumps({"error": detail}) + b"\n\n" + _DONE

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices, **more}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


class _Messages:
    """Anthropic's Messages."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._head = {
            "id": "chatcmpl-" + answer.request_id,
            "type": "message",
            "role": "assistant",
            "model": answer.expert,
        }
        reason = "stop_sequence" if answer.stop is not None else "end_turn"
        self._reason = "max_tokens" if answer.cut else reason

    def whole(self) -> dict[str, Any]:
        stop = self._answer.stop
        return {
            **self._head,
            "content": [{"type": "text", "text": self._answer.text}],
            "stop_reason": self._reason,
            **({} if stop is None else {"stop_sequence": stop}),
            "usage": self._usage(self._answer.tokens),
        }

    def step(self, i: int) -> bytes:
        events = b""
        if i == 0:
            message: dict[str, Any] = {
                **self._head,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": self._usage(0),
            }
            events = _named({"type": "message_start", "message": message})
        if not self._answer.words:
            return events
        if i == 0:
            block = {"type": "text", "text": ""}
            events += _named({"type": "content_block_start", "index": 0, "content_block": block})
        delta = {"type": "text_delta", "text": self._answer.words[i]}
        return events + _named({"type": "content_block_delta", "index": 0, "delta": delta})

    def end(self) -> bytes:
        stop = {"stop_reason": self._reason, "stop_sequence": self._answer.stop}
        usage = self._usage(self._answer.tokens)
        events = _named({"type": "content_block_stop", "index": 0}) if self._answer.words else b""
        events += _named({"type": "message_delta", "delta": stop, "usage": usage})
        return events + _named({"type": "message_stop"})

    def failure(self, error: EngineDeadError) -> bytes:
        return sse_event(error, Dialect.MESSAGES)

    def _usage(self, tokens: int) -> dict[str, int]:
        return {"input_tokens": self._answer.prompt_tokens, "output_tokens": tokens}


class _Responses:
    """OpenAI's Responses."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._item_id = "msg_" + answer.request_id
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._sequence = 0

    def whole(self) -> dict[str, Any]:
        answer = self._answer
        prompt, made = answer.prompt_tokens, answer.tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + made,
        }
        status = "incomplete" if answer.cut else "completed"
        return self._response(status, [self._item("completed")], usage)

    def step(self, i: int) -> bytes:
        events = b""
        if i == 0:
            response = self._response("in_progress", [], None)
            events += self._event("response.created", response=response)
            events += self._event("response.in_progress", response=response)
        if not self._answer.words:
            return events
        if i == 0:
            item = {**self._item("in_progress"), "content": []}
            events += self._event("response.output_item.added", output_index=0, item=item)
            part = self._part("")
            events += self._event("response.content_part.added", **self._place, part=part)
        word = self._answer.words[i]
        return events + self._event(
            "response.output_text.delta", **self._place, delta=word, logprobs=[]
        )

    def end(self) -> bytes:
        events = b""
        if text := self._answer.text:
            events += self._event(
                "response.output_text.done", **self._place, text=text, logprobs=[]
            )
            part = self._part(text)
            events += self._event("response.content_part.done", **self._place, part=part)
            item = self._item("completed")
            events += self._event("response.output_item.done", output_index=0, item=item)
        # As in vLLM, an answer that a limit cut ends with this event too. Its status tells.
        return events + self._event("response.completed", response=self.whole())

    def failure(self, error: EngineDeadError) -> bytes:
        response = self._response("in_progress", [], None)
        return sse_event(error, Dialect.RESPONSES, sequence=self._sequence, response=response)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "content": [self._part(self._answer.text)] if self._answer.text else [],
            "status": status,
        }

    def _response(self, status: str, output: list[Any], usage: Any) -> dict[str, Any]:
        answer, body = self._answer, self._answer.body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": "resp_" + answer.request_id,
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "incomplete_details": cut,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": answer.expert,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": body.get("temperature", 1.0),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1.0),
            "background": False,
            "max_output_tokens": body.get("max_output_tokens"),
            "previous_response_id": None,
            "service_tier": "auto",
            "truncation": "disabled",
            "usage": usage,
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        event = _named({"type": kind, "sequence_number": self._sequence, **more})
        self._sequence += 1
        return event


def _named(event: dict[str, Any]) -> bytes:
    """Return an event that is named by its type."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _logprobs(words: list[str]) -> dict[str, Any]:
    """Return log probabilities as if every word had the same probability."""
    return {
        "content": [
            {"token": word, "logprob": _LOGPROB, "bytes": list(word.encode()), "top_logprobs": []}
            for word in words
        ]
    }
