"""A fake OpenAI server that does almost nothing, in a process of its own.

Proxies are measured in front of it, and so is the load generator's own limit. A stream has
`max_tokens` chunks: the first comes at once, and the others follow at intervals of `--step-ms`. A
reply that is no stream comes after `--whole-ms`. With `--stamped`, each chunk's text is the time of
its writing (`time.perf_counter` in s, which all processes of a machine share on Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any, cast

import httptools
import orjson
import uvloop

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_BASE = {"id": "chatcmpl-upstream", "created": 1, "model": "upstream"}


def event(word: str, last: bool) -> bytes:
    """Encode an SSE event as an HTTP chunk."""
    delta = {"role": "assistant", "content": word}
    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if last else None}
    data = orjson.dumps({**_BASE, "object": "chat.completion.chunk", "choices": [choice]})
    line = b"data: " + data + b"\n\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def whole(words: int) -> bytes:
    """A reply that is no stream."""
    message = {"role": "assistant", "content": " word" * words}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": words, "total_tokens": words + 1}
    return _json({**_BASE, "object": "chat.completion", "choices": [choice], "usage": usage})


def _json(data: dict[str, Any]) -> bytes:
    body = orjson.dumps(data)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


_WORD = event(" word", last=False)
_LAST = event(" word", last=True)
# Each stamp has the same length, so that the sizes in the chunks' heads stay right.
_STAMP = b"%017.6f"
_STAMPED_WORD = event("0" * 17, last=False).replace(b"0" * 17, _STAMP)
_STAMPED_LAST = event("0" * 17, last=True).replace(b"0" * 17, _STAMP)


class Upstream(asyncio.Protocol):
    """Serves one connection: a piece each `step_s`, or a whole answer after `whole_s`."""

    def __init__(self, step_s: float, whole_s: float = 0.0, *, stamped: bool = False) -> None:
        self._step_s = step_s
        self._whole_s = whole_s
        self._stamped = stamped
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser: Any = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """The parser: a piece of the body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """The parser: the request is whole."""
        body = b"".join(self._parts)
        self._parts.clear()
        if not body:
            self._transport.write(_json({"status": "ok"}))
            return
        data = orjson.loads(body)
        words = int(data.get("max_tokens") or 1)
        if data.get("stream"):
            self._step(self._loop.time(), 0, words)
        elif self._whole_s:
            self._loop.call_later(self._whole_s, self._transport.write, whole(words))
        else:
            self._transport.write(whole(words))

    def _step(self, began_s: float, i: int, words: int) -> None:
        if self._transport.is_closing():
            return
        last = i == words - 1
        if self._stamped:
            chunk = (_STAMPED_LAST if last else _STAMPED_WORD) % time.perf_counter()
        else:
            chunk = _LAST if last else _WORD
        self._transport.write(_STREAM_HEAD + chunk if i == 0 else chunk)
        if last:
            self._transport.write(_END)
            return
        self._loop.call_at(began_s + (i + 1) * self._step_s, self._step, began_s, i + 1, words)


async def serve(port: int, step_ms: float, whole_ms: float, *, stamped: bool) -> None:
    """Serve until cancelled."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Upstream(step_ms / 1000, whole_ms / 1000, stamped=stamped),
        "127.0.0.1",
        port,
        backlog=1024,
    )
    await server.serve_forever()


def main() -> None:
    """`python -m loadtests.lib.fake_openai_server --port N`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=20.0, help="between chunks, in ms")
    parser.add_argument("--whole-ms", type=float, default=0.0, help="until whole replies, in ms")
    parser.add_argument("--stamped", action="store_true", help="chunks tell when they were written")
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.step_ms, given.whole_ms, stamped=given.stamped))


if __name__ == "__main__":
    main()
