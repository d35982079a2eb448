"""The common part of all slots: requests and their leases, and the life of the engine.

A slot starts its engine, notices its death and starts another. A request takes a lease and never
has to check the state of the slot first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from service.engine.engine_interface import Engine, EngineReport
from service.errors import (
    CoeError,
    ConflictError,
    EngineRestartingError,
    ExpertFailedError,
    PoolDrainingError,
    UnknownModelError,
)
from service.pool.request_queue import Backlog, Ticket, TicketQueue
from service.pool.slot_units import Unit
from service.pool.slots.idle_unload import UNLOAD, IdlePolicy, Keep
from service.rpc.expert_latency import EngineOccupancy
from service.rpc.snapshot import ExpertState, Queue
from service.types import NOBODY, Residency, Tenant


def _ignore_tokens(_tokens: int) -> None:
    """Count no tokens."""


def _always_commit() -> bool:
    """Commit a lease that can't be revoked."""
    return True


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one request on a slot's engine.

    Attributes:
        engine: The engine.
        report: The engine's description of itself.
        queue_s: Seconds that the request waited for the lease.
        swap_s: The part of `queue_s` during which weights were swapped.
        record_tokens: A callback for the number of generated tokens. The queue decides with it
            which tenant is next.
        commit: A callback to call before the first byte is sent. True means that the lease can't
            be revoked any more. False means that it was revoked and nothing may be sent.
    """

    engine: Engine
    report: EngineReport
    queue_s: float
    swap_s: float = 0.0
    record_tokens: Callable[[int], None] = _ignore_tokens
    commit: Callable[[], bool] = _always_commit


class LeaseRevokedError(Exception):
    """A request has to take another lease. It keeps its place in the queue.

    This error never leaves the pool.

    Attributes:
        arrived_s: When the request first arrived.
        put_back: True where the request ran and was put back before its first byte, which happens
            at most once. False where it only waited and its expert moved to another slot.
    """

    def __init__(self, arrived_s: float, *, put_back: bool) -> None:
        super().__init__("the lease was revoked")
        self.arrived_s = arrived_s
        self.put_back = put_back


@dataclass(slots=True)
class Run:
    """A running request: its task, and whether its lease may still be revoked."""

    task: asyncio.Task[Any]
    committed: bool = False
    revoked: bool = False

    def commit(self) -> bool:
        """Make the lease irrevocable before a byte is sent. False means that it was revoked."""
        self.committed = self.committed or not self.revoked
        return self.committed


log = logging.getLogger("coe.pool")
E = TypeVar("E", bound=Engine)

_RETRY_S = (1.0, 5.0, 30.0, 120.0, 300.0)
_UNHEALTHY_AFTER = 3


class BaseSlot(ABC, Generic[E]):
    """One engine, the experts in it, and the requests that wait for them.

    Args:
        experts: The names of the experts.
        capacity: The number of places of the engine. A place runs one request.
        max_waiting: The load that may wait for each expert.
        start_guess_s: The estimated seconds of an engine start, used until a start was measured.
        changed: A callback for every change that the pool's snapshot would show.
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
        self.occupancy = EngineOccupancy()
        # Seconds that the engines take that start before this slot's engine. The pool sets it.
        self.ahead_s = 0.0
        self._queue = TicketQueue(experts, capacity=capacity, max_waiting=max_waiting)
        self._changed = changed
        self._engine: E | None = None
        self._report: EngineReport | None = None
        self._states: dict[str, ExpertState] = {}
        # The duration of an engine start, and the time when the present start began.
        self._start_s = start_guess_s
        self._start_began_s = 0.0
        # The time when the slot asked for its turn to start an engine, and whether it got the turn.
        self._turn_asked_s: float | None = None
        self._has_turn = False
        self._failed_starts = 0
        self._has_worked = False
        self._draining = False
        self._runs: dict[Ticket, Run] = {}
        self._request_ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # The settings by which experts are unloaded, set by the pool, and when each was used last.
        self.idle_policy = IdlePolicy()
        self._used_s: dict[str, float] = {}
        self.unloads: Counter[tuple[str, str]] = Counter()
        # Whether the slot has no engine until somebody wants one, and the expert that is wanted.
        self._resting = False
        self._wanted = asyncio.Event()
        self._wanted_expert: str | None = None
        # It is set once the slot has given the accelerator back.
        self._at_rest = asyncio.Event()

    # --- requests

    @asynccontextmanager
    async def lease(
        self,
        expert: str,
        tokens: int = 1,
        tenant: Tenant = NOBODY,
        again: LeaseRevokedError | None = None,
        places: int = 1,
        name: str | None = None,
    ) -> AsyncIterator[Lease]:
        """Wait until an expert is ready and has room. Free the place at the end.

        Args:
            expert: The expert.
            tokens: The estimated number of tokens of the prompt.
            tenant: The tenant that sent the request.
            again: The error of this request's revoked lease. The request keeps its place in the
                queue.
            places: The number of places of the engine that the request takes.
            name: The name that the client asked for, where that is another one.

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
        ticket = Ticket(
            expert,
            time.monotonic() if again is None else again.arrived_s,
            tokens,
            tenant,
            again=again is not None and again.put_back,
            places=places,
            name=name,
        )
        self._queue.enter(
            ticket, ready=expert in self._ready_experts(), keeps_place=again is not None
        )
        self._idle.clear()
        self._used_s[expert] = time.monotonic()
        self.want(expert)
        if again is None:
            self._on_arrival(ticket)
        self._changed()
        try:
            if not ticket.running:
                # Requests ahead of this one may wait for an expert that is still loading.
                self._grant()
                await self._queue.wait(ticket)
            if self._engine is None or self._report is None:
                # The engine died after this request was granted its turn.
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
            self._used_s[expert] = time.monotonic()
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
            # As in asyncio.timeout: if other code cancelled the task too, that cancellation wins.
            if not run.revoked or task.uncancel() > cancelled:
                raise
            raise LeaseRevokedError(ticket.arrived_s, put_back=True) from None
        finally:
            del self._runs[ticket]

    def _revoke_leases(self) -> None:
        """Put running requests without a sent byte back into the queue, each at most once.

        The body of a lease must not swallow the cancellation, just as with asyncio.timeout.
        """
        for ticket, run in self._runs.items():
            if not run.committed and not run.revoked and not ticket.again:
                run.revoked = True
                run.task.cancel()

    def _ready_experts(self) -> set[str]:
        """The experts whose requests may run now."""
        return {name for name, s in self._states.items() if s.state is Residency.DEVICE}

    def _on_arrival(self, ticket: Ticket) -> None:
        """React to a new request in the queue."""

    def _on_departure(self) -> None:
        """React to a request that has ended, failed or left."""

    def _swap_s_since(self, _since_s: float) -> float:
        """Return the seconds that swaps have taken since a time."""
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
        """Keep an engine running until cancelled. Hold the lock `turn` while an engine starts."""
        while True:
            engine: E | None = None
            try:
                await self._rest_until_wanted()
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
                if self._resting:
                    self._at_rest.set()

    # --- rest

    @property
    def resting(self) -> bool:
        """Whether the slot has given the accelerator back until somebody wants an expert."""
        return self._resting

    def want(self, expert: str) -> None:
        """Let a slot that rests start its engine again."""
        if self._resting and not self._wanted.is_set():
            self._wanted_expert = expert
            self._wanted.set()

    async def _rest_until_wanted(self) -> None:
        if not self._resting:
            return
        await self._wanted.wait()
        self._wanted.clear()
        wanted, self._wanted_expert = self._wanted_expert, None
        self._resting = False
        self._start_began_s = time.monotonic()
        self._on_wanted(wanted)

    def _on_wanted(self, expert: str | None) -> None:
        """React to the end of a rest, before the next engine is built."""

    def _begin_rest(self, reason: str) -> None:
        """Give the engine up until somebody wants one. No request may run or wait.

        There is no await in it, so that a request either prevents the rest or ends it.
        """
        assert self._queue.total == 0
        self._resting = True
        self._wanted.clear()
        self._at_rest.clear()
        self._engine = None
        self._count_unload(reason)
        self._show_rest()
        log.info("%s: the engine is given up (%s)", "/".join(self.experts), reason)

    def _count_unload(self, reason: str, expert: str | None = None) -> None:
        self.unloads[expert or self.experts[0], reason] += 1

    @abstractmethod
    def _show_rest(self) -> None:
        """Show every expert as it is without an engine."""

    @abstractmethod
    def why_busy(self) -> str | None:
        """Return why the slot can't give the accelerator back now, or None."""

    async def release(self, keep: Keep | None = None, reason: str = UNLOAD) -> bool:
        """Give the accelerator back, and return once its memory is free.

        Args:
            keep: Where weights stay; None: as the slot's policy says.
            reason: The reason, for metrics.

        Returns:
            False where the slot had given it back already.

        Raises:
            ConflictError: Requests run or wait, or weights are being moved.
        """
        if self._resting:
            await self._at_rest.wait()
            return False
        if (why := self.why_busy()) is not None:
            raise ConflictError(f"{'/'.join(self.experts)[:200]}: {why}")
        await self._release(keep, reason)
        return True

    async def _release(self, keep: Keep | None, reason: str) -> None:
        """Give the accelerator back of a slot that is not busy."""
        self._begin_rest(reason)
        self.report_engine_death()  # wakes the supervisor
        await self._at_rest.wait()

    @abstractmethod
    def _build_engine(self) -> E:
        """Make an engine that is not started yet."""

    async def _prepare_start(self) -> None:
        """Wait until the next engine has what it needs to take its turn to start."""

    @abstractmethod
    async def _start(self, engine: E) -> None:
        """Start an engine, make its experts ready, and call `_on_started` at the end."""

    @abstractmethod
    async def _watch(self, engine: E) -> None:
        """Supervise a running engine. Return when another engine has to be started."""

    @abstractmethod
    def _on_start_failed(self, reason: str) -> None:
        """Record that an engine could not be started or can't run any more."""

    @abstractmethod
    def report_engine_death(self) -> None:
        """Report that a request found the engine dead."""

    def _on_started(self, start_s: float) -> None:
        """Record a successful start."""
        self._start_s = start_s
        self._failed_starts = 0
        self._has_worked = True
        now_s = time.monotonic()
        self._used_s |= dict.fromkeys(self.experts, now_s)

    async def _stop_engine(self, engine: E | None) -> None:
        """Stop an engine, so that its memory is free. A second call does nothing."""
        if engine is not None:
            await engine.stop()

    def _retry_delay_s(self) -> float:
        """Return the seconds to wait after a failed start."""
        return _RETRY_S[min(self._failed_starts, len(_RETRY_S)) - 1]

    def _serving_state(self) -> ExpertState:
        """Return the state of an expert that the present engine serves."""
        assert self._report is not None
        return ExpertState(
            Residency.DEVICE,
            max_model_len=self._report.max_model_len,
            engine={"name": self._report.engine, **self._report.details},
        )

    # --- the end of the slot

    async def close(self, reason: str, kind: type[CoeError] = UnknownModelError) -> None:
        """Refuse waiting requests, and wait until the running requests have ended.

        Args:
            reason: Why the slot's experts are gone. Clients that wait get this reason.
            kind: The class of the error that these clients get.
        """
        for name in self.experts:
            self._queue.refuse_waiting(name, lambda _: kind(reason))
        self._draining = True
        if self._queue.total:
            await self._idle.wait()

    def refuse_new(self) -> None:
        """Take no new requests from now on. Waiting and running ones go on."""
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, and wait at most `timeout_s` seconds for the present requests."""
        self.refuse_new()
        self._changed()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    # --- figures

    @abstractmethod
    def unit_of(self, expert: str) -> Unit:
        """Return the unit that an expert belongs to."""

    @property
    def engine(self) -> E | None:
        """The running engine; None while there is none."""
        return self._engine

    @property
    def capacity(self) -> int:
        """The number of places of the engine."""
        return self._queue.capacity

    @property
    def turn_asked_s(self) -> float | None:
        """When the slot asked for its turn to start an engine; None when no start is pending."""
        return self._turn_asked_s

    def start_left_s(self) -> float:
        """The seconds left of the engine's start, without the starts before it."""
        if self._resting or (self._turn_asked_s is not None and not self._has_turn):
            return self._full_start_s()
        return max(0.5, self._full_start_s() - (time.monotonic() - self._start_began_s))

    def _full_start_s(self) -> float:
        return self._start_s

    @abstractmethod
    def states(self) -> dict[str, ExpertState]:
        """Return each expert's state with the time until it is ready."""

    @property
    def requests(self) -> int:
        """The number of waiting and running requests."""
        return self._queue.total

    def queues(self) -> dict[str, Queue]:
        """Return each expert's waiting and running requests."""
        return {name: self._queue.snapshot(name) for name in self.experts}

    def queue_of(self, expert: str, name: str) -> Queue:
        """Return the requests for an expert that asked for it by this name."""
        return self._queue.snapshot(expert, name)

    def backlogs(self) -> dict[str, Backlog]:
        """Return what runs and waits for each expert, for autoscaling."""
        return {name: self._queue.backlog(name) for name in self.experts}

    @property
    def serving(self) -> bool:
        """Whether an engine runs."""
        return self._engine is not None

    @property
    def full_start_s(self) -> float:
        """Seconds that an engine takes to start."""
        return self._full_start_s()

    def details(self) -> dict[str, dict[str, Any]]:
        """Return each expert's residency in full, for operators."""
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
                "released": state.released,
            }
        return details

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Return the number of swaps by unit, method and reason."""
        return {}

    def unhealthy(self) -> str | None:
        """Return why this process should be replaced, or None.

        A new process would not help an expert that never loaded. It may help where an engine
        worked before and can't be started again.
        """
        if self._has_worked and self._failed_starts >= _UNHEALTHY_AFTER:
            return f"the engine of {'/'.join(self.experts)} died and could not be started again"
        return None

    # --- operations

    @abstractmethod
    async def operate(self, operation: str, expert: str) -> None:
        """Load, evict, pin or unpin an expert.

        Raises:
            ConflictError: The present state does not allow the operation.
        """

    def record_demand(self, expert: str, amount: float, now_s: float) -> None:
        """Record unmet demand for an expert. It has no effect on an expert that always stays."""
