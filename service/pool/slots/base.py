"""The common part of all slots: requests and their leases, and the life of the engine.

A slot starts its engine, notices its death and starts another. Requests take a lease, and never
have to look at states first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Generic, TypeVar

from service.engine.base import Engine, EngineReport
from service.errors import (
    CoeError,
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

_RETRY_S = (1.0, 5.0, 30.0, 120.0, 300.0)
_UNHEALTHY_AFTER = 3


class BaseSlot(ABC, Generic[E]):
    """One engine, the experts in it, and the requests that wait for them.

    Args:
        experts: Names of the experts.
        capacity: Places of the engine: requests that run at once.
        max_waiting: Load that may wait for each expert.
        start_guess_s: How long a start of the engine takes, until one was measured.
        changed: Called whenever a snapshot would differ.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        changed: Callable[[], None],
    ) -> None:
        self.experts = experts
        self.canary_failures = 0
        # How long the engines take that start before this slot's; the pool sets it.
        self.ahead_s = 0.0
        self._queue = TicketQueue(experts, capacity=capacity, max_waiting=max_waiting)
        self._changed = changed
        self._engine: E | None = None
        self._report: EngineReport | None = None
        self._states: dict[str, ExpertState] = {}
        # How long starting the engine takes, and when the present start began.
        self._start_s = start_guess_s
        self._start_began_s = 0.0
        # When it asked for its turn to start an engine, and whether it has had that turn.
        self._turn_asked_s: float | None = None
        self._has_turn = False
        self._failed_starts = 0
        self._has_worked = False
        self._draining = False
        self._runs: dict[Ticket, Run] = {}
        self._request_ended = asyncio.Event()
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
        """Wait until an expert answers and there is room; free the place at the end.

        Args:
            expert: The expert.
            tokens: About how many tokens the prompt has.
            tenant: Whose request it is.
            again: The error of an earlier lease of this request, whose place in the queue it keeps.
            places: Places of the engine that the request takes.

        Yields:
            The lease.

        Raises:
            OverCapacityError: The queue is full.
            ExpertFailedError: The expert could not be loaded.
            PoolDrainingError: The slot takes no new requests.
            EngineRestartingError: The engine died before the request ran.
            LeaseRevokedError: The request has to take another lease, perhaps of another slot.
        """
        if self._draining and again is None:
            raise PoolDrainingError("this pool is stopping")
        if self._states[expert].state is Residency.FAILED:
            raise self._failed_error(expert)
        ticket = self._queue.enter(
            expert,
            time.monotonic() if again is None else again.arrived_s,
            ready=expert in self._ready_experts(),
            tokens=tokens,
            places=places,
            tenant=tenant,
            again=again is not None,
        )
        ticket.again = again is not None and again.put_back
        self._idle.clear()
        if again is None:
            self._on_arrival(ticket)
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
                    record_tokens=partial(self._queue.served, ticket),
                    commit=run.commit,
                )
        finally:
            self._queue.leave(ticket, time.monotonic())
            self._grant()
            if self._queue.total == 0:
                self._idle.set()
            self._request_ended.set()
            self._on_departure()
            self._changed()

    @asynccontextmanager
    async def _revocable(self, ticket: Ticket) -> AsyncIterator[Run]:
        """Let a request run until it ends or its lease is revoked.

        Raises:
            LeaseRevokedError: `_revoke_leases` revoked it.
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

    def _revoke_leases(self) -> None:
        """Put running requests of which no byte was sent back into the queue, once each.

        The body of a lease must not swallow the cancellation, as with asyncio.timeout.
        """
        for ticket, run in self._runs.items():
            if not run.committed and not run.revoked and not ticket.again:
                run.revoked = True
                run.task.cancel()

    def _ready_experts(self) -> set[str]:
        """The experts whose requests may run now."""
        return {name for name, s in self._states.items() if s.state is Residency.DEVICE}

    def _on_arrival(self, ticket: Ticket) -> None:
        """A new request has entered the queue."""

    def _on_departure(self) -> None:
        """A request has ended, failed or left."""

    def _swap_s_since(self, _since_s: float) -> float:
        """Seconds spent on swaps since then."""
        return 0.0

    def _grant(self) -> None:
        self._queue.grant(self._ready_experts())

    def _failed_error(self, expert: str) -> ExpertFailedError:
        reason = self._states[expert].reason
        return ExpertFailedError(
            f"expert {expert!r} could not be loaded: {reason}", retry_after_s=30
        )

    def _refuse_failed(self) -> None:
        """Refuse the requests that wait for experts that failed."""
        for name, state in self._states.items():
            if state.state is Residency.FAILED:
                self._queue.refuse_waiting(name, lambda ticket: self._failed_error(ticket.expert))

    # --- the engine's life

    async def supervise(self, turn: asyncio.Lock) -> None:
        """Keep an engine running until cancelled; hold `turn` while one starts."""
        while True:
            engine: E | None = None
            try:
                engine = self._build_engine()
                await self._prepare_start()
                self._has_turn = False
                self._turn_asked_s = time.monotonic()
                async with turn:
                    self._has_turn = True
                    await self._start(engine)
                self._turn_asked_s = None
                await self._watch(engine)
            except Exception as error:
                reason = error.message if isinstance(error, CoeError) else repr(error)
                self._failed_starts += 1
                self._engine = None
                self._turn_asked_s = None
                log.error("engine of %s failed: %s", "/".join(self.experts), reason)
                self._on_start_failed(reason)
                self._refuse_failed()
                await self._stop_engine(engine)
                await asyncio.sleep(self._retry_delay_s())
            finally:
                self._engine = None
                self._turn_asked_s = None
                await self._stop_engine(engine)

    @abstractmethod
    def _build_engine(self) -> E:
        """Make an engine that is not started yet."""

    async def _prepare_start(self) -> None:
        """Wait for all that the next engine needs before it may take its turn to start."""

    @abstractmethod
    async def _start(self, engine: E) -> None:
        """Start an engine and make its experts answer. Calls `_on_started` at the end."""

    @abstractmethod
    async def _watch(self, engine: E) -> None:
        """Look after a running engine; return once another one has to be started."""

    @abstractmethod
    def _on_start_failed(self, reason: str) -> None:
        """Show that an engine could not be started, or can't run any more."""

    @abstractmethod
    def report_engine_death(self) -> None:
        """Tell the slot that a request saw the engine die."""

    def _on_started(self, start_s: float) -> None:
        """Record a start that succeeded."""
        self._start_s = start_s
        self._failed_starts = 0
        self._has_worked = True

    async def _stop_engine(self, engine: E | None) -> None:
        """Stop an engine; its memory is free from then on. Stopping it twice does nothing."""
        if engine is not None:
            await engine.stop()

    def _retry_delay_s(self) -> float:
        """Seconds to wait after a start that failed, before the next."""
        return _RETRY_S[min(self._failed_starts, len(_RETRY_S)) - 1]

    def _serving_state(self) -> ExpertState:
        """The state of an expert that the present engine answers for."""
        assert self._report is not None
        return ExpertState(
            Residency.DEVICE,
            max_model_len=self._report.max_model_len,
            engine={"name": self._report.engine, **self._report.details},
        )

    # --- the end of the slot

    async def close(self, reason: str, kind: type[CoeError] = UnknownModelError) -> None:
        """Refuse what waits, and wait until the running requests have ended.

        Args:
            reason: Why its experts are gone, for the clients that wait.
            kind: The error that these get.
        """
        for name in self.experts:
            self._queue.refuse_waiting(name, lambda _: kind(reason))
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

    # --- figures

    @abstractmethod
    def unit_of(self, expert: str) -> Unit:
        """The unit that an expert belongs to."""

    @property
    def capacity(self) -> int:
        """Requests that run at once."""
        return self._queue.capacity

    @property
    def turn_asked_s(self) -> float | None:
        """Since when it waits to start an engine, or starts one; None while it does neither."""
        return self._turn_asked_s

    def start_left_s(self) -> float:
        """Seconds that are left of its engine's start, not counting the starts before it."""
        if self._turn_asked_s is not None and not self._has_turn:
            return self._full_start_s()
        return max(0.5, self._full_start_s() - (time.monotonic() - self._start_began_s))

    def _full_start_s(self) -> float:
        return self._start_s

    @abstractmethod
    def states(self) -> dict[str, ExpertState]:
        """Each expert's state, with the time until it answers."""

    def queues(self) -> dict[str, Queue]:
        """Each expert's waiting and running requests."""
        return {name: self._queue.snapshot(name) for name in self.experts}

    def details(self) -> dict[str, dict[str, Any]]:
        """Each expert's residency in full, for operators."""
        details: dict[str, dict[str, Any]] = {}
        for name, state in self.states().items():
            waiting, running = self._queue.counts(name)
            details[name] = {
                "state": state.state.value,
                "reason": state.reason,
                "eta_s": state.eta_s,
                "waiting": waiting,
                "running": running,
                "failed_starts": self._failed_starts,
            }
        return details

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps by unit, method and reason."""
        return {}

    def unhealthy(self) -> str | None:
        """Why this process should be replaced, or None.

        A new process would not help an expert that never loaded. It may help an engine that
        worked and can't be started again.
        """
        if self._has_worked and self._failed_starts >= _UNHEALTHY_AFTER:
            return f"the engine of {'/'.join(self.experts)} died and could not be started again"
        return None

    # --- operations

    @abstractmethod
    async def operate(self, operation: str, expert: str) -> None:
        """Load, evict, pin or unpin an expert.

        Raises:
            ConflictError: The present state forbids it.
        """

    def record_demand(self, expert: str, amount: float, now_s: float) -> None:
        """Record unmet demand for an expert; it changes nothing where the expert always stays."""
