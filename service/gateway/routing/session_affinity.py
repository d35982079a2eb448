"""Sessions: which expert answered the last turn of a conversation, for the next one.

A session is named by the header `x-session-id`, by the body's `prompt_cache_key`, by the first
response of a stored conversation, or by the beginning of the conversation. Names are the
tenant's own.

Each gateway remembers its sessions in memory. With a shared store, changes are written to it in
the background, and a request asks it only for a turn that the gateway does not know itself. A store
that is slow or away delays no request by more than `max_wait_ms`; then there is no session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from service.config.sessions import SessionsConfig
from service.engine.engine_interface import Message, Send
from service.errors import CoeError
from service.gateway.request.conversation_turns import TurnState, digest_of, reply_calls
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import RequestRecord
from service.gateway.routing.session_memory import (
    MAX_CALLS,
    SessionMemory,
    SessionTurn,
    Turns,
    from_value,
    last_turn,
    merged,
    to_value,
)
from service.http.prompt_endpoints import TABLE
from service.store.record_names import join_name
from service.store.volatile_store import VolatileStore
from service.task_cancellation import cancel_and_wait

log = logging.getLogger("coe.sessions")

# The bytes that a reply with tool calls holds, in any API.
_MARKERS = (b'"tool_calls"', b'"tool_use"', b'"call_id"')
# Most bytes of a whole reply that are read for tool calls.
_MAX_BODY_BYTES = 4 * 1024**2
# Most sessions that wait for being written to a store.
_MAX_WAITING = 10_000
# Tool calls of a turn by which it is found, if its session has forgotten it.
_INDEXED = 4
# Sessions that are written at the same time.
_BATCH = 32
# A store that was late so many times in a row is not asked for a while.
_LATE = 3
_PAUSE_S = 1.0
# Time for the last changes when a gateway stops.
_LAST_WRITES_S = 0.5


@dataclass(frozen=True, slots=True)
class SessionLookup:
    """The session of one request.

    Attributes:
        tenant: The tenant's name.
        name: Digest of the session's name; None where the request has no session.
        state: Where the request's conversation stands.
        last: The turn that the request goes on from; None if there is none, or it is unknown.
        certain: Whether `last` is this conversation's, rather than the session's newest turn.
        tokens: Estimated tokens of the prompt.
    """

    tenant: str = ""
    name: str | None = None
    state: TurnState = field(default_factory=TurnState)
    last: SessionTurn | None = None
    certain: bool = False
    tokens: int = 0


NO_SESSION = SessionLookup()


def session_name(request: InferenceRequest) -> str | None:
    """The digest of the name of a request's session; None without one."""
    if request.session_id:
        return digest_of("id", request.session_id)
    key = request.data.get("prompt_cache_key")
    if isinstance(key, str) and key:
        return digest_of("prompt_cache_key", key)
    if request.stored is not None and request.stored.thread is not None:
        return digest_of("thread", request.stored.thread)
    beginning = request.turn.beginning
    return beginning and digest_of("beginning", beginning)


