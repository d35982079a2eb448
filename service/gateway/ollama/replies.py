"""Turns answers of OpenAI's API into those of Ollama's as they pass. Pure, but for the clock.

A stream of Ollama's API is one JSON object a line. The last one has the counts, and durations in
nanoseconds. Servers of others make some of the answers: a field of another type counts as missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from service.engine.engine_interface import Message, Send
from service.gateway.ollama.requests import CHAT, EMBED, EMBEDDINGS, TranslatedRequest
from service.http.asgi_helpers import LineBuffer
from service.http.error_formats import Dialect, error_body

_LINES = (b"content-type", b"application/x-ndjson")
_NS_PER_MS = 10**6
_DATA = b"data:"
# Counts and times beyond that are none.
_MOST = 2**40
_NONSENSE = "the expert's reply is no answer to such a request"


def now_text() -> str:
    """The time in RFC 3339."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def without_prompt(path: str, model: str, act: str) -> dict[str, Any]:
    """The answer to a request without a prompt, which loads or unloads a model.

    Args:
        path: The path of Ollama's API.
        model: The model.
        act: load or unload.
    """
    said = {"message": {"role": "assistant", "content": ""}} if path == CHAT else {"response": ""}
    head = {"model": model, "created_at": now_text()}
    return {**head, **said, "done": True, "done_reason": act}


