"""The ASGI sends between the engine's answer and the client.

`UsageMeter` counts the tokens of an answer as it passes, and removes usage that the client did not
ask for. `ResponseSend` adds the gateway's headers and `usage.coe`, records how far the reply has
come, and writes errors in the client's dialect.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson

from service.engine.engine_interface import Message, Send
from service.errors import CoeError, UpstreamError
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import ExpertCall, RequestRecord
from service.http.asgi_helpers import STREAM_HEADERS, LineBuffer, body_message
from service.http.openai_errors import (
    Dialect,
    codes_of_ours,
    detail_of,
    error_body,
    status_of,
    stream_error,
)
from service.http.prompt_endpoints import TABLE
from service.http.token_usage import estimate_tokens, reply_usage, token_counts, usage_of
from service.rpc.call_headers import QUEUE_MS, SWAP_MS

# Only lines that contain one of these are parsed.
_CHAT_MARKERS = (b'"usage"', b'{"error"', b"[DONE]")
_OTHER_MARKERS = (b'"usage"', b'"error"', b"[DONE]", b'"response.created"')


class NoAnswerError(CoeError):
    """An expert refused the request, where only an answer may go to the client."""

    code = "expert_refused"


class ResponseSend:
    """An ASGI send that adds the gateway's headers and `usage.coe`, and reads the usage.

    Attributes:
        record: The request's record.
        meter: Counts what the engine sends; None where nobody is charged.
        expert_call: The call that answers.
        started: Whether anything was sent to the client.
        events: Events of the stream so far.
        answers_only: Whether an error reply is raised as NoAnswerError instead of sent.
        stream_error: The error that the expert's stream ended with; None without one.
    """

    def __init__(
        self,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        record: RequestRecord,
        meter: UsageMeter | None = None,
        dialect: Dialect = Dialect.CHAT,
    ) -> None:
        """Prepare to send an answer.

        `meter` sees the engine's output first: it counts, and removes usage that the client did not
        request. `dialect` is the API whose errors the client gets.
        """
        self.record = record
        self.meter = meter
        self._counted = meter.wrap(self._out) if meter is not None else self._out
        self.started = False
        self.answers_only = False
        self.expert_call: ExpertCall | None = None
        self.first_byte_limit: asyncio.Timeout | None = None
        self.began_s = time.monotonic()
        self.sent_s = self.began_s
        self.events = 0
        self._send = send
        self._headers = headers
        self._streams = False
        self._held: Message | None = None
        self._dialect = dialect
        self._markers = _CHAT_MARKERS if dialect is Dialect.CHAT else _OTHER_MARKERS
        self.stream_error: Mapping[str, Any] | None = None
        self._lines = LineBuffer()
        # The response object that a stream of Responses began with.
        self._response: Any = None

    async def __call__(self, message: Message) -> None:
        if self.answers_only and message["type"] == "http.response.start":
            self.answers_only = False
            if message["status"] != 200:
                raise NoAnswerError(f"the expert's reply has the status {message['status']}")
        await self._counted(message)

    async def _out(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record_start(message)
            if self._streams:
                await self._send(self._with_headers(message, None))
            else:
                # The start waits until the body's length is known: `usage.coe` makes it longer.
                self._held = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._streams:
            out = self._whole_lines(body, ends=not more)
            if out or not more:
                await self._send({**message, "body": out})
            return
        if self.record.status >= 400:
            message = {**message, "body": self._error_body(body)}
        elif b'"usage"' in body:
            message = {**message, "body": self._with_usage(body)}
        if self._held is not None:
            held, self._held = self._held, None
            await self._send(self._with_headers(held, None if more else len(message["body"])))
        await self._send(message)

    def _whole_lines(self, body: bytes, *, ends: bool) -> bytes:
        """The lines that these bytes complete, as the client gets them."""
        lines = self._lines.take(body, ends=ends)
        self.events += lines.count(b"data: {") + lines.count(b"data:{")
        for marker in self._markers:
            if marker in lines:
                return b"".join(map(self._line, lines.splitlines(keepends=True)))
        return lines

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or not any(marker in line for marker in self._markers):
            return line
        chat = self._dialect is Dialect.CHAT
        if line[5:].strip() == b"[DONE]":
            # Only streams of the chat API end with this event, and only where they did not fail.
            return b"" if self.stream_error is not None or not chat else line
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            return line
        if not isinstance(event, dict):
            return line
        if not chat and event.get("type") == "response.created":
            self._response = event.get("response")
        if (error := _error_in(event)) is not None:
            self._record_failure(error)
            if not chat and "type" not in event:
                # Pools and engines send OpenAI's format. The event's blank line follows in the
                # stream, so ours is cut off.
                return self._last_events(error, 503, self.events - 1)[:-1]
        usage = usage_of(event)
        if usage is None or event.get("type") == "message_start":
            return line  # the usage at a message's start is not complete
        self._record_usage(*token_counts(usage))
        usage["coe"] = self._cost()
        return b"data: " + orjson.dumps(event) + b"\n"

    def _record_failure(self, error: Mapping[str, Any]) -> None:
        """Record that the stream failed by an error event."""
        self.stream_error = error
        code = error.get("code")
        if not self.record.local:
            code = UpstreamError.code
        elif not isinstance(code, str):
            code = CoeError.code
        self.record.outcome = code if code in codes_of_ours() else CoeError.code

    def _last_events(self, detail: Mapping[str, Any], status: int, sequence: int) -> bytes:
        """The events that end this stream with an error, numbered from `sequence` on."""
        return stream_error(
            detail, status, self._dialect, sequence=sequence, response=self._response
        )

    def _error_body(self, body: bytes) -> bytes:
        """A whole error reply in the client's dialect; engines send OpenAI's format."""
        if self._dialect is not Dialect.MESSAGES:
            return body
        try:
            detail = orjson.loads(body)["error"]
            return error_body(detail, self.record.status, self._dialect)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return body

    def _record_start(self, message: Message) -> None:
        self.started = True
        record = self.record
        record.status = message["status"]
        record.began_at_s = self.began_s
        record.sent_at_s = self.sent_s
        record.first_byte_at_s = time.monotonic()
        if self.first_byte_limit is not None:
            self.first_byte_limit.reschedule(None)
        self._streams = any(v.startswith(b"text/event-stream") for _, v in message["headers"])

    def _with_headers(self, message: Message, length: int | None) -> Message:
        record = self.record
        ours = [
            *self._headers,
            *record.session_headers,
            record.route_header,
            (b"x-coe-expert", record.expert.encode()),
            (QUEUE_MS.encode(), f"{record.queue_ms:.1f}".encode()),
            (SWAP_MS.encode(), f"{record.swap_ms:.1f}".encode()),
        ]
        if record.recipe != record.expert:
            ours.append((b"x-coe-recipe", record.recipe.encode()))
        if record.clipped is not None:
            ours.append((b"x-coe-max-tokens", str(record.clipped).encode()))
        if self._streams:
            ours += STREAM_HEADERS
        if length is not None:
            ours.append((b"content-length", str(length).encode()))
        given = [pair for pair in message["headers"] if pair[0] != b"content-length"]
        return {**message, "headers": [*given, *ours]}

    def _with_usage(self, body: bytes) -> bytes:
        """A whole reply with `usage.coe`."""
        usage = reply_usage(body)
        if usage is None:
            return body
        self._record_usage(usage.prompt_tokens, usage.answer_tokens)
        at = usage.value + 1
        added = b'"coe":' + orjson.dumps(self._cost()) + b","
        if body[at:].lstrip()[:1] == b"}":
            added = added[:-1]
        return body[:at] + added + body[at:]

    def _record_usage(self, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """Record the usage of the call that answers."""
        if self.expert_call is None:
            return
        if prompt_tokens is not None:
            self.expert_call.prompt_tokens = prompt_tokens
        if answer_tokens is not None:
            self.expert_call.completion_tokens = answer_tokens

    def _cost(self) -> dict[str, Any]:
        decode_s = time.monotonic() - self.record.first_byte_at_s
        return self.record.to_json(decode_s * 1000)

    async def break_off(self, error: CoeError) -> None:
        """End a reply that has begun: a stream with an error event, other replies by raising."""
        self.record.outcome = error.code
        if not self._streams:
            raise error
        # An unfinished line would spoil the error event.
        self._lines.drop()
        events = self._last_events(detail_of(error), status_of(error), self.events)
        await self._send(body_message(events))


def _error_in(event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The error in a stream's event, in the format of any API; None without one."""
    kind, error = event.get("type"), event.get("error")
    if kind == "error":
        return error if isinstance(error, dict) else event
    if kind == "response.failed":
        response = event.get("response")
        detail = response.get("error") if isinstance(response, dict) else None
        return detail if isinstance(detail, dict) else {}
    return error if kind is None and isinstance(error, dict) else None


