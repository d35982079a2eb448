"""The simulated engine: deterministic text at set speeds. It is for tests and load tests only.

It answers in OpenAI's formats, so that all other parts can run without a model. The
`system_fingerprint` of every answer names the engine.
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
from service.engine.base import (
    EngineObserver,
    EngineReport,
    EngineRequest,
    EngineTimings,
    LoadResult,
    Send,
    SwapResult,
)
from service.errors import (
    CoeError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownEndpointError,
)
from service.http.asgi import body_message, send_json, start_response

ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"}
)
_WORDS = ("one", "small", "answer", "from", "an", "engine", "that", "only", "plays", "a", "part")
_LOGPROB = -0.1
_FINGERPRINT = "simulated"
_WEIGHT_BYTES = 1024**3


@dataclass(slots=True)
class _Progress:
    """Progress of an answer: `answers` choices of `length` tokens each, from `first_s` on."""

    prompt_tokens: int
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
        before, self._runs = self._runs, expert
        same = self._bases.get(before, before) == self._bases.get(expert, expert)
        return SwapResult(self._options.swap_s, ok=True, method="steer" if same else "inplace")

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Forget an expert."""
        self._loaded.discard(expert)

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
            text = _prompt_text(body)
            await _send_json(
                send,
                {
                    "tokens": [len(word) for word in text.split()],
                    "count": _tokens(text),
                    "max_model_len": self._options.max_model_len,
                },
            )
        elif path == "/detokenize":
            ids = body.get("tokens")
            if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
                raise InvalidRequestError("`tokens` must be a list of integers", param="tokens")
            await _send_json(send, {"prompt": " ".join(_WORDS[i % len(_WORDS)] for i in ids)})
        elif path == "/v1/embeddings":
            await self._embed(request, body, send)
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._generate(request, body, send)
        else:
            raise UnknownEndpointError(f"the simulated engine has no {path}")

    async def _embed(self, request: EngineRequest, body: dict[str, Any], send: Send) -> None:
        given = body.get("input")
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(
                "`input` must be a string or a list of strings", param="input"
            )
        if (encode := _ENCODINGS.get(str(body.get("encoding_format") or "float"))) is None:
            raise InvalidRequestError(f"`encoding_format` must be one of {', '.join(_ENCODINGS)}")
        data = [
            {"object": "embedding", "index": i, "embedding": encode(_vector(text))}
            for i, text in enumerate(texts)
        ]
        count = sum(map(_tokens, texts))
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
        chat = request.endpoint == "/v1/chat/completions"
        prompt = _prompt_text(body)
        given = body.get("prompt") if not chat else None
        n = _integer(body, "n", 1, 1, 128) * (len(given) if isinstance(given, list) else 1)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens = (
            self._options.tokens
            if limit is None
            else _integer({"max_tokens": limit}, "max_tokens", 1, 1, 10**6)
        )
        prompt_tokens = _tokens(prompt)
        context = self._options.max_model_len
        # As in vLLM, a limit above the context is an error, and a limit above the free room is cut.
        if (limit is not None and tokens > context) or prompt_tokens >= context:
            raise PromptTooLongError(
                f"the maximum context length is {context} tokens, but "
                f"{prompt_tokens} prompt tokens and {tokens} of answer were requested",
                param="messages" if chat else "prompt",
            )
        bounded = limit is not None or tokens > context - prompt_tokens
        tokens = min(tokens, context - prompt_tokens)
        text, finish = _cut(answer_text(request.expert, prompt, tokens), body.get("stop"))
        # An answer without a limit ends by itself.
        finish = finish if bounded else "stop"
        made = _Progress(prompt_tokens, len(text), n, self._options.decode_ms / 1000)
        try:
            await self._make(request, body, send, made, text, finish)
        except asyncio.CancelledError:
            request.on_abandoned(prompt_tokens, made.tokens())
            raise

    async def _make(
        self,
        request: EngineRequest,
        body: dict[str, Any],
        send: Send,
        made: _Progress,
        text: list[str],
        finish: str,
    ) -> None:
        chat = request.endpoint == "/v1/chat/completions"
        prompt_tokens, n = made.prompt_tokens, made.answers
        began_s = time.monotonic()
        if self._options.prefill_tokens_per_s:
            await asyncio.sleep(prompt_tokens / self._options.prefill_tokens_per_s)
        if self._options.fail == "first_byte":
            self.kill("simulated death before the first byte")
        self._check_alive(request.expert)
        first_s = made.first_s = time.monotonic()
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": n * len(text),
            "total_tokens": prompt_tokens + n * len(text),
        }
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request.request_id,
            "created": int(time.time()),
            "model": request.expert,
            "system_fingerprint": _FINGERPRINT,
        }
        if body.get("stream"):
            options = body.get("stream_options") or {}
            if not isinstance(options, dict):
                raise InvalidRequestError(
                    "`stream_options` must be an object", param="stream_options"
                )
            usage_mode = "each" if options.get("continuous_usage_stats") else "last"
            await self._stream(
                send,
                head,
                text,
                finish,
                n,
                chat,
                usage,
                options.get("include_usage") and usage_mode,
            )
            self._report(request.expert, first_s - began_s, first_s, usage)
            return
        if self._options.decode_ms:
            await asyncio.sleep(len(text) * self._options.decode_ms / 1000)
            self._check_alive(request.expert)
        self._report(request.expert, first_s - began_s, first_s, usage)
        whole = "".join(text)
        message: dict[str, Any] = (
            {"message": {"role": "assistant", "content": whole}} if chat else {"text": whole}
        )
        logprobs = _logprobs(text) if chat and body.get("logprobs") else None
        choices = [
            {"index": i, **message, "logprobs": logprobs, "finish_reason": finish} for i in range(n)
        ]
        kind = "chat.completion" if chat else "text_completion"
        await _send_json(send, {**head, "object": kind, "choices": choices, "usage": usage})

    def _report(self, expert: str, prefill_s: float, first_s: float, usage: dict[str, int]) -> None:
        if self._observer is not None:
            prompt, answer = usage["prompt_tokens"], usage["completion_tokens"]
            decode_s = time.monotonic() - first_s
            self._observer.on_finished(
                EngineTimings(expert, 0.0, prefill_s, decode_s, prompt, answer)
            )

    async def _stream(
        self,
        send: Send,
        head: dict[str, Any],
        text: list[str],
        finish: str,
        n: int,
        chat: bool,
        usage: dict[str, int],
        usage_mode: str | None,
    ) -> None:
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return b"data: " + orjson.dumps({**head, "choices": choices, **more}) + b"\n\n"

        def so_far(i: int) -> dict[str, Any]:
            # As in vLLM, this is the usage of this choice.
            if usage_mode != "each":
                return {}
            counts = {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": i + 1}
            return {"usage": {**counts, "total_tokens": sum(counts.values())}}

        def piece(index: int, word: str, first: bool, last: bool) -> dict[str, Any]:
            reason = finish if last else None
            if not chat:
                return {"index": index, "text": word, "logprobs": None, "finish_reason": reason}
            delta = {"role": "assistant", "content": word} if first else {"content": word}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

        loop = asyncio.get_running_loop()
        began = loop.time()
        step_s = self._options.decode_ms / 1000
        start = start_response(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        for i, word in enumerate(text or [""]):
            if step_s and (wait_s := began + i * step_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if i == 0:
                await send(start)
            if i == 1 and self._options.fail == "mid_stream":
                self.kill("simulated death in mid-stream")
            if self._dead is not None:
                await _send_stream_error(send, EngineDeadError(f"the engine died: {self._dead}"))
                return
            last = i >= len(text) - 1
            chunk = b"".join(event([piece(j, word, i == 0, last)], **so_far(i)) for j in range(n))
            await send(body_message(chunk, more=True))
        tail = event([], usage=usage) if usage_mode else b""
        await send(body_message(tail + b"data: [DONE]\n\n"))


def answer_text(expert: str, prompt: str, tokens: int) -> list[str]:
    """Return the words of an expert's answer.

    Equal prompts to the same expert give equal answers. Experts answer differently.
    """
    seed = hashlib.blake2b(f"{expert}\0{prompt}".encode("utf-8", "replace"), digest_size=8)
    at = int.from_bytes(seed.digest(), "big")
    words = [f"{expert}:"]
    words += [" " + _WORDS[(at + i * 7) % len(_WORDS)] for i in range(tokens - 1)]
    return words[:tokens]


def _cut(text: list[str], stop: object) -> tuple[list[str], str]:
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    whole = "".join(text)
    ends = [whole.find(s) for s in stops if isinstance(s, str) and s and s in whole]
    if not ends:
        return text, "length"
    kept, left = [], min(ends)
    for word in text:
        if left <= 0:
            break
        kept.append(word[:left])
        left -= len(word)
    return kept, "stop"


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


def _prompt_text(body: dict[str, Any]) -> str:
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise InvalidRequestError(
                "`messages` must be a list with at least one message", param="messages"
            )
        parts = []
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or "role" not in message:
                raise InvalidRequestError(
                    f"`messages[{i}]` must be an object with a role", param="messages"
                )
            content = message.get("content") or ""
            parts.append(content if isinstance(content, str) else orjson.dumps(content).decode())
        return "\n".join(parts)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
        return "\n".join(prompt)
    if isinstance(prompt, str) and prompt:
        return prompt
    raise InvalidRequestError("`messages` or `prompt` is needed", param="messages")


def _logprobs(words: list[str]) -> dict[str, Any]:
    """Return log probabilities as if every word had the same probability."""
    return {
        "content": [
            {"token": word, "logprob": _LOGPROB, "bytes": list(word.encode()), "top_logprobs": []}
            for word in words
        ]
    }


def _integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(f"`{name}` must be an integer from {low} to {high}", param=name)
    return value


def _tokens(text: str) -> int:
    return max(1, len(text.split()))


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


async def _send_stream_error(send: Send, error: CoeError) -> None:
    detail = {"message": error.message, "type": "server_error", "param": None, "code": error.code}
    event = b"data: " + orjson.dumps({"error": detail}) + b"\n\ndata: [DONE]\n\n"
    await send(body_message(event))
