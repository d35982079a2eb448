"""The simulated engine: deterministic text at set speeds. It is for tests and load tests only.

It answers in the formats of OpenAI's and Anthropic's APIs, so that all other parts can run without
a model. The `system_fingerprint` of its completions names the engine.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import struct
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from service.config import SimulatedOptions
from service.engine.engine_interface import (
    EngineObserver,
    EngineReport,
    EngineRequest,
    EngineTimings,
    LoadResult,
    Send,
    SwapResult,
)
from service.engine.simulated_answer_formats import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    Answer,
    AnswerFormat,
    format_of,
)
from service.engine.simulated_readings import READINGS, texts_of, tokens_of
from service.engine.simulated_transcripts import transcript
from service.errors import (
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownEndpointError,
)
from service.http.asgi_helpers import body_message, send_json, send_response, start_response
from service.http.prompt_endpoints import AUDIO, TABLE

_GENERATING = frozenset({CHAT, COMPLETIONS, MESSAGES, RESPONSES})
_INPUT_TOKENS = "/v1/responses/input_tokens"
ENDPOINTS = _GENERATING | {
    *READINGS,
    *(AUDIO, "/v1/embeddings", _INPUT_TOKENS, "/tokenize", "/detokenize"),
}
_WORDS = ("one", "small", "answer", "from", "an", "engine", "that", "only", "plays", "a", "part")
_WEIGHT_BYTES = 1024**3


@dataclass(slots=True)
class _Progress:
    """Progress of an answer: `answers` choices of `length` tokens each, from `first_s` on."""

    length: int
    answers: int
    step_s: float
    first_s: float = 0.0

    def tokens(self) -> int:
        """Return the number of tokens so far, of all choices together."""
        if not self.first_s:
            return 0
        steps = (time.monotonic() - self.first_s) / self.step_s if self.step_s else self.length
        return self.answers * min(self.length, 1 + int(steps))


class SimulatedEngine:
    """An engine without a model.

    Args:
        experts: The experts that the engine can answer for.
        options: The speeds, and the errors to simulate.
        observer: Receives the engine's statistics, if any.
        bases: The bases of experts that run on another expert's weights.
    """

    def __init__(
        self,
        experts: Collection[str],
        options: SimulatedOptions,
        observer: EngineObserver | None = None,
        bases: Mapping[str, str] | None = None,
    ) -> None:
        self._experts = experts
        self._bases = bases or {}
        self._runs = ""
        self._options = options
        self._observer = observer
        self._loaded: set[str] = set()
        self._dead: str | None = None
        self._running = 0
        self._rests = False
        self.swaps = 0

    async def start(self) -> EngineReport:
        """Wait for `load_s` seconds.

        Raises:
            ExpertFailedError: The option `fail` is `load`.
        """
        if self._options.load_s:
            await asyncio.sleep(self._options.load_s)
        if self._options.fail == "load":
            raise ExpertFailedError("simulated failure while loading", retry_after_s=30)
        return EngineReport("simulated", self._options.max_model_len, ENDPOINTS)

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Make an expert available at once."""
        if expert not in self._experts and adapter is None:
            raise ExpertFailedError(f"no weights for {expert!r}")
        self._loaded.add(expert)
        self._runs = self._runs or expert

    async def unload(self, expert: str) -> None:
        """Forget an adapter."""
        self._loaded.discard(expert)

    @property
    def swappable_experts(self) -> frozenset[str]:
        """All experts of the engine, because they have no weights that could differ."""
        return frozenset(self._experts)

    async def load_to_host(self, expert: str) -> LoadResult:
        """Wait for `fill_s` seconds."""
        await asyncio.sleep(self._options.fill_s)
        await self.load(expert)
        return LoadResult(_WEIGHT_BYTES, self._options.fill_s)

    async def swap_in(self, expert: str) -> SwapResult:
        """Wait for `swap_s` seconds."""
        if expert not in self._loaded:
            raise ExpertFailedError(f"the weights of {expert!r} are not held")
        await asyncio.sleep(self._options.swap_s)
        self.swaps += 1
        self._rests = False
        before, self._runs = self._runs, expert
        same = self._bases.get(before, before) == self._bases.get(expert, expert)
        return SwapResult(self._options.swap_s, ok=True, method="steer" if same else "inplace")

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Forget an expert."""
        self._loaded.discard(expert)

    @property
    def can_rest(self) -> bool:
        """Always: there are no weights."""
        return True

    async def rest(self) -> None:
        """Refuse requests until `resume` or `swap_in`."""
        if self._running:
            raise EngineDeadError(f"put to sleep with {self._running} running requests")
        self._rests = True

    async def resume(self) -> None:
        """Wait for `swap_s` seconds."""
        await asyncio.sleep(self._options.swap_s)
        self._rests = False

    def failure(self) -> str | None:
        """Return why the engine is dead, or None."""
        return self._dead

    def kill(self, why: str) -> None:
        """Simulate the death of an engine. Every running request fails."""
        self._dead = why

    async def in_flight(self) -> int:
        """Return the number of running requests."""
        return self._running

    async def stop(self) -> None:
        """Mark the engine as dead."""
        self._dead = self._dead or "it was stopped"

    async def run(self, request: EngineRequest, send: Send) -> None:
        self._running += 1
        try:
            if self._dead is not None:
                raise EngineRestartingError(f"the engine of expert {request.expert!r} is dead")
            if self._rests:
                raise ExpertFailedError(f"{request.expert!r} sleeps", retry_after_s=1)
            if self._options.poison and self._options.poison.encode() in request.body:
                # A fault in native code runs no handler and sends no error.
                os.kill(os.getpid(), signal.SIGKILL)
            await self._answer(request, send)
        finally:
            self._running -= 1

    def _check_alive(self, expert: str) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine of expert {expert!r} died: {self._dead}")

    async def _answer(self, request: EngineRequest, send: Send) -> None:
        body = _json(request.body)
        path = request.endpoint
        if path == "/tokenize":
            text = _prompt_text(body, path)
            await _send_json(
                send,
                {
                    "tokens": [len(word) for word in text.split()],
                    "count": tokens_of(text),
                    "max_model_len": self._options.max_model_len,
                },
            )
        elif path == "/detokenize":
            ids = body.get("tokens")
            if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
                raise InvalidRequestError("`tokens` must be a list of integers", param="tokens")
            await _send_json(send, {"prompt": " ".join(_WORDS[i % len(_WORDS)] for i in ids)})
        elif path == _INPUT_TOKENS:
            count = tokens_of(_input_text(body))
            await _send_json(send, {"object": "response.input_tokens", "input_tokens": count})
        elif path == "/v1/embeddings":
            await self._embed(request, body, send)
        elif (read := READINGS.get(path)) is not None:
            await _send_json(send, read(request.expert, request.request_id, body))
        elif path == AUDIO:
            heard, kind = transcript(request.expert, request.body)
            length = (b"content-length", str(len(heard)).encode())
            await send_response(send, 200, [(b"content-type", kind), length], heard)
        elif path in _GENERATING:
            await self._generate(request, body, send)
        else:
            raise UnknownEndpointError(f"the simulated engine has no {path}")

    async def _embed(self, request: EngineRequest, body: dict[str, Any], send: Send) -> None:
        texts = texts_of(body, "input")
        if (encode := _ENCODINGS.get(str(body.get("encoding_format") or "float"))) is None:
            raise InvalidRequestError(f"`encoding_format` must be one of {', '.join(_ENCODINGS)}")
        data = [
            {"object": "embedding", "index": i, "embedding": encode(_vector(text))}
            for i, text in enumerate(texts)
        ]
        count = sum(map(tokens_of, texts))
        await _send_json(
            send,
            {
                "object": "list",
                "model": request.expert,
                "data": data,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            },
        )

    async def _generate(self, request: EngineRequest, body: dict[str, Any], send: Send) -> None:
        endpoint = request.endpoint
        prompt_field = TABLE[endpoint].prompt
        prompt = _prompt_text(body, endpoint)
        limit_field, limit = _length_limit(body, endpoint)
        n = _choices(body, endpoint)
        tokens = (
            self._options.tokens
            if limit is None
            else _integer({limit_field: limit}, limit_field, 1, 1, 10**6)
        )
        prompt_tokens = tokens_of(prompt)
        context = self._options.max_model_len
        # As in vLLM, a limit above the context is an error, and a limit above the free room is cut.
        if (limit is not None and tokens > context) or prompt_tokens >= context:
            raise PromptTooLongError(
                f"the maximum context length is {context} tokens, but "
                f"{prompt_tokens} prompt tokens and {tokens} of answer were requested",
                param=prompt_field,
            )
        bounded = limit is not None or tokens > context - prompt_tokens
        tokens = min(tokens, context - prompt_tokens)
        stops = body.get("stop_sequences" if endpoint == MESSAGES else "stop")
        words, stop = _cut(answer_text(request.expert, prompt, tokens), stops)
        answer = Answer(
            endpoint=endpoint,
            expert=request.expert,
            request_id=request.request_id,
            body=body,
            prompt_tokens=prompt_tokens,
            words=words,
            choices=n,
            stop=stop,
            # An answer without a limit ends by itself.
            cut=bounded and stop is None,
        )
        made = _Progress(len(words), n, self._options.decode_ms / 1000)
        try:
            await self._make(answer, send, made, request.counted_as)
        except asyncio.CancelledError:
            request.on_abandoned(prompt_tokens, made.tokens())
            raise

    async def _make(self, answer: Answer, send: Send, made: _Progress, counted_as: str) -> None:
        began_s = time.monotonic()
        if self._options.prefill_tokens_per_s:
            await asyncio.sleep(answer.prompt_tokens / self._options.prefill_tokens_per_s)
        if self._options.fail == "first_byte":
            self.kill("simulated death before the first byte")
        self._check_alive(answer.expert)
        first_s = made.first_s = time.monotonic()
        form = format_of(answer)
        if answer.body.get("stream"):
            await self._stream(send, form, max(1, len(answer.words)))
            self._report(answer, counted_as, first_s - began_s, first_s)
            return
        if self._options.decode_ms:
            await asyncio.sleep(len(answer.words) * self._options.decode_ms / 1000)
            self._check_alive(answer.expert)
        self._report(answer, counted_as, first_s - began_s, first_s)
        await _send_json(send, form.whole())

    def _report(self, answer: Answer, expert: str, prefill_s: float, first_s: float) -> None:
        if self._observer is not None:
            decode_s = time.monotonic() - first_s
            self._observer.on_finished(
                EngineTimings(expert, 0.0, prefill_s, decode_s, answer.prompt_tokens, answer.tokens)
            )

    async def _stream(self, send: Send, form: AnswerFormat, steps: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        step_s = self._options.decode_ms / 1000
        start = start_response(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        for i in range(steps):
            if step_s and (wait_s := began + i * step_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if i == 0:
                await send(start)
            if i == 1 and self._options.fail == "mid_stream":
                self.kill("simulated death in mid-stream")
            if self._dead is not None:
                error = EngineDeadError(f"the engine died: {self._dead}")
                await send(body_message(form.failure(error)))
                return
            await send(body_message(form.step(i), more=True))
        await send(body_message(form.end()))


def answer_text(expert: str, prompt: str, tokens: int) -> list[str]:
    """Return the words of an expert's answer.

    Equal prompts to the same expert give equal answers. Experts answer differently.
    """
    seed = hashlib.blake2b(f"{expert}\0{prompt}".encode("utf-8", "replace"), digest_size=8)
    at = int.from_bytes(seed.digest(), "big")
    words = [f"{expert}:"]
    words += [" " + _WORDS[(at + i * 7) % len(_WORDS)] for i in range(tokens - 1)]
    return words[:tokens]


def _cut(words: list[str], stop: object) -> tuple[list[str], str | None]:
    """Return the words before the first stop string, and that string or None."""
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    whole = "".join(words)
    ends = [(whole.find(s), s) for s in stops if isinstance(s, str) and s and s in whole]
    if not ends:
        return words, None
    left, found = min(ends)
    kept = []
    for word in words:
        if left <= 0:
            break
        kept.append(word[:left])
        left -= len(word)
    return kept, found


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


def _prompt_text(body: dict[str, Any], endpoint: str) -> str:
    if endpoint == RESPONSES:
        return _input_text(body)
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise InvalidRequestError(
                "`messages` must be a list with at least one message", param="messages"
            )
        parts = [_content_text(body.get("system"))] if endpoint == MESSAGES else []
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or "role" not in message:
                raise InvalidRequestError(
                    f"`messages[{i}]` must be an object with a role", param="messages"
                )
            parts.append(_content_text(message.get("content")))
        return "\n".join(parts)
    prompt = body.get("prompt") if endpoint != MESSAGES else None
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
        return "\n".join(prompt)
    if isinstance(prompt, str) and prompt:
        return prompt
    raise InvalidRequestError("`messages` or `prompt` is required", param="messages")


def _input_text(body: dict[str, Any]) -> str:
    """Return the text of a Responses request: its instructions and its input."""
    given = body.get("input")
    items: list[Any] = given if isinstance(given, list) else [{"content": given}]
    if not given or not isinstance(given, str | list):
        raise InvalidRequestError("`input` must be text or a list of items", param="input")
    if not all(isinstance(item, dict) for item in items):
        raise InvalidRequestError("each item of `input` must be an object", param="input")
    contents = [body.get("instructions"), *(item.get("content") for item in items)]
    return "\n".join(map(_content_text, contents))


def _content_text(content: object) -> str:
    if not content:
        return ""
    return content if isinstance(content, str) else orjson.dumps(content).decode()


def _length_limit(body: dict[str, Any], endpoint: str) -> tuple[str, Any]:
    """Return the field that bounds the answer's length, and its value or None."""
    if endpoint == RESPONSES:
        return "max_output_tokens", body.get("max_output_tokens")
    if endpoint == MESSAGES:
        if body.get("max_tokens") is None:
            raise InvalidRequestError("`max_tokens` is required", param="max_tokens")
        return "max_tokens", body["max_tokens"]
    return "max_tokens", body.get("max_completion_tokens") or body.get("max_tokens")


def _choices(body: dict[str, Any], endpoint: str) -> int:
    if endpoint not in (CHAT, COMPLETIONS):
        return 1
    prompts = body.get("prompt") if endpoint == COMPLETIONS else None
    count = len(prompts) if isinstance(prompts, list) else 1
    return _integer(body, "n", 1, 1, 128) * count


def _integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(f"`{name}` must be an integer from {low} to {high}", param=name)
    return value


def _vector(text: str) -> list[float]:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=32).digest()
    # The values are exact in float32, so that all encodings hold the same values.
    return [byte / 256 for byte in digest]


_ENCODINGS: dict[str, Callable[[list[float]], object]] = {
    "float": list,
    "base64": lambda vector: base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode(),
}


async def _send_json(send: Send, data: dict[str, Any]) -> None:
    await send_json(send, 200, orjson.dumps(data))
