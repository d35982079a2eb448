"""Requests to an engine without HTTP, as a pool makes them."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import orjson

from service.engine.engine_interface import Engine, EngineRequest, Message
from service.errors import CoeError
from service.http.error_formats import error_response

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
_ids = itertools.count()


@dataclass
class Reply:
    """An ASGI send that records a response; `begun` is set at its first message."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    ended: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: CoeError | None = None

    async def __call__(self, message: Message) -> None:
        assert not self.ended, "something came after the end"
        if message["type"] == "http.response.start":
            assert not self.status, "a second head"
            self.status = message["status"]
            self.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
            self.begun.set()
            return
        assert self.status, "a body before its head"
        if not self.parts:
            assert message.get("body") or not message.get("more_body"), "a head without a byte"
        self.parts.append(message.get("body", b""))
        self.ended = not message.get("more_body", False)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON events of a stream that ended with `[DONE]`."""
        lines = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        return [orjson.loads(line) for line in lines[:-1]]

    @property
    def named_events(self) -> list[Any]:
        """The events of a stream in which each has its type as its name."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            name, data = block.split("\n")
            found.append(orjson.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
        return found

    @property
    def fault(self) -> dict[str, Any]:
        """The `error` object of OpenAI's error shape."""
        detail: dict[str, Any] = self.json["error"]
        assert detail.keys() == {"message", "type", "param", "code"}
        assert detail["message"]
        return detail


async def run(engine: Engine, path: str, expert: str, body: Any, reply: Reply) -> None:
    """Run a request. A raised error becomes the response that a pool would send."""
    raw = orjson.dumps({"model": expert, **body})
    request = EngineRequest(path, expert, raw, f"test-{next(_ids)}")
    try:
        await engine.run(request, reply)
    except CoeError as error:
        assert not reply.status, "an error was raised after something was sent"
        fault = error_response(error)
        reply.error, reply.status, reply.parts, reply.ended = (
            error,
            fault.status,
            [fault.body],
            True,
        )
    assert reply.ended


async def ask(engine: Engine, path: str, expert: str, body: Any) -> Reply:
    """Run a request and return its recorded response."""
    reply = Reply()
    await run(engine, path, expert, body, reply)
    return reply
