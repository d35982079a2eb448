"""Carrying one request to whoever answers it, and the answer back.

Until the first byte has gone to the client, a fault sends the request to the next
best option; afterwards it ends the stream with an SSE error event.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import orjson

from service.api.body import Asked
from service.api.plan import Plan
from service.broker.choice import Option, PoolView, Wish, failure_reason, home, options, unmet
from service.engine.protocol import Engine, EngineRequest, Message, Send
from service.errors import (
    CoeError,
    DeadlineExceeded,
    EngineDead,
    ExpertFailed,
    OverCapacity,
    PoolGone,
    Unavailable,
    UpstreamError,
)
from service.link.call import ENGINE_MS, QUEUE_MS, SWAP_MS, Call
from service.link.client import PoolLink, PoolReply
from service.link.directory import Directory
from service.link.faults import FAULT_HEADER, sse_event

if TYPE_CHECKING:
    from service.telemetry.traces import Trace

# The pool enforces the deadline; the gateway only sees to it that a pool that
# hangs can't keep a client for ever.
_GRACE_S = 1.0
_RETRIED = frozenset({"draining", "engine_dead", "over_capacity", "expert_failed", "pool_gone"})
_TRIES_PER_POOL = 2
_TELL_S = 0.25
_USUAL_TOKENS = 64
_LONG_TOKENS = 512


@dataclass(slots=True)
class Passage:
    """What became of one request, for headers, metrics and the log.

    `predicted_s`: the wait that was expected of the option that answered; `first_byte_at_s`:
    by `time.monotonic`; `failed`: attempts that did before the first byte, as (expert, code).
    """

    expert: str = ""
    recipe: str = "single"
    local: bool = False
    status: int = 0
    queue_ms: float = 0.0
    swap_ms: float = 0.0
    engine_ms: float = 0.0
    predicted_s: float = 0.0
    first_byte_at_s: float = 0.0
    attempts: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    outcome: str = "ok"
    trace: Trace | None = None
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)


class Relay:
    """Carries requests. `wake` asks for a pool that holds an expert where none runs."""

    def __init__(
        self,
        directory: Directory,
        remotes: dict[str, RemoteSeat],
        wake: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._remotes = remotes
        self._remote_names = frozenset(remotes)
        self._wake = wake
        self._unmet: dict[str, float] = {}
        self._telling: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Say no more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    async def carry(
        self,
        asked: Asked,
        plan: Plan,
        headers: list[tuple[bytes, bytes]],
        send: Send,
        passage: Passage,
    ) -> None:
        """Answer a request. Raises CoeError while nothing has been sent."""
        deadline_s = time.monotonic() + asked.deadline_ms / 1000
        reply = _Reply(send, headers, passage)
        fault: CoeError | None = None
        while True:
            option = self._next(asked, plan, passage, fault)
            if option is None:
                await self._wait_for_pool(plan, deadline_s)
                continue
            passage.expert = option.expert
            passage.local = option.boot is not None
            passage.predicted_s = option.wait_s
            passage.attempts += 1
            passage.tried[option.expert, option.boot or ""] += 1
            try:
                with _traced(passage.trace, option, asked) as trace:
                    await self._attempt(option, asked, deadline_s, reply, trace)
                return
            except (Unavailable, UpstreamError) as error:
                if reply.started:
                    await reply.break_off(error)
                    return
                fault = error
                if isinstance(error, DeadlineExceeded):
                    raise
                passage.failed.append((option.expert, error.code))

    def candidates(self, asked: Asked, plan: Plan) -> list[Option]:
        """Every way to answer this now, best first. Sends nothing."""
        return options(plan.wish(self._tokens(asked)), self._remote_names, self.views())

    def views(self) -> list[PoolView]:
        """What is known of every pool, with this gateway's own unacknowledged requests."""
        now_s = time.monotonic()
        return [
            PoolView(
                link.address.boot,
                link.snapshot,
                link.age_s(now_s),
                link.unseen(),
            )
            for link in self._directory.links()
            if link.snapshot is not None
        ]

    def context(self, expert: str) -> int:
        """An expert's context in tokens, the greatest that any pool tells; 0: not known."""
        told = (view.snapshot.experts.get(expert) for view in self.views())
        return max((state.max_model_len for state in told if state is not None), default=0)

    def _next(
        self, asked: Asked, plan: Plan, passage: Passage, fault: CoeError | None
    ) -> Option | None:
        """The best option left. None: wait for a pool. Raises when there is no hope."""
        views = self.views()
        wish = plan.wish(self._tokens(asked))
        left = [
            option
            for option in options(wish, self._remote_names, views)
            if passage.tried[option.expert, option.boot or ""] < self._tries(fault)
        ]
        if left:
            # After a fault, somebody else first.
            chosen = min(left, key=lambda o: passage.tried[o.expert, o.boot or ""])
            if not passage.attempts:
                self._wake_better(wish, chosen, views)
                self._note_unmet(unmet(wish, chosen, views))
            return chosen
        if fault is not None and not isinstance(fault, (PoolGone, EngineDead)):
            raise fault
        if isinstance(fault, EngineDead) and any(_has_any(plan, view) for view in views):
            # The pool is there, and its next engine died of this request as well.
            raise fault
        if passage.attempts >= 2 * _TRIES_PER_POOL and fault is not None:
            raise fault
        if (reason := failure_reason(plan.preference[0], views)) is not None:
            raise ExpertFailed(
                f"expert {plan.preference[0]!r} could not be loaded: {reason}", retry_after_s=30
            )
        return None

    @staticmethod
    def _tokens(asked: Asked) -> int:
        """About how long the answer will be: what was asked for, within reason."""
        for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
            given = asked.data.get(name)
            if isinstance(given, int) and given > 0:
                return min(given, _LONG_TOKENS)
        return _USUAL_TOKENS

    def _wake_better(self, wish: Wish, chosen: Option, views: list[PoolView]) -> None:
        """Ask for a pool of an expert worth more than the chosen one that no pool has now."""
        there = {name for view in views for name in view.snapshot.experts} | self._remote_names
        absent = [name for name in wish.quality if name not in there]
        if absent:
            best = max(absent, key=lambda name: wish.quality[name])
            if wish.quality[best] > chosen.utility:
                self._wake(best)

    def _note_unmet(self, missed: tuple[str, float] | None) -> None:
        if missed is None:
            return
        expert, amount = missed
        self._unmet[expert] = self._unmet.get(expert, 0.0) + amount
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_unmet())

    async def _tell_unmet(self) -> None:
        """Send what has added up, each expert's to the one pool that should load it."""
        await asyncio.sleep(_TELL_S)
        wanted, self._unmet = self._unmet, {}
        views = self.views()
        by_pool: dict[str, dict[str, float]] = {}
        for expert, amount in wanted.items():
            boot = home(expert, views)
            if boot is not None:
                by_pool.setdefault(boot, {})[expert] = amount
        for boot, amounts in by_pool.items():
            # A pool that has just gone needs no telling.
            with suppress(PoolGone):
                await self._link(boot).demand(amounts)

    @staticmethod
    def _tries(fault: CoeError | None) -> int:
        # The same pool again only where its engine died: it is starting another.
        return _TRIES_PER_POOL if isinstance(fault, (EngineDead, PoolGone)) else 1

    async def _wait_for_pool(self, plan: Plan, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise Unavailable(
                f"no running pool holds expert {plan.preference[0]!r}", retry_after_s=5
            )
        self._wake(plan.preference[0])
        await self._directory.change(min(left_s, 1.0))

    async def _attempt(
        self,
        option: Option,
        asked: Asked,
        deadline_s: float,
        reply: _Reply,
        trace: Mapping[str, str],
    ) -> None:
        left_ms = max(1, int((deadline_s - time.monotonic()) * 1000))
        body = asked.body_for(option.expert)
        remote = option.boot is None
        limit = asyncio.timeout(left_ms / 1000 + (0 if remote else _GRACE_S))
        # Never the one of an attempt before: that has ended.
        reply.first_byte_limit = limit if remote and asked.stream else None
        try:
            async with limit:
                if option.boot is None:
                    seat = self._remotes[option.expert]
                    await seat.run(
                        EngineRequest(asked.endpoint, option.expert, body, asked.request_id, trace),
                        reply,
                    )
                    return
                link = self._link(option.boot)
                call = Call(
                    endpoint=asked.endpoint,
                    expert=option.expert,
                    request_id=asked.request_id,
                    deadline_ms=left_ms,
                    stream=asked.stream,
                    gateway=self._directory.gateway,
                    seq=link.next_seq(option.expert),
                    tenant=asked.tenant,
                    trace=trace,
                )
                async with link.call(call, body) as answer:
                    await self._pass_on(answer, asked, limit, reply)
        except TimeoutError:
            if not limit.expired():
                raise
            raise _too_late(asked) from None

    def _link(self, boot: str) -> PoolLink:
        for link in self._directory.links():
            if link.address.boot == boot:
                return link
        raise PoolGone("the pool has just gone")

    async def _pass_on(
        self, answer: PoolReply, asked: Asked, limit: asyncio.Timeout, reply: _Reply
    ) -> None:
        fault = answer.headers.get(FAULT_HEADER.decode())
        if fault == DeadlineExceeded.code:
            # In the client's own figure: the pool knows only what was left of it.
            raise _too_late(asked)
        if fault in _RETRIED:
            raise _fault_from(fault, await _whole(answer), answer.headers.get("retry-after"))
        content_type = answer.headers.get("content-type", "application/json").encode("latin-1")
        head = [(b"content-type", content_type)]
        for name in ("retry-after", "x-coe-fault"):
            if name in answer.headers:
                head.append((name.encode(), answer.headers[name].encode("latin-1")))
        reply.passage.queue_ms = float(answer.headers.get(QUEUE_MS, "0"))
        reply.passage.swap_ms = float(answer.headers.get(SWAP_MS, "0"))
        reply.passage.engine_ms = float(answer.headers.get(ENGINE_MS, "0"))
        if not content_type.startswith(b"text/event-stream"):
            body = await _whole(answer)
            head.append((b"content-length", str(len(body)).encode()))
            await reply(_start(answer.status, head))
            await reply({"type": "http.response.body", "body": body})
            return
        try:
            first = True
            async for chunk in answer.chunks.iter_any():
                if first:
                    limit.reschedule(None)
                    await reply(_start(answer.status, head))
                    first = False
                await reply({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, OSError):
            raise PoolGone("the pool that was answering went away") from None
        if first:
            raise PoolGone("the pool ended its answer before it began")
        await reply({"type": "http.response.body", "body": b""})


@dataclass(slots=True)
class RemoteSeat:
    """A remote expert's places in this gateway: bounded, first come, first served."""

    engine: Engine
    max_in_flight: int
    max_queue: int
    failed: str | None = None
    places: asyncio.Semaphore = field(init=False)
    waiting: int = field(init=False, default=0)
    running: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.max_in_flight)

    async def run(self, request: EngineRequest, send: Send) -> None:
        """Answer a request when there is a place. Raises OverCapacity, ExpertFailed."""
        if self.failed is not None:
            raise ExpertFailed(
                f"expert {request.expert!r} can't be used: {self.failed}", retry_after_s=60
            )
        if self.waiting >= self.max_queue and self.places.locked():
            raise OverCapacity(
                f"expert {request.expert!r} has {self.waiting} requests waiting, "
                f"and no more than {self.max_queue} may"
            )
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            await self.engine.run(request, send)
        finally:
            self.running -= 1
            self.places.release()


class _Reply:
    """An ASGI send that adds our headers and knows how far the reply has come."""

    def __init__(
        self,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        passage: Passage,
    ) -> None:
        self.passage = passage
        self.started = False
        self.first_byte_limit: asyncio.Timeout | None = None
        self._send = send
        self._headers = headers
        self._streams = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            passage = self.passage
            passage.status = message["status"]
            passage.first_byte_at_s = time.monotonic()
            if self.first_byte_limit is not None:
                self.first_byte_limit.reschedule(None)
            given = message["headers"]
            self._streams = any(v.startswith(b"text/event-stream") for _, v in given)
            message = {
                "type": "http.response.start",
                "status": message["status"],
                "headers": [
                    *given,
                    *self._headers,
                    (b"x-coe-expert", passage.expert.encode()),
                    (QUEUE_MS.encode(), f"{passage.queue_ms:.1f}".encode()),
                    (SWAP_MS.encode(), f"{passage.swap_ms:.1f}".encode()),
                ],
            }
        await self._send(message)

    async def break_off(self, error: CoeError) -> None:
        """End a reply that had begun. A stream says why; anything else is cut short."""
        self.passage.outcome = error.code
        if self._streams:
            await self._send({"type": "http.response.body", "body": sse_event(error)})
            return
        raise error


def _traced(
    trace: Trace | None, option: Option, asked: Asked
) -> AbstractContextManager[Mapping[str, str]]:
    """The W3C headers to go on with; untraced, the client's own as they came."""
    if trace is None:
        return nullcontext(asked.trace)
    return trace.attempt(option.expert, option.boot)


def _too_late(asked: Asked) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer within the deadline of {asked.deadline_ms} ms")


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _whole(answer: PoolReply) -> bytes:
    try:
        return await answer.chunks.read()
    except (aiohttp.ClientError, OSError):
        raise PoolGone("the pool that was answering went away") from None


def _has_any(plan: Plan, view: PoolView) -> bool:
    return not view.snapshot.draining and any(
        name in view.snapshot.experts for name in plan.preference
    )


def _fault_from(code: str, body: bytes, retry_after: str | None) -> Unavailable:
    """A pool's error as an exception again, with its own words."""
    try:
        message = str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = "the pool could not answer"
    kinds: dict[str, type[Unavailable]] = {
        "over_capacity": OverCapacity,
        "expert_failed": ExpertFailed,
        "engine_dead": EngineDead,
    }
    return kinds.get(code, PoolGone)(message, retry_after_s=float(retry_after or 1))