class SessionService:
    """Finds and records the sessions of one gateway.

    Args:
        config: The section `router.sessions`.
        memory: The sessions that this gateway remembers; it outlives the config.
        store: The volatile store.
        shared: Whether other gateways use the same store.
        clock: Seconds since 1970, which all gateways agree on.
    """

    def __init__(
        self,
        config: SessionsConfig,
        memory: SessionMemory,
        store: VolatileStore,
        *,
        shared: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._memory = memory
        self._store = store
        self._shared = shared
        self._clock = clock
        # Sessions that the store does not have yet, and forgotten ones that it still has.
        self._unwritten: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._writer: asyncio.Task[None] | None = None
        self._reads: set[asyncio.Task[Turns]] = set()
        self._late = 0
        self._paused_until_s = 0.0

    async def start(self) -> None:
        """Start to write changes to the shared store."""
        if self._config.enabled and self._shared:
            self._writer = asyncio.create_task(self._write_behind())

    async def stop(self) -> None:
        """Write the last changes, if the store takes them soon, and stop the background tasks."""
        if self._writer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WRITES_S):
                    await self._written.wait()
        await cancel_and_wait(*self._reads, self._writer)

    async def find(self, request: InferenceRequest) -> SessionLookup:
        """Find the session of a request."""
        if not self._config.enabled or not TABLE[request.endpoint].converses:
            return NO_SESSION
        state = request.turn
        name = session_name(request)
        if name is None:
            return NO_SESSION
        tenant = request.tenant.name
        if state.history is None and not state.open and not _is_named(request):
            # A conversation begins: another one with the same beginning is none of its own.
            return SessionLookup(tenant, name, state, tokens=request.prompt_tokens)
        since_s = self._clock() - self._config.max_age_s
        turns = self._memory.get(tenant, name, since_s=since_s)
        last, certain = last_turn(turns, state)
        if not certain:
            # A name may have more conversations than a session has turns.
            last, certain = self._calling(tenant, state, since_s) or (last, certain)
        if self._shared and not certain:
            names = [name, *_call_names(state.calls)]
            read = await self._read(tenant, names)
            turns = merged(turns, (turn for turn in read if turn.at_s >= since_s))
            last, certain = last_turn(turns, state)
        return SessionLookup(tenant, name, state, last, certain, request.prompt_tokens)

    def _calling(
        self, tenant: str, state: TurnState, since_s: float
    ) -> tuple[SessionTurn, bool] | None:
        """The turn that made an open call, by the call's id alone."""
        for name in _call_names(state.calls):
            if held := self._memory.get(tenant, name, since_s=since_s):
                return held[0], True
        return None

    def watch(self, found: SessionLookup, record: RequestRecord, send: Send) -> Send:
        """Return a send that records which expert answers, and its tool calls."""
        return send if found.name is None else SessionSend(self, found, record, send)

    def record(self, found: SessionLookup, turn: SessionTurn) -> None:
        """Record an answered turn of a session."""
        if found.name is None:
            return
        now_s = self._clock()
        since_s = now_s - self._config.max_age_s
        held = self._memory.get(found.tenant, found.name, since_s=since_s)
        # The turn that was found may be known to another gateway only.
        known = held if found.last is None or not found.certain else (*held, found.last)
        turn = replace(turn, at_s=now_s)
        self._keep(found.tenant, found.name, merged((turn,), known), since_s)
        for name in _call_names(turn.calls):
            self._keep(found.tenant, name, (turn,), since_s)
        for name in _call_names(found.state.calls - {*turn.calls}):
            # The model has the results of these calls now.
            if self._memory.discard(found.tenant, name) and self._shared:
                self._to_write(found.tenant, name)

    def _keep(self, tenant: str, name: str, turns: Turns, since_s: float) -> None:
        most = self._config.max_sessions
        forgotten = self._memory.put(tenant, name, turns, since_s=since_s, max_sessions=most)
        if not self._shared:
            return
        for key in (*forgotten, (tenant, name)):
            self._to_write(*key)

    def _to_write(self, tenant: str, name: str) -> None:
        self._unwritten[tenant, name] = None
        self._unwritten.move_to_end((tenant, name))
        while len(self._unwritten) > _MAX_WAITING:
            self._unwritten.popitem(last=False)
        self._written.clear()
        self._wake.set()

    async def _read(self, tenant: str, names: Sequence[str]) -> Turns:
        """Read sessions from the store; empty where they are not told in time."""
        if time.monotonic() < self._paused_until_s:
            return ()
        task = asyncio.create_task(self._stored(tenant, names))
        # A call that is cancelled would cost the connection, so it ends in the background.
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)
        done, _ = await asyncio.wait({task}, timeout=self._config.max_wait_ms / 1000)
        if done:
            self._late = 0
            return task.result()
        self._late += 1
        if self._late >= _LATE:
            self._late = 0
            self._paused_until_s = time.monotonic() + _PAUSE_S
            log.warning("the volatile store is slow; requests are routed without shared sessions")
        return ()

    async def _stored(self, tenant: str, names: Sequence[str]) -> Turns:
        places = [join_name("session", tenant, name) for name in names]
        try:
            values = await asyncio.gather(*map(self._store.get, places))
        except CoeError:
            return ()
        return tuple(turn for value in values for turn in from_value(value))

    async def _write_behind(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unwritten:
                batch = [self._unwritten.popitem(last=False)[0] for _ in range(self._next_batch())]
                await asyncio.gather(*(self._write(*key) for key in batch))
            self._written.set()

    def _next_batch(self) -> int:
        return min(_BATCH, len(self._unwritten))

    async def _write(self, tenant: str, name: str) -> None:
        """Write a session to the store, together with the turns of other gateways."""
        since_s = self._clock() - self._config.max_age_s
        own = self._memory.get(tenant, name, since_s=since_s)
        where = join_name("session", tenant, name)
        with contextlib.suppress(CoeError):
            if not own:
                await self._store.delete(where)
                return
            others = from_value(await self._store.get(where))
            value = to_value(merged(own, (turn for turn in others if turn.at_s >= since_s)))
            await self._store.put(where, value, ttl_s=self._config.max_age_s)


def _call_names(calls: Iterable[str]) -> list[str]:
    """The names under which the turn of some calls is kept beside its session."""
    return [digest_of("call", call) for call in sorted(calls)[:_INDEXED]]


def _is_named(request: InferenceRequest) -> bool:
    return bool(request.session_id or request.data.get("prompt_cache_key"))


class SessionSend:
    """An ASGI send that forwards an answer, and records it as a turn of its session.

    Args:
        sessions: Records the turn.
        found: The request's session.
        record: The request's record, which knows the expert once the answer begins.
        send: Receives the answer.
    """

    def __init__(
        self, sessions: SessionService, found: SessionLookup, record: RequestRecord, send: Send
    ) -> None:
        self._sessions = sessions
        self._found = found
        self._record = record
        self._send = send
        self._answers = False
        self._streams = False
        self._body = b""
        self._calls: dict[str, None] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answers = message["status"] == 200
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            if self._answers:
                self._note()
        elif self._answers:
            # The client may send the next turn as soon as it has the call.
            self._read(message.get("body", b""), ends=not message.get("more_body", False))
        await self._send(message)

    def _read(self, body: bytes, *, ends: bool) -> None:
        if not self._streams:
            self._body += body
            if len(self._body) > _MAX_BODY_BYTES:
                self._answers = False
            elif ends and _may_call(self._body):
                self._add(reply_calls(_object(self._body)))
            return
        if not _may_call(body):
            return
        for line in body.splitlines():
            if line.startswith(b"data:") and _may_call(line):
                self._add(reply_calls(_object(line[5:])))

    def _add(self, calls: list[str]) -> None:
        new = [call for call in calls if call not in self._calls]
        if new and len(self._calls) < MAX_CALLS:
            self._calls |= dict.fromkeys(new[: MAX_CALLS - len(self._calls)])
            self._note()

    def _note(self) -> None:
        record = self._record
        self._sessions.record(
            self._found,
            SessionTurn(
                digest=self._found.state.digest,
                expert=record.expert,
                recipe=record.recipe,
                category=record.category,
                boot=record.pool,
                tokens=self._found.tokens,
                at_s=0.0,
                calls=tuple(self._calls),
                topics=record.topics,
            ),
        )


def _may_call(data: bytes) -> bool:
    return any(marker in data for marker in _MARKERS)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
