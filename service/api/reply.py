"""A reply on its way to the client: our headers, what it cost, and how far it has come."""

from __future__ import annotations

import asyncio
import time

import orjson

from service.api.meter import Meter
from service.api.passage import Passage, Spent
from service.engine.protocol import Message, Send
from service.errors import CoeError
from service.link.call import QUEUE_MS, SWAP_MS
from service.link.faults import sse_event
from service.link.usage import last_usage


class Reply:
    """An ASGI send that adds our headers, reads the usage and adds to it what all cost.

    `spent` is the call that answers. `started`: whether anything has gone out. `events`: how
    many a stream has had by now.
    """

    def __init__(
        self,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        passage: Passage,
        began_s: float,
        meter: Meter | None = None,
    ) -> None:
        """`meter`: what the engine says goes through it first; it counts, and takes out what
        the client did not ask for."""
        self.passage = passage
        self.meter = meter
        self._counted = meter.wrap(self._out) if meter is not None else self._out
        self.started = False
        self.spent: Spent | None = None
        self.first_byte_limit: asyncio.Timeout | None = None
        self.sent_s = began_s
        self.events = 0
        self._send = send
        self._headers = headers
        self._began_s = began_s
        self._streams = False
        self._held: Message | None = None

    async def __call__(self, message: Message) -> None:
        await self._counted(message)

    async def _out(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._note(message)
            if self._streams:
                await self._send(self._headed(message, None))
            else:
                # Held until the body's length is known: it grows by what is put into the usage.
                self._held = message
            return
        body = message.get("body", b"")
        if self._streams:
            self.events += body.count(b"data: {")
        if b'"usage"' in body:
            message = {**message, "body": self._with_usage(body)}
        if self._held is not None:
            held, self._held = self._held, None
            whole = not message.get("more_body", False)
            await self._send(self._headed(held, len(message["body"]) if whole else None))
        await self._send(message)

    def _note(self, message: Message) -> None:
        self.started = True
        passage = self.passage
        passage.status = message["status"]
        passage.began_at_s = self._began_s
        passage.sent_at_s = self.sent_s
        passage.first_byte_at_s = time.monotonic()
        if self.first_byte_limit is not None:
            self.first_byte_limit.reschedule(None)
        self._streams = any(v.startswith(b"text/event-stream") for _, v in message["headers"])

    def _headed(self, message: Message, length: int | None) -> Message:
        passage = self.passage
        ours = [
            *self._headers,
            (b"x-coe-expert", passage.expert.encode()),
            (QUEUE_MS.encode(), f"{passage.queue_ms:.1f}".encode()),
            (SWAP_MS.encode(), f"{passage.swap_ms:.1f}".encode()),
        ]
        if passage.recipe != passage.expert:
            ours.append((b"x-coe-recipe", passage.recipe.encode()))
        if passage.clipped is not None:
            ours.append((b"x-coe-max-tokens", str(passage.clipped).encode()))
        if length is not None:
            ours.append((b"content-length", str(length).encode()))
        given = [pair for pair in message["headers"] if pair[0] != b"content-length"]
        return {**message, "headers": [*given, *ours]}

    def _with_usage(self, body: bytes) -> bytes:
        """The body with `coe` in its usage, if its usage is in it."""
        usage = last_usage(body)
        if usage is None:
            return body
        at = usage.value + 1
        spent = self.spent
        if spent is not None:
            if usage.prompt_tokens is not None:
                spent.prompt_tokens = usage.prompt_tokens
            if usage.answer_tokens is not None:
                spent.completion_tokens = usage.answer_tokens
        if self.passage.status >= 400:
            return body
        passage = self.passage
        decode_s = time.monotonic() - passage.first_byte_at_s
        added = b'"coe":' + orjson.dumps(passage.to_json(decode_s * 1000)) + b","
        if body[at : at + 1] == b"}":
            added = added[:-1]
        return body[:at] + added + body[at:]

    async def break_off(self, error: CoeError) -> None:
        """End a reply that had begun. A stream says why; anything else is cut short."""
        self.passage.outcome = error.code
        if self._streams:
            await self._send({"type": "http.response.body", "body": sse_event(error)})
            return
        raise error
