"""What an answer used, read as it passes: from a JSON reply, or from a stream's chunks.

For a metered stream the engine is asked to tell its usage in every chunk, where its API has
words for that; what the client did not ask for is taken out again. Other streams tell it at
their end only: until then their pieces are counted. What the engine of a client that left had
made by then is told from outside (`left`).
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from service.engine.base import Message, Send
from service.gateway.request.parsing import InferenceRequest
from service.http.asgi import LineBuffer
from service.http.endpoints import TABLE
from service.http.usage import estimate_tokens, reply_usage, token_counts, usage_of

_STREAMED = frozenset({"/v1/chat/completions", "/v1/completions"})
# Events of other APIs that carry a piece of an answer; the rest are its frame.
_PIECE = re.compile(rb'"type"\s*:\s*"(?:content_block_delta|response\.[a-z_.]+\.delta)"')
# Of a prompt whose tokens nobody has told.


class UsageMeter:
    """Counts the tokens of one request's calls, by expert.

    `wrap` counts the answer that goes out; `add` those calls of a recipe that don't.
    `most_prompt_tokens`: the bound on the prompt's tokens, but for a template's.
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
        # Pieces of the answer since its tokens were told last.
        self._pieces = 0
        self._left = False
        self._bytes = 0
        self._lines = LineBuffer()
        self._status = 0
        self._streams = False
        self._told = False

    def add(self, expert: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a call whose answer does not go to the client itself."""
        self.calls.append((expert, prompt_tokens, completion_tokens))

    def asks(self, data: dict[str, Any]) -> dict[str, Any]:
        """The body that makes the engine tell its usage."""
        if not self._rewrites:
            return data
        given = data.get("stream_options")
        if given is not None and not isinstance(given, dict):
            return data  # the engine's to refuse
        options = {**(given or {}), "include_usage": True, "continuous_usage_stats": True}
        return {**data, "stream_options": options}

    def left(self, prompt_tokens: int, completion_tokens: int, counted: bool) -> None:
        """Nobody waits for the answer any more: what had been made of it by then.

        `counted`: by its engine. What was only guessed gives way to what went out.
        """
        self._left = True
        if counted or not self._status:
            told = self._completion if self._told else 0
            self._told = True
            self._pieces = 0
            self._prompt = prompt_tokens
            self._completion = max(told, completion_tokens)

    def _counted(self) -> tuple[int, int]:
        """Tokens of prompt and answer, as far as they were told or counted."""
        if self._told:
            return self._prompt, self._completion + self._pieces
        if not self._status:
            return 0, 0
        # Whoever answers without telling is charged for by size.
        made = self._pieces if self._streams else estimate_tokens(self._bytes)
        return self._prompt_tokens, made

    def calls_made(self, expert: str) -> list[tuple[str, int, int]]:
        """Every call: expert, prompt tokens, tokens of the answer. `expert`: whose went out."""
        if not self._left and (self._status == 0 or self._status >= 400):
            return self.calls
        return [*self.calls, (expert, *self._counted())]

    @property
    def status(self) -> int:
        """The reply's status; 0 while none has gone out."""
        return self._status

    def wrap(self, send: Send) -> Send:
        """A `send` that counts what goes through it."""

        async def counted(message: Message) -> None:
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

        return counted

    def _pass(self, body: bytes, *, ends: bool) -> bytes:
        """Count whole lines, and give back what the client gets of them."""
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
        """A whole reply."""
        if (usage := reply_usage(body)) is not None:
            self._note(usage.prompt_tokens, usage.answer_tokens, None)

    def _note(self, prompt_tokens: int | None, answer_tokens: int | None, choice: Any) -> None:
        """A usage was told. `choice`: whose, where each chunk counts its own choice's tokens."""
        if answer_tokens is None and self._generates:
            return  # then its answer is counted as it passes
        self._told = True
        self._pieces = 0
        self._prompt = max(self._prompt, prompt_tokens or 0)
        completion = answer_tokens or 0
        if isinstance(choice, int):
            self._by_choice[choice] = completion
            completion = sum(self._by_choice.values())
        self._completion = max(self._completion, completion)
