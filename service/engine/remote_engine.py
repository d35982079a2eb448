"""The remote engine: a model behind another provider's OpenAI-compatible API.

It runs in the gateway, without a pool. Its API key comes from the environment. The key is sent only
in the Authorization header of requests to the upstream.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from service.config import RemoteConfig
from service.engine.audio_upload import audio_upload
from service.engine.cache_salt import combine_salts
from service.engine.deferred_response_start import openai_error
from service.engine.engine_interface import EngineReport, EngineRequest, Send
from service.errors import (
    ExpertFailedError,
    InvalidRequestError,
    UnknownEndpointError,
    UpstreamError,
)
from service.http.asgi_helpers import body_message, send_json, start_response
from service.http.prompt_endpoints import AUDIO, UPSTREAM_PATHS
from service.http.reply_depth import check_events, check_reply
from service.http.reply_model_name import rename, rename_lines

ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"}
    | {"/v1/rerank", "/v1/score", "/v1/classify", AUDIO}
)
# Endpoints whose requests may have vLLM's field `cache_salt`.
_SALTED = ENDPOINTS - {"/v1/messages", AUDIO}

_JSON = re.compile(r"\s*application/(?:[\w.-]+\+)?json\b", re.IGNORECASE)
_EVENT = re.compile(rb"\s*(?:data|event|id|retry)?:")
_ANSWER_BYTES = 64 * 1024**2
_LINE_BYTES = 8 * 1024**2


class RemoteEngine:
    """A client of one upstream, for one expert and its variants."""

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        base = config.url.rstrip("/")
        self._base = base.removesuffix("/v1")
        self._session: aiohttp.ClientSession | None = None
        self._key: str | None = None

    async def start(self) -> EngineReport:
        """Read the key and open the connection pool. Raises ExpertFailedError without a key."""
        name = self._config.api_key_env
        if name is not None:
            self._key = os.environ.get(name)
            if not self._key:
                raise ExpertFailedError(
                    f"the environment variable {name} that should hold its key is not set",
                    retry_after_s=60,
                )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s),
            auto_decompress=True,
            trust_env=False,
        )
        return EngineReport("remote", 0, ENDPOINTS)

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Do nothing, because the upstream has the weights."""

    async def unload(self, expert: str) -> None:
        """Do nothing, because nothing was loaded."""

    def failure(self) -> str | None:
        """Return None, because this engine has no process that could die."""
        return None

    async def stop(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def run(self, request: EngineRequest, send: Send) -> None:
        expert = request.expert
        if request.endpoint not in ENDPOINTS:
            raise UnknownEndpointError(f"expert {expert!r} is remote and has no {request.endpoint}")
        if self._session is None:
            raise ExpertFailedError(f"expert {expert!r} is not connected")
        headers = {
            **request.trace,
            "content-type": "application/json",
            "accept-encoding": "identity",
        }
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        if request.endpoint == AUDIO:
            upload = await asyncio.to_thread(audio_upload, request.body, self._config.model)
            headers["content-type"], body = upload.content_type, upload.body
        else:
            body = self._addressed(request)
        path = UPSTREAM_PATHS.get(request.endpoint, request.endpoint)
        started = False
        try:
            async with self._session.post(
                self._base + path, data=body, headers=headers, allow_redirects=False
            ) as reply:
                if reply.status >= 300:
                    await self._refused(reply, send, expert)
                    return
                content_type = reply.headers.get("content-type", "application/json")
                head = start_response(
                    reply.status, [(b"content-type", content_type.encode("latin-1"))]
                )
                if request.endpoint == AUDIO and not _JSON.match(content_type):
                    text = await _bounded(reply)  # subtitles, or a plain text
                    started = True
                    await send(head)
                    await send(body_message(text))
                    return
                if not content_type.startswith("text/event-stream"):
                    answer = _answer(await _bounded(reply), expert)
                    rename(answer, expert)
                    started = True
                    await send(head)
                    await send(body_message(orjson.dumps(answer)))
                    return
                rest = b""
                async for lines in self._lines(reply, expert):
                    check_events(lines, expert)
                    if not lines.endswith(b"\n"):
                        rest = lines
                        continue
                    if not started and not _EVENT.match(lines):
                        raise _nonsense(expert, "no stream of events")
                    if not started:
                        started = True
                        await send(head)
                    await send(body_message(rename_lines(lines, expert), more=True))
                if not started:
                    raise UpstreamError(f"expert {expert!r}: its endpoint sent an empty answer")
                await send(body_message(rename_lines(rest, expert)))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # Only the class of the error is shown, because its text may contain the URL.
            what = f"expert {expert!r}: its endpoint can't be reached ({type(error).__name__})"
            raise UpstreamError(what, unreachable=not started) from None

    async def _lines(self, reply: aiohttp.ClientResponse, expert: str) -> AsyncIterator[bytes]:
        """Yield whole lines of a stream as they arrive, and any incomplete line at the end.

        Raises:
            UpstreamError: A line is too long, or the stream stalls after its beginning.
        """
        rest = b""
        pieces = reply.content.iter_any()
        begun = False
        while True:
            # The request's own deadline bounds the time to the first chunk.
            limit = asyncio.timeout(self._config.stall_timeout_s if begun else None)
            try:
                async with limit:
                    piece = await anext(pieces, b"")
            except TimeoutError:
                if not limit.expired():
                    raise
                raise UpstreamError(
                    f"expert {expert!r}: its endpoint sent nothing for "
                    f"{self._config.stall_timeout_s:g} s amid an answer"
                ) from None
            if not piece:
                break
            end = piece.rfind(b"\n") + 1
            if end == 0:
                rest += piece
                if len(rest) > _LINE_BYTES:
                    raise _nonsense(expert, "a line without an end")
                continue
            lines, rest = rest + piece[:end], piece[end:]
            begun = True
            yield lines
        if rest:
            yield rest

    def _addressed(self, request: EngineRequest) -> bytes:
        try:
            data = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
        options = data.get("stream_options") if isinstance(data, dict) else None
        if isinstance(options, dict) and "continuous_usage_stats" in options:
            # Only vLLM knows this field. Other servers would refuse an unknown field.
            known = {k: v for k, v in options.items() if k != "continuous_usage_stats"}
            data = {**data, "stream_options": known}
        salt = request.cache_salt
        if salt and isinstance(data, dict):
            given = data.get("cache_salt")
            # Only the config can tell whether the upstream knows the field.
            if given or (self._config.cache_salt and request.endpoint in _SALTED):
                data = {**data, "cache_salt": combine_salts(salt, given)}
        try:
            return orjson.dumps({**data, "model": self._config.model})
        except orjson.JSONEncodeError:
            raise InvalidRequestError("the body is nested too deep") from None

    async def _refused(self, reply: aiohttp.ClientResponse, send: Send, expert: str) -> None:
        body = await reply.content.read(65536)
        if reply.status in (401, 403) or reply.status < 400:
            raise UpstreamError(
                f"expert {expert!r}: its endpoint refused us with status {reply.status}",
                limited=reply.status >= 400,
            )
        if reply.status >= 500 or reply.status == 429:
            raise UpstreamError(
                f"expert {expert!r}: its endpoint answered with status {reply.status}",
                status=503 if reply.status in (429, 503) else 502,
                retry_after_s=_seconds(reply.headers.get("retry-after")),
                limited=reply.status == 429,
            )
        await send_json(send, reply.status, openai_error(reply.status, body))


async def _bounded(reply: aiohttp.ClientResponse) -> bytes:
    """Read a whole answer, up to the size that a gateway can hold."""
    parts = bytearray()
    async for piece in reply.content.iter_any():
        parts += piece
        if len(parts) > _ANSWER_BYTES:
            raise UpstreamError("a remote expert's endpoint sent more than any answer has")
    return bytes(parts)


def _answer(body: bytes, expert: str) -> dict[str, Any]:
    """Parse an answer of any kind.

    Raises:
        UpstreamError: The answer is not a JSON object, or is nested too deep.
    """
    check_reply(body, expert)
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        payload = None
    if not isinstance(payload, dict):
        raise _nonsense(expert, "no JSON object")
    return payload


def _nonsense(expert: str, what: str) -> UpstreamError:
    return UpstreamError(f"expert {expert!r}: the reply of its endpoint is {what}")


def _seconds(retry_after: str | None) -> float:
    """Parse an upstream's Retry-After, if it is a plain number of seconds."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 1.0
