"""Caches answers for requests that opt in. No tenant gets an answer of another tenant.

The exact key is a hash of the tenant, the endpoint, the requested model, every parameter, bound and
message, and the experts' config. The hash also selects one of `max_entries` places for the answer.
A new answer replaces the old answer in its place, so the number of answers has a bound.

Similar questions are found on shelves. A shelf lists the latest questions that differ only in their
last message, with the places of their answers.

The store holds answers without encryption, and may lose them at any time. A store that can't be
reached counts as a miss.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from service.config import CacheConfig, Config
from service.engine.engine_interface import Message, Send
from service.errors import CoeError, StoreUnavailableError
from service.gateway.cache.text_similarity import (
    MOST_CHARACTERS,
    canonical_form,
    same_words,
    similarity,
)
from service.gateway.request.parsing import InferenceRequest
from service.http.asgi_helpers import STREAM_HEADERS, send_response
from service.http.error_formats import Dialect, dialect_of
from service.http.token_usage import reply_usage, usage_of
from service.moe.virtual_expert_profiles import profile_digests
from service.store.record_names import join_name
from service.store.volatile_store import VolatileStore
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

log = logging.getLogger("coe.cache")

_ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"}
    | {"/v1/rerank", "/v1/score", "/v1/classify"}
)
# Fields about the sender, which do not change the answer. `stream_options` isn't among them: a
# stream is cached with its chunks, and a client may fail on a chunk of usage that it did not want.
_ASIDE = frozenset({"user", "metadata", "safety_identifier"})
# Endpoints whose replies repeat those fields.
_ECHOING = frozenset({"/v1/responses"})
_RANK = {"off": 0, "exact": 1, "similar": 2}
_SHELF = 16
_DONE = b"data: [DONE]"
# The finish reasons in a body. JSON escapes quotes inside of strings, so this matches only keys.
_ENDS = re.compile(rb'"finish_reason"\s*:\s*"([^"\\]*)"')
_WHOLE = frozenset({b"stop", b"tool_calls", b"function_call"})
# Anthropic's stop reasons of a complete answer.
_WHOLE_MESSAGE = frozenset({"end_turn", "stop_sequence", "tool_use"})


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A cached answer.

    Attributes:
        kind: `exact` or `similar`.
        expert: The expert that made the answer.
        content_type: The content type of the answer.
        body: The body of the answer.
        similarity: Similarity of the two questions in [0, 1]; 1 for an identical request.
    """

    kind: str
    expert: str
    content_type: str
    body: bytes
    similarity: float


@dataclass(frozen=True, slots=True)
class CacheSearch:
    """The keys of a lookup.

    Attributes:
        settings: The tenant's cache config.
        tenant: The tenant's name.
        place: The store's key of the answer.
        key: The exact key.
        shelf: The key of the shelf; empty without a lookup of similar questions.
        question: The last message; empty without a lookup of similar questions.
        kind: `exact` or `similar`.
    """

    settings: CacheConfig
    tenant: str
    place: str
    key: str
    shelf: str
    question: str
    kind: str


