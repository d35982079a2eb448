"""The ASGI send to the client: it adds the gateway's headers and `usage.coe` to an answer.

It also records how far the answer has come, and writes errors in the client's dialect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import orjson

from service.engine.engine_interface import Message, Send
from service.errors import CoeError, UpstreamError
from service.gateway.request_record import CallRole, ExpertCall, RequestRecord
from service.gateway.usage_meter import UsageMeter
from service.http.asgi_helpers import STREAM_HEADERS, LineBuffer, body_message
from service.http.error_formats import (
    Dialect,
    codes_of_ours,
    detail_of,
    error_body,
    status_of,
    stream_error,
)
from service.http.token_usage import reasoning_tokens, reply_usage, token_counts, usage_of
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
        role: What the calls of this reply are for; None where the recipe has no roles.
        round: The round of a deliberation that they belong to; None elsewhere.
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
        self.role: CallRole | None = None
        self.round: int | None = None
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
        self._record_usage(*token_counts(usage), reasoning_tokens(usage))
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
        self._record_usage(usage.prompt_tokens, usage.answer_tokens, usage.reasoning_tokens)
        at = usage.value + 1
        added = b'"coe":' + orjson.dumps(self._cost()) + b","
        if body[at:].lstrip()[:1] == b"}":
            added = added[:-1]
        return body[:at] + added + body[at:]

    def _record_usage(
        self, prompt_tokens: int | None, answer_tokens: int | None, thought_tokens: int | None
    ) -> None:
        """Record the usage of the call that answers."""
        if self.expert_call is None:
            return
        if prompt_tokens is not None:
            self.expert_call.prompt_tokens = prompt_tokens
        if answer_tokens is not None:
            self.expert_call.completion_tokens = answer_tokens
        if thought_tokens is not None:
            self.expert_call.reasoning_tokens = thought_tokens

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
