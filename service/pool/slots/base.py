"""One slot: an engine, the experts in it, and the requests that wait for them.

The slot owns its engine's life: it starts it, loads its experts, notices its
death and starts another. Callers take a lease and never look at states first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

from service.engine.base import Engine, EngineReport
from service.errors import (
    CoeError,
    ConflictError,
    EngineRestartingError,
    ExpertFailedError,
    PoolDrainingError,
    UnknownModelError,
)
from service.pool.lease import Lease, LeaseRevokedError, Run
from service.pool.queue import Ticket, TicketQueue
from service.pool.units import Unit
from service.rpc.snapshot import ExpertState, Queue
from service.types import NOBODY, Residency, Tenant

log = logging.getLogger("coe.pool")
E = TypeVar("E", bound=Engine)

_WATCH_S = 0.2
_RELOAD_S = 30.0
_RETRY_S = (1.0, 5.0, 30.0, 120.0, 300.0)
_UNHEALTHY_AFTER = 3


class BaseSlot(Generic[E]):
    """An engine with its base and adapters.

    `build` makes a new engine; `changed` is called whenever a snapshot would differ.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        build: Callable[[], E],
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        changed: Callable[[], None],
    ) -> None:
        self.experts = experts
        self._build = build
        self._queue = TicketQueue(experts, capacity=capacity, max_waiting=max_waiting)
        self._changed = changed
        self._start_s = start_guess_s
        self._started_at = 0.0
        # When it asked for its turn to start an engine, which others may have before it; and
        # whether it has had that.
        self._turn_asked_s: float | None = None
        self._begun = False
        # What the starts before its own will take, as its pool says.
        self.ahead_s = 0.0
        self._engine: E | None = None
        self._report: EngineReport | None = None
        self._states = {name: ExpertState(Residency.LOADING) for name in experts}
        self._runs: dict[Ticket, Run] = {}
        self._lost = asyncio.Event()
        self._failed_starts = 0
        self._has_worked = False
        self._draining = False
        # Folders of adapters that came after the engine was built.
        self._adapters: dict[str, str] = {}
        self._ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    # --- requests

    @asynccontextmanager
    async def lease(
        self,
        expert: str,
        tokens: int = 1,
        tenant: Tenant = NOBODY,
        again: LeaseRevokedError | None = None,
        places: int = 1,
    ) -> AsyncIterator[Lease]:
        """Wait until `expert` answers and there is room; give the place back at the end.

        `tokens`: about how much work its prompt is; `places`: how many of the engine's it takes.
        `again`: what an earlier lease of this
        request raised; its place in the queue is kept.

        Raises OverCapacityError, ExpertFailedError, PoolDrainingError, EngineRestartingError;
        LeaseRevokedError where the request has to be put back: in this or in another slot.
        """
        if self._draining and again is None:
            raise PoolDrainingError("this pool is stopping")
        if self._states[expert].state is Residency.FAILED:
            raise self._failed(expert)
        ready = expert in self._ready()
        ticket = self._queue.enter(
            expert,
            time.monotonic() if again is None else again.arrived_s,
            ready=ready,
            tokens=tokens,
            places=places,
            tenant=tenant,
            again=again is not None,
        )
        ticket.again = again is not None and again.put_back
        self._idle.clear()
        if again is None:
            self._arrived(ticket)
        self._changed()
        try:
            if not ticket.running:
                # Those ahead may wait for an expert that is still loading.
                self._grant()
                await self._queue.wait(ticket)
            if self._engine is None or self._report is None:
                # It died between waking this request and now.
                raise EngineRestartingError(f"the engine of expert {expert!r} died")
            async with self._revocable(ticket) as run:
                yield Lease(
                    self._engine,
                    self._report,
                    queue_s=time.monotonic() - ticket.arrived_s,
                    swap_s=self._swap_s_since(ticket.arrived_s),
                    served=partial(self._queue.served, ticket),
                    begun=run.begin,
                )
        finally:
            self._queue.leave(ticket, time.monotonic())
            self._grant()
            if self._queue.total == 0:
                self._idle.set()
            self._ended.set()
            self._left()
            self._changed()

    @asynccontextmanager
    async def _revocable(self, ticket: Ticket) -> AsyncIterator[Run]:
        """Let a request run until it ends or `_put_back` takes its lease.

        Raises LeaseRevokedError then.
        """
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        run = self._runs[ticket] = Run(task)
        try:
            yield run
        except asyncio.CancelledError:
            # As asyncio.timeout does it: somebody else may have cancelled the request, too.
            if not run.revoked or task.uncancel() > cancelled:
                raise
            raise LeaseRevokedError(ticket.arrived_s, put_back=True) from None
        finally:
            del self._runs[ticket]

    def _put_back(self) -> None:
        """Running requests of which no byte has gone out go back into the queue, once each.

        A body that is cancelled must not swallow that, as with asyncio.timeout.
        """
        for ticket, run in self._runs.items():
            if not run.begun and not run.revoked and not ticket.again:
                run.revoked = True
                run.task.cancel()

    def _ready(self) -> set[str]:
        """The experts whose requests may run now."""
        return {name for name, s in self._states.items() if s.state is Residency.DEVICE}

    def _arrived(self, ticket: Ticket) -> None:
        """A request has come."""

    def _left(self) -> None:
        """A request has ended, one way or another."""

    def _swap_s_since(self, since_s: float) -> float:
        """Seconds spent on swaps since then."""
        del since_s
        return 0.0

    def _grant(self) -> None:
        self._queue.grant(self._ready())

    def _failed(self, expert: str) -> ExpertFailedError:
        reason = self._states[expert].reason
        return ExpertFailedError(
            f"expert {expert!r} could not be loaded: {reason}", retry_after_s=30
        )

    # --- the engine's life

    async def supervise(self, turn: asyncio.Lock) -> None:
        """Keep an engine running until cancelled; hold `turn` while one starts."""
        while True:
            engine: E | None = None
            try:
                engine = self._build()
                await self._make_ready()
                self._begun = False
                self._turn_asked_s = time.monotonic()
                async with turn:
                    self._begun = True
                    await self._bring_up(engine)
                self._turn_asked_s = None
                await self._watch(engine)
            except Exception as error:
                why = error.message if isinstance(error, CoeError) else repr(error)
                self._failed_starts += 1
                self._engine = None
                self._turn_asked_s = None
                log.error("engine of %s failed: %s", "/".join(self.experts), why)
                self._set_all(Residency.FAILED, why)
                self._refuse_waiting()
                await self._end(engine)
                await asyncio.sleep(self._retry_s())
            finally:
                self._engine = None
                self._turn_asked_s = None
                await self._end(engine)

    async def _make_ready(self) -> None:
        """What must be so before this slot's next engine may take its turn to start."""

    async def _end(self, engine: E | None) -> None:
        """Stop an engine; from then on its memory is free."""
        if engine is not None:
            await engine.stop()

    def _retry_s(self) -> float:
        """How long to wait after a start that failed, before the next."""
        return _RETRY_S[min(self._failed_starts, len(_RETRY_S)) - 1]

    async def _bring_up(self, engine: E) -> None:
        self._started_at = time.monotonic()
        self._set_all(Residency.LOADING, "")
        report = await engine.start()
        # Before the first expert is ready: from then on its requests run.
        self._engine, self._report = engine, report
        for name in self.experts:
            await self._load(engine, report, name)
        self._start_s = time.monotonic() - self._started_at
        self._failed_starts = 0
        self._has_worked = True
        self._changed()

    async def _load(self, engine: Engine, report: EngineReport, name: str) -> None:
        """Make one expert answer, or show why it can't.

        Nothing is shown of an adapter that was removed meanwhile.
        """
        try:
            if (adapter := self._adapters.get(name)) is not None:
                await engine.load(name, adapter)
            else:
                await engine.load(name)
        except CoeError as error:
            if name not in self._states:
                return
            log.error("expert %s failed: %s", name, error.message)
            self._states[name] = ExpertState(Residency.FAILED, reason=error.message)
            self._refuse_waiting()
        else:
            if name not in self._states:
                return
            self._states[name] = ExpertState(
                Residency.DEVICE,
                max_model_len=report.max_model_len,
                engine={"name": report.engine, **report.details},
            )
            self._grant()
        self._changed()

    async def _load_failed_again(self, engine: Engine) -> None:
        assert self._report is not None
        for name, state in list(self._states.items()):
            if state.state is Residency.FAILED:
                await self._load(engine, self._report, name)

    async def _watch(self, engine: E) -> None:
        retry_at_s = time.monotonic() + _RELOAD_S
        while (why := engine.failure()) is None:
            if time.monotonic() >= retry_at_s:
                await self._load_failed_again(engine)
                retry_at_s = time.monotonic() + _RELOAD_S
            # It may have been another engine that a request saw die, before this one.
            self._lost.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._lost.wait()
        self._engine = None
        self._started_at = time.monotonic()
        self._set_all(Residency.LOADING, "")
        log.error("engine of %s died (%s); starting another", "/".join(self.experts), why)

    def lost(self) -> None:
        """A request saw the engine die: don't wait for the next look."""
        self._lost.set()

    def _set_all(self, state: Residency, reason: str) -> None:
        for name in self.experts:
            self._states[name] = replace(self._states[name], state=state, reason=reason, eta_s=0.0)
        self._changed()

    def _refuse_waiting(self) -> None:
        for name, state in self._states.items():
            if state.state is not Residency.FAILED:
                continue
            self._queue.refuse_waiting(name, lambda ticket: self._failed(ticket.expert))

    def unit_of(self, expert: str) -> Unit:
        """The unit that an expert belongs to: here, all of them."""
        assert expert in self.experts
        return Unit(self.experts[0], self.experts)

    async def add_adapter(self, expert: str, folder: str) -> None:
        """One more adapter for the base, beside the others, in the running engine."""
        self.experts = (*self.experts, expert)
        self._adapters[expert] = folder
        self._states[expert] = ExpertState(Residency.LOADING)
        self._queue.add_expert(expert)
        self._changed()
        # An engine that is just starting loads it with the others.
        if (engine := self._engine) is not None and (report := self._report) is not None:
            await self._load(engine, report, expert)

    async def remove_adapter(
        self, expert: str, why: str, kind: type[CoeError] = UnknownModelError
    ) -> None:
        """An adapter goes, the engine stays: who waits for it is told why by such an error.

        Returns when no request of it runs any more, and it is forgotten.
        """
        self.experts = tuple(name for name in self.experts if name != expert)
        del self._states[expert]
        self._queue.refuse_waiting(expert, lambda _: kind(why))
        self._changed()
        while self._queue.counts(expert)[1]:
            self._ended.clear()
            await self._ended.wait()
        self._adapters.pop(expert, None)
        if (engine := self._engine) is not None and engine.failure() is None:
            try:
                await engine.unload(expert)
            except CoeError as error:
                log.error("adapter %s could not be unloaded: %s", expert, error.message)

    async def close(self, why: str, kind: type[CoeError] = UnknownModelError) -> None:
        """Its experts go for good: who waits is told why by such an error, who runs is let end."""
        for name in self.experts:
            self._queue.refuse_waiting(name, lambda _: kind(why))
        self._draining = True
        if self._queue.total:
            await self._idle.wait()

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, and wait for those it has, at most `timeout_s`."""
        self._draining = True
        self._changed()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    # --- what it tells

    @property
    def turn_asked_s(self) -> float | None:
        """Since when it waits to start an engine, or starts one; None while it does neither."""
        return self._turn_asked_s

    def start_left_s(self) -> float:
        """What is left of its engine's start, in s, once that is its turn."""
        if self._turn_asked_s is not None and not self._begun:
            return self._start_whole_s()
        return max(0.5, self._start_whole_s() - (time.monotonic() - self._started_at))

    def _start_whole_s(self) -> float:
        return self._start_s

    def states(self) -> dict[str, ExpertState]:
        """Each expert's state, with the time until it answers."""
        left_s = self.ahead_s + self.start_left_s()
        return {
            # Rounded, so that a countdown is no change worth a line in every snapshot.
            name: replace(state, eta_s=float(round(left_s)))
            if state.state is Residency.LOADING
            else state
            for name, state in self._states.items()
        }

    def queues(self) -> dict[str, Queue]:
        """Each expert's waiting and running requests."""
        return {name: self._queue.snapshot(name) for name in self.experts}

    canary_failures = 0

    @property
    def capacity(self) -> int:
        """Requests that run at once."""
        return self._queue.capacity

    def details(self) -> dict[str, dict[str, Any]]:
        """Each expert's residency in full."""
        told: dict[str, dict[str, Any]] = {}
        for name, state in self.states().items():
            waiting, running = self._queue.counts(name)
            told[name] = {
                "state": state.state.value,
                "reason": state.reason,
                "eta_s": state.eta_s,
                "waiting": waiting,
                "running": running,
                "failed_starts": self._failed_starts,
            }
        return told

    async def operate(self, act: str, expert: str) -> None:
        """load, evict, pin, unpin: this slot's experts are always there. Raises ConflictError."""
        state = self._states[expert]
        if act == "load" and state.state is Residency.FAILED:
            raise ConflictError(
                f"expert {expert!r} could not be loaded and is tried again every "
                f"{_RELOAD_S:.0f} s: {state.reason}"
            )
        if act != "load":
            raise ConflictError(f"expert {expert!r} has a slot of its own and always stays")

    def demand(self, expert: str, amount: float, now_s: float) -> None:
        """Unmet demand for an expert; one with a slot of its own is there anyway."""

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps by unit, method and reason."""
        return {}

    def unhealthy(self) -> str | None:
        """Why this process should be replaced, or None.

        An expert that never loaded is its own fault, and a new process would not
        help; an engine that worked and can't be started again is ours.
        """
        if self._has_worked and self._failed_starts >= _UNHEALTHY_AFTER:
            return f"the engine of {'/'.join(self.experts)} died and could not be started again"
        return None