_STREAMED = frozenset({"/v1/chat/completions", "/v1/completions"})
# Events of other APIs that carry a piece of an answer.
_PIECE = re.compile(rb'"type"\s*:\s*"(?:content_block_delta|response\.[a-z_.]+\.delta)"')


class UsageMeter:
    """Counts the tokens of one request's calls, by expert.

    For a metered stream the engine is asked for its usage in every chunk, where its API allows
    that, and usage that the client did not ask for is removed again. Other streams hold their usage
    only at the end, so their pieces are counted until then. For a client that has left, `abandon`
    takes the tokens that the engine had generated by then.

    `wrap` counts the answer that goes to the client, and `add` counts a recipe's other calls.

    Attributes:
        most_prompt_tokens: The bound on the prompt's tokens, without those of a chat template.
        calls: The calls so far, each with its expert, prompt tokens and answer tokens.
    """

    def __init__(self, request: InferenceRequest) -> None:
        self.most_prompt_tokens = request.most_prompt_tokens
        self.calls: list[tuple[str, int, int]] = []
        self._prompt_tokens = request.prompt_tokens
        self._endpoint = request.endpoint
        self._generates = TABLE[request.endpoint].generates
        self._rewrites = request.stream and request.endpoint in _STREAMED
        given = request.data.get("stream_options")
        options = given if isinstance(given, dict) else {}
        self._total = bool(options.get("include_usage"))
        self._each = self._total and bool(options.get("continuous_usage_stats"))
        self._prompt = 0
        self._completion = 0
        self._by_choice: dict[int, int] = {}
        # Pieces of the answer since the last usage.
        self._pieces = 0
        self._abandoned = False
        self._bytes = 0
        self._lines = LineBuffer()
        self._status = 0
        self._streams = False
        self._reported = False

    def add(self, expert: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a call whose answer does not go to the client."""
        self.calls.append((expert, prompt_tokens, completion_tokens))

    def asks(self, data: dict[str, Any]) -> dict[str, Any]:
        """The body that makes the engine send its usage in every chunk."""
        if not self._rewrites:
            return data
        given = data.get("stream_options")
        if given is not None and not isinstance(given, dict):
            return data  # the engine's to refuse
        options = {**(given or {}), "include_usage": True, "continuous_usage_stats": True}
        return {**data, "stream_options": options}

    def abandon(self, prompt_tokens: int, completion_tokens: int, counted: bool) -> None:
        """Count an answer whose client has left, or whose deadline has passed.

        Args:
            prompt_tokens: Tokens of the prompt.
            completion_tokens: Tokens that were generated until then.
            counted: Whether the engine counted them. Where they are a guess, what was sent to
                the client is counted instead.
        """
        self._abandoned = True
        if counted or not self._status:
            reported = self._completion if self._reported else 0
            self._reported = True
            self._pieces = 0
            self._prompt = prompt_tokens
            self._completion = max(reported, completion_tokens)

    def _counted(self) -> tuple[int, int]:
        """Tokens of prompt and answer, by the usage or by what was sent."""
        if self._reported:
            return self._prompt, self._completion + self._pieces
        if not self._status:
            return 0, 0
        # An answer without usage is charged by its size.
        made = self._pieces if self._streams else estimate_tokens(self._bytes)
        return self._prompt_tokens, made

    def calls_made(self, expert: str) -> list[tuple[str, int, int]]:
        """Every call, as (expert, prompt tokens, completion tokens).

        Args:
            expert: The expert whose answer went to the client.
        """
        if not self._abandoned and (self._status == 0 or self._status >= 400):
            return self.calls
        return [*self.calls, (expert, *self._counted())]

    @property
    def status(self) -> int:
        """The reply's status; 0 while none has gone out."""
        return self._status

    def wrap(self, send: Send) -> Send:
        """An ASGI send that counts the tokens that pass through it."""

        async def metered_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                self._streams = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
                await send(message)
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            if not self._streams:
                self._bytes += len(body)
                self._read(body)
                await send(message)
                return
            out = self._pass(body, ends=not more)
            if out or not more:
                await send({**message, "body": out})

        return metered_send

    def _pass(self, body: bytes, *, ends: bool) -> bytes:
        """Count whole lines, and return those that the client gets."""
        whole = self._lines.take(body, ends=ends)
        if b"data:" not in whole:
            return whole
        kept = []
        dropped = False
        for line in whole.splitlines(keepends=True):
            if dropped and not line.strip():
                continue  # the end of an event that the client does not get
            dropped = False
            if line.startswith(b"data:") and b"{" in line:
                line = self._event(line)
                dropped = not line
            kept.append(line)
        return b"".join(kept)

    def _event(self, line: bytes) -> bytes:
        if self._endpoint in _STREAMED or _PIECE.search(line):
            self._pieces += 1
        if b'"usage"' not in line:
            return line
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            return line
        if not isinstance(event, dict):
            return line
        if (usage := usage_of(event)) is not None:
            prompt, completion = token_counts(usage)
            choices = event.get("choices") if self._rewrites else None
            first = choices[0] if isinstance(choices, list) and choices else None
            self._note(prompt, completion, first.get("index") if isinstance(first, dict) else None)
        if self._each or not self._rewrites or "usage" not in event:
            return line
        if not event.get("choices"):
            return line if self._total else b""
        del event["usage"]
        return b"data: " + orjson.dumps(event) + b"\n"

    def _read(self, body: bytes) -> None:
        """Read the usage of a whole reply."""
        if (usage := reply_usage(body)) is not None:
            self._note(usage.prompt_tokens, usage.answer_tokens, None)

    def _note(self, prompt_tokens: int | None, answer_tokens: int | None, choice: Any) -> None:
        """Record a usage. `choice` is its index where each chunk counts one choice's tokens."""
        if answer_tokens is None and self._generates:
            return  # then its answer is counted as it passes
        self._reported = True
        self._pieces = 0
        self._prompt = max(self._prompt, prompt_tokens or 0)
        completion = answer_tokens or 0
        if isinstance(choice, int):
            self._by_choice[choice] = completion
            completion = sum(self._by_choice.values())
        self._completion = max(self._completion, completion)