class ResponseCache:
    """The response cache of one gateway.

    Args:
        config: The config.
        store: Keeps the answers.
        registry: Counts hits and misses.
        added: When each expert was added that an admin has added, in seconds since 1970. One that
            is added again may have other weights in the same folder.
    """

    def __init__(
        self,
        config: Config,
        store: VolatileStore,
        registry: MetricsRegistry | None = None,
        added: Mapping[str, float] | None = None,
    ) -> None:
        self._settings = {
            name: tenant.cache
            for name, tenant in config.tenants.items()
            if tenant.cache.mode != "off"
        }
        self._store = store
        self.registry = registry
        experts = config.model_dump_json(include={"experts", "pools", "router", "recipes"})
        # The content of a steering profile may change under the same name.
        made_by = experts + repr(sorted(profile_digests(config).items()))
        if added:
            made_by += repr(sorted(added.items()))
        self._made_by = hashlib.blake2b(made_by.encode(), digest_size=8).hexdigest()

    async def begin(self, request: InferenceRequest, send: Send) -> CacheSession:
        """Look for a request's answer. After a miss, send the answer to `CacheSession.send`."""
        search = self.search(request)
        if search is None:
            return CacheSession(self, None, None, send)
        hit = await self.look(search, request)
        if hit is not None:
            return CacheSession(self, search, hit, send)
        return CacheSession(
            self,
            search,
            None,
            RecordingSend(send, search.settings.max_entry_bytes, dialect_of(request.endpoint)),
        )

    def search(self, request: InferenceRequest) -> CacheSearch | None:
        """The keys of a request; None if the client or the tenant doesn't use the cache."""
        settings = self._settings.get(request.tenant.name)
        if settings is None or request.cache == "off" or request.endpoint not in _ENDPOINTS:
            return None
        kind = min(request.cache, settings.mode, key=_RANK.__getitem__)
        aside = frozenset() if request.endpoint in _ECHOING else _ASIDE
        data = {name: value for name, value in request.data.items() if name not in aside}
        tenant = request.tenant.name
        # The request's bounds are part of the key, because they influence the choice of expert.
        bounds = [
            request.max_cost,
            request.deadline_ms if request.own_deadline else None,
            request.min_quality,
            None if request.allow is None else sorted(request.allow),
            sorted(request.deny),
        ]
        key = self._hash(tenant, request.endpoint, data, bounds)
        question, rest = _question(request, data) if kind == "similar" else ("", {})
        shelf = self._hash(tenant, request.endpoint, rest, bounds) if question else ""
        number = int(key, 16) % settings.max_entries
        where = join_name("cache", tenant, "answer", str(number))
        return CacheSearch(settings, tenant, where, key, shelf, question, kind)

    def _hash(self, *what: Any) -> str:
        data = orjson.dumps([self._made_by, *what], option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    async def look(self, search: CacheSearch, request: InferenceRequest) -> CacheHit | None:
        """Find the cached answer for a request; None if there is none."""
        try:
            hit = await self._exact(search, request)
            if hit is None and search.question:
                hit = await self._alike(search, request)
        except StoreUnavailableError:
            hit = None
        self._count("exact", hit is not None and hit.kind == "exact")
        if search.question and (hit is None or hit.kind == "similar"):
            self._count("similar", hit is not None)
        return hit

    def _count(self, kind: str, found: bool) -> None:
        if self.registry is not None:
            self.registry.add(
                metric_declarations.CACHE_LOOKUPS, 1, kind, "hit" if found else "miss"
            )

    async def _exact(self, search: CacheSearch, request: InferenceRequest) -> CacheHit | None:
        return _read(await self._store.get(search.place), search.key, request, "exact", 1.0)

    async def _alike(self, search: CacheSearch, request: InferenceRequest) -> CacheHit | None:
        words = canonical_form(search.question)
        best: tuple[float, Mapping[str, str]] | None = None
        for item in _shelf(await self._store.get(self._shelf_name(search))):
            if item["shelf"] == search.shelf and same_words(
                words, canonical_form(item["question"])
            ):
                how = similarity(search.question, item["question"])
                if how >= search.settings.threshold and (best is None or how > best[0]):
                    best = how, item
        if best is None:
            return None
        how, found = best
        kept = await self._store.get(found["place"])
        return _read(kept, found["key"], request, "similar", how)

    def _shelf_name(self, search: CacheSearch) -> str:
        # The number of shelves has the same bound as the number of answers.
        number = int(search.shelf, 16) % search.settings.max_entries
        return join_name("cache", search.tenant, "shelf", str(number))

    async def keep(
        self, search: CacheSearch, recorded: RecordingSend, *, by_own_bound: bool
    ) -> None:
        """Store a complete answer. A store that can't be reached raises no error.

        Args:
            search: The keys of the request.
            recorded: The recorded answer.
            by_own_bound: Whether only the request's own length limit can have cut the answer. An
                answer that was cut by a budget, `max_cost` or a context is not stored.
        """
        body = recorded.whole(by_own_bound=by_own_bound)
        if body is None:
            return
        value = orjson.dumps(
            {
                "key": search.key,
                "expert": recorded.expert,
                "type": recorded.content_type,
                "body": base64.b85encode(free_of_charge(body, recorded.content_type)).decode(),
            }
        )
        ttl_s = search.settings.ttl_s
        try:
            await self._store.put(search.place, value, ttl_s=ttl_s)
            if search.question:
                name = self._shelf_name(search)
                entry = {
                    "shelf": search.shelf,
                    "question": search.question,
                    "key": search.key,
                    "place": search.place,
                }
                others = [
                    item
                    for item in _shelf(await self._store.get(name))
                    if item["key"] != search.key and item["shelf"] == search.shelf
                ]
                await self._store.put(
                    name, orjson.dumps([entry, *others[: _SHELF - 1]]), ttl_s=ttl_s
                )
        except StoreUnavailableError:
            return
        except CoeError as error:
            log.warning("cannot cache an answer: %s", error.code)


class RecordingSend:
    """An ASGI send that forwards an answer, and records it while it can be cached."""

    def __init__(self, send: Send, most_bytes: int, dialect: Dialect = Dialect.CHAT) -> None:
        self._send = send
        self._most_bytes = most_bytes
        self._dialect = dialect
        self._parts: list[bytes] = []
        self._size = 0
        self._whole = False
        self.expert = ""
        self.content_type = ""
        self._good = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._good = message["status"] == 200
            for name, value in message["headers"]:
                if name == b"content-type":
                    self.content_type = value.decode("latin-1")
                elif name == b"x-coe-expert":
                    self.expert = value.decode("latin-1")
        elif self._good:
            body = message.get("body", b"")
            self._size += len(body)
            self._good = self._size <= self._most_bytes
            self._parts.append(body)
            self._whole = not message.get("more_body", False)
            if not self._good:
                self._parts.clear()
        await self._send(message)

    def whole(self, *, by_own_bound: bool) -> bytes | None:
        """The body of a complete answer; None if it must not be cached.

        Args:
            by_own_bound: Whether only the request's own length limit can have cut the answer.
        """
        if not (self._good and self._whole):
            return None
        body = b"".join(self._parts)
        end = _END_OF[self._dialect](body, self.content_type.startswith("text/event-stream"))
        sound = end is AnswerEnd.WHOLE or (by_own_bound and end is AnswerEnd.CUT)
        return body if sound else None


class AnswerEnd(Enum):
    """How a reply ended.

    Attributes:
        WHOLE: The answer is complete.
        CUT: A bound on its length cut the answer.
        BROKEN: Anything else, such as an error or a stream without its last event.
    """

    WHOLE = "whole"
    CUT = "cut"
    BROKEN = "broken"


def _end_of_chat(body: bytes, streams: bool) -> AnswerEnd:
    """How a reply of chat, completions or embeddings ended."""
    if streams and (not body.rstrip().endswith(_DONE) or b'data: {"error"' in body):
        return AnswerEnd.BROKEN
    ends = set(_ENDS.findall(body))
    if ends <= _WHOLE:
        return AnswerEnd.WHOLE
    return AnswerEnd.CUT if ends <= _WHOLE | {b"length"} else AnswerEnd.BROKEN


def _end_of_message(body: bytes, streams: bool) -> AnswerEnd:
    """How a reply of Anthropic's Messages ended."""
    if streams:
        events = list(_events(body))
        kinds = [event.get("type") for event in events]
        if kinds[-1:] != ["message_stop"] or "error" in kinds:
            return AnswerEnd.BROKEN
        deltas = [event.get("delta") for event in events if event.get("type") == "message_delta"]
        holder = deltas[-1] if deltas else None
    else:
        holder = _object(body)
    reason = holder.get("stop_reason") if isinstance(holder, dict) else None
    if not isinstance(reason, str):
        return AnswerEnd.BROKEN
    if reason in _WHOLE_MESSAGE:
        return AnswerEnd.WHOLE
    return AnswerEnd.CUT if reason == "max_tokens" else AnswerEnd.BROKEN


def _end_of_response(body: bytes, streams: bool) -> AnswerEnd:
    """How a reply of OpenAI's Responses ended."""
    reply: Any = _object(body)
    if streams:
        events = list(_events(body))
        failed = any(event.get("type") == "error" for event in events)
        reply = events[-1].get("response") if events and not failed else None
    if not isinstance(reply, dict):
        return AnswerEnd.BROKEN
    if reply.get("status") == "completed":
        return AnswerEnd.WHOLE
    cut = {"reason": "max_output_tokens"}
    if reply.get("status") == "incomplete" and reply.get("incomplete_details") == cut:
        return AnswerEnd.CUT
    return AnswerEnd.BROKEN


_END_OF: dict[Dialect, Callable[[bytes, bool], AnswerEnd]] = {
    Dialect.CHAT: _end_of_chat,
    Dialect.MESSAGES: _end_of_message,
    Dialect.RESPONSES: _end_of_response,
}


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    """The events of a stream; an event that can't be parsed is empty."""
    for line in body.splitlines():
        if line.startswith(b"data:"):
            yield _object(line[5:])


@dataclass(frozen=True, slots=True)
class CacheSession:
    """The use of the cache by one request.

    Attributes:
        cache: The cache.
        search: The keys of the request; None if it doesn't use the cache.
        hit: The cached answer; None after a miss.
        send: Receives the answer, and records it after a miss.
    """

    cache: ResponseCache
    search: CacheSearch | None
    hit: CacheHit | None
    send: Send

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The response headers about the cache."""
        if self.search is None:
            return []
        if self.hit is None:
            return [(b"x-coe-cache", b"miss")]
        headers = [(b"x-coe-cache", self.hit.kind.encode())]
        if self.hit.kind == "similar":
            headers.append((b"x-coe-cache-similarity", f"{self.hit.similarity:.3f}".encode()))
        return headers

    async def send_hit(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the cached answer."""
        assert self.hit is not None
        head = [
            (b"content-type", self.hit.content_type.encode("latin-1")),
            (b"content-length", str(len(self.hit.body)).encode()),
            (b"x-coe-expert", self.hit.expert.encode()),
            *headers,
        ]
        if self.hit.content_type.startswith("text/event-stream"):
            head += STREAM_HEADERS
        await send_response(self.send, 200, head, self.hit.body)

    async def store_answer(self, *, by_own_bound: bool) -> None:
        """Store the recorded answer, if it can be cached.

        Args:
            by_own_bound: Whether only the request's own length limit can have cut the answer.
        """
        if self.search is not None and isinstance(self.send, RecordingSend):
            await self.cache.keep(self.search, self.send, by_own_bound=by_own_bound)


def free_of_charge(body: bytes, content_type: str) -> bytes:
    """Return an answer with a `usage.coe` for the cache, with cost 0 and no calls.

    Costs and times of the first answer do not hold for a cached answer.
    """
    if b'"coe"' not in body:
        return body
    if content_type.startswith("text/event-stream"):
        return b"".join(map(_free_line, body.splitlines(keepends=True)))
    usage = reply_usage(body)
    if usage is None:
        return body
    reported = orjson.loads(body[usage.value : usage.end])
    return body[: usage.value] + orjson.dumps(_free(reported)) + body[usage.end :]


def _free_line(line: bytes) -> bytes:
    if not line.startswith(b"data:") or b'"coe"' not in line:
        return line
    try:
        event = orjson.loads(line[5:])
    except orjson.JSONDecodeError:
        return line
    usage = usage_of(event) if isinstance(event, dict) else None
    if usage is None:
        return line
    usage |= _free(usage)
    return b"data: " + orjson.dumps(event) + b"\n"


def _free(usage: Mapping[str, Any]) -> dict[str, Any]:
    details = usage.get("coe")
    if not isinstance(details, dict):
        return dict(usage)
    kept = {name: value for name, value in details.items() if name in ("expert", "recipe")}
    return {**usage, "coe": {**kept, "cost": 0.0, "calls": [], "cached": True}}


def _question(request: InferenceRequest, data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split a request into the user's last message and the rest.

    Both are empty if the last message is not plain text of the user, or if there are tools.
    """
    messages = data.get("messages")
    if request.endpoint != "/v1/chat/completions" or not isinstance(messages, list) or not messages:
        return "", {}
    last = messages[-1]
    if data.get("tools") or last.get("role") != "user" or last.keys() != {"role", "content"}:
        return "", {}
    text = last["content"]
    if not isinstance(text, str) or not 0 < len(text) <= MOST_CHARACTERS:
        return "", {}
    return text, {**data, "messages": messages[:-1]}


def _shelf(value: bytes | None) -> list[dict[str, str]]:
    if value is None:
        return []
    found: list[dict[str, str]] = orjson.loads(value)
    return found


def _read(
    value: bytes | None, key: str, request: InferenceRequest, kind: str, how: float
) -> CacheHit | None:
    if value is None:
        return None
    kept = orjson.loads(value)
    # Another answer may have replaced it, or the API key may have lost access to the expert.
    if kept["key"] != key or not request.tenant.may_ask(kept["expert"]):
        return None
    return CacheHit(
        kind, kept["expert"], kept["type"], base64.b85decode(kept["body"]), round(how, 4)
    )