class OllamaSend:
    """An ASGI send that turns an answer into one of Ollama's API.

    Attributes:
        status: The answer's status; 0 before it has begun.
        expert: The expert that answers; empty before.

    Args:
        path: The path of Ollama's API.
        request: The request that is answered.
        send: The client's send.
        clock: The time in seconds.
    """

    def __init__(
        self,
        path: str,
        request: TranslatedRequest,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._request = request
        self._send = send
        self._clock = clock
        self._began_s = clock()
        self._head: Message | None = None
        self._streams = False
        self._lines = LineBuffer()
        self._body = bytearray()
        self._stream = _Stream(self._with)
        self.status = 0
        self.expert = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
            if self._streams:
                assert self._head is not None
                await self._send(self._head)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if not self._streams:
            self._body += body
            if not more:
                await self._send_whole(bytes(self._body))
            return
        out = b"".join(self._events(self._lines.take(body, ends=not more)))
        if not more:
            out += b"".join(map(_line, self._stream.last(self._usage_fields)))
        if out or not more:
            await self._send({**message, "body": out})

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        headers = dict(message["headers"])
        self.expert = headers.get(b"x-coe-expert", b"").decode()
        self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        own = (b"content-type", b"content-length")
        kept = [pair for pair in message["headers"] if not (self._streams and pair[0] in own)]
        self._head = {**message, "headers": [*kept, _LINES] if self._streams else kept}

    async def _send_whole(self, body: bytes) -> None:
        assert self._head is not None
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            data = {}
        if self.status >= 400:
            detail = data.get("error") if isinstance(data, dict) else None
            shown = detail if isinstance(detail, dict) else {"message": "the request failed"}
            out = error_body(shown, self.status, Dialect.OLLAMA)
        elif (shown_whole := self._whole(_object(data))) is not None:
            out = orjson.dumps(shown_whole)
        else:
            self._head = {**self._head, "status": 502}
            out = error_body({"message": _NONSENSE}, 502, Dialect.OLLAMA)
        length = (b"content-length", str(len(out)).encode())
        kept = [pair for pair in self._head["headers"] if pair[0] != b"content-length"]
        await self._send({**self._head, "headers": [*kept, length]})
        await self._send({"type": "http.response.body", "body": out})

    def _whole(self, data: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer as the endpoint shows it; None where an expert's reply is none."""
        fields = self._usage_fields(data.get("usage"))
        if self._path in (EMBED, EMBEDDINGS):
            vectors = [item.get("embedding") for item in _objects(data.get("data"))]
            if not vectors or not all(isinstance(vector, list) for vector in vectors):
                return None
            if self._path == EMBEDDINGS:
                return {"embedding": vectors[0]}
            kept = ("total_duration", "load_duration", "prompt_eval_count")
            return {
                "model": data.get("model"),
                "embeddings": vectors,
                **{name: fields[name] for name in kept},
            }
        choices = _objects(data.get("choices"))
        if not choices:
            return None
        choice = choices[0]
        message = _object(choice.get("message")) or {"content": choice.get("text")}
        said: dict[str, Any] = {"content": _text(message.get("content"))}
        if thought := _thought(message):
            said["thinking"] = thought
        if calls := _objects(message.get("tool_calls")):
            said["tool_calls"] = [_call(call) for call in calls]
        end = {"done": True, "done_reason": _reason(choice.get("finish_reason")), **fields}
        return {**self._with(data.get("model"), said), **_logprobs(choice), **end}

    def _events(self, lines: bytes) -> Iterator[bytes]:
        for line in lines.splitlines():
            if not line.startswith(_DATA) or b"{" not in line:
                continue
            try:
                event = orjson.loads(line[len(_DATA) :])
            except orjson.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield from map(_line, self._stream.take(event))

    def _with(self, model: object, said: Mapping[str, Any]) -> dict[str, Any]:
        """An answer, or a piece of one, as the endpoint shows it."""
        head = {"model": model, "created_at": now_text()}
        if self._path == CHAT:
            return {**head, "message": {"role": "assistant", **said}, "done": False}
        text = {"response": said["content"]}
        more = {name: said[name] for name in ("thinking", "tool_calls") if name in said}
        return {**head, **text, **more, "done": False}

    def _usage_fields(self, usage: object) -> dict[str, int]:
        """Counts and durations in nanoseconds."""
        given = _object(usage)
        times = _object(given.get("coe"))
        return {
            "total_duration": int((self._clock() - self._began_s) * 1e9),
            "load_duration": _ns(times.get("swap_ms")),
            "prompt_eval_count": _count(given.get("prompt_tokens")),
            "prompt_eval_duration": _ns(times.get("prefill_ms")),
            "eval_count": _count(given.get("completion_tokens")),
            "eval_duration": _ns(times.get("decode_ms")),
        }


class _Stream:
    """The state of one stream of chat or completions."""

    def __init__(self, shown: Callable[[object, Mapping[str, Any]], dict[str, Any]]) -> None:
        self._shown = shown
        self._model: object = None
        self._reason: object = None
        self._usage: object = None
        self._failed = False
        # Calls of tools by index. Ollama sends each in one piece.
        self._calls: dict[int, dict[str, Any]] = {}

    def take(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the lines for an event."""
        if isinstance(error := event.get("error"), dict):
            self._failed = True
            yield {"error": str(error.get("message"))}
            return
        self._model = event.get("model") or self._model
        self._usage = event.get("usage") or self._usage
        choices = _objects(event.get("choices"))
        if not choices:
            return
        choice = choices[0]
        delta = _object(choice.get("delta")) or {"content": choice.get("text")}
        said: dict[str, Any] = {"content": _text(delta.get("content"))}
        if thought := _thought(delta):
            said["thinking"] = thought
        for call in _objects(delta.get("tool_calls")):
            self._add(call)
        if choice.get("finish_reason"):
            self._reason = choice["finish_reason"]
            if self._calls:
                said["tool_calls"] = [_call(self._calls[i]) for i in sorted(self._calls)]
                self._calls = {}
        if said["content"] or len(said) > 1:
            yield {**self._shown(self._model, said), **_logprobs(choice)}

    def last(self, fields: Callable[[object], dict[str, int]]) -> Iterator[dict[str, Any]]:
        """Yield the line that ends a stream without an error."""
        if self._failed:
            return
        if self._reason is None:
            yield {"error": "the answer broke off"}
            return
        end = {"done": True, "done_reason": _reason(self._reason), **fields(self._usage)}
        yield {**self._shown(self._model, {"content": ""}), **end}

    def _add(self, piece: Mapping[str, Any]) -> None:
        held = self._calls.setdefault(
            _count(piece.get("index")), {"function": {"name": "", "arguments": ""}}
        )
        if piece.get("id"):
            held["id"] = piece["id"]
        function = _object(piece.get("function"))
        for name in ("name", "arguments"):
            held["function"][name] += _text(function.get(name))


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool, whose arguments are an object; empty where what was written is none."""
    function = _object(call.get("function"))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or b"{}")
            # A text may hold more levels than can be written again, with those around it.
            orjson.dumps([[[[[[arguments]]]]]])
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            arguments = {}
    made = {"function": {"name": _text(function.get("name")), "arguments": _object(arguments)}}
    return {"id": call["id"], **made} if call.get("id") else made


def _thought(said: Mapping[str, Any]) -> str:
    return _text(said.get("reasoning")) or _text(said.get("reasoning_content"))


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any]:
    content = _object(choice.get("logprobs")).get("content")
    return {"logprobs": content} if content else {}


def _reason(given: object) -> str:
    return "length" if given == "length" else "stop"


def _ns(milliseconds: object) -> int:
    whole = isinstance(milliseconds, int | float) and abs(milliseconds) < _MOST
    return int(milliseconds * _NS_PER_MS) if whole else 0  # type: ignore[operator]


def _count(given: object) -> int:
    return given if isinstance(given, int) and 0 <= given < _MOST else 0


def _text(given: object) -> str:
    return given if isinstance(given, str) else ""


def _object(given: object) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _objects(given: object) -> list[dict[str, Any]]:
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _line(data: Mapping[str, Any]) -> bytes:
    return orjson.dumps(data) + b"\n"
