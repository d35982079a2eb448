"""Queues of remote experts in this gateway, and their view as a pool for the broker."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.broker.pool_state import REMOTE, PoolView
from service.engine.engine_interface import Engine, EngineRequest, Message, Send
from service.errors import CoeError, ExpertFailedError
from service.pool.request_queue import Ticket, TicketQueue
from service.rpc.expert_latency import (
    EngineOccupancy,
    ExpertLatency,
    ResponseTimer,
    measured_speeds,
)
from service.rpc.snapshot import ExpertState, Queue, Snapshot
from service.types import NOBODY, Residency, Tenant

# The queue of a remote expert has a single expert, under this name, which is always ready.
_EXPERT = "remote"
_READY = {_EXPERT}


@dataclass(slots=True)
class RemotePool:
    """A remote expert with a bounded queue. Tenants take turns, as in a pool's queue.

    It outlives a config, because the endpoint's limit holds for the requests of all configs.

    Attributes:
        engine: The client of the endpoint.
        max_in_flight: The most requests that the endpoint may have.
        max_queued_requests: The most requests that may wait.
        failed: Why the endpoint can't be used; None if it can.
        tickets: The queue.
        latency: The endpoint's latency.
    """

    engine: Engine
    max_in_flight: int
    max_queued_requests: int
    failed: str | None = None
    tickets: TicketQueue = field(init=False)
    latency: ExpertLatency = field(init=False, default_factory=ExpertLatency)
    _occupancy: EngineOccupancy = field(init=False, default_factory=EngineOccupancy)
    # Number of running requests of each engine. A replaced engine stops after its last request.
    _users: Counter[Engine] = field(init=False, default_factory=Counter)
    _ending: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.tickets = TicketQueue(
            (_EXPERT,), capacity=self.max_in_flight, max_waiting=self.max_queued_requests
        )

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a place."""
        return self.tickets.counts(_EXPERT)[0]

    def queue_of(self, name: str) -> Queue:
        """The requests that asked for one name, in the form of a pool's snapshot."""
        return self.tickets.snapshot(_EXPERT, name)

    @property
    def running(self) -> int:
        """Number of requests that the endpoint has."""
        return self.tickets.counts(_EXPERT)[1]

    async def start(self) -> None:
        """Connect to the endpoint. If that is impossible, `failed` has the reason."""
        self.failed = None
        try:
            await self.engine.start()
        except CoeError as error:
            self.failed = error.message

    async def replace(self, engine: Engine, max_in_flight: int, max_queued_requests: int) -> None:
        """Use another engine and other bounds for new requests.

        Requests in flight stay with their engine. They count against the new bound as well.
        """
        before, self.engine = self.engine, engine
        self.max_in_flight, self.max_queued_requests = max_in_flight, max_queued_requests
        self.tickets.resize(max_in_flight, max_queued_requests)
        await self.start()
        if not self._users[before]:
            await before.stop()
        self.tickets.grant(_READY)

    async def stop(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(engine.stop() for engine in {self.engine, *self._users}))
        await asyncio.gather(*self._ending)

    async def run(
        self,
        request: EngineRequest,
        send: Send,
        handed: asyncio.Event | None = None,
        tenant: Tenant = NOBODY,
        *,
        tokens: int = 1,
        places: int = 1,
    ) -> None:
        """Answer a request when there is room for it.

        Args:
            request: The request.
            send: Receives the answer, as ASGI messages.
            handed: An event that is set once the endpoint has the request.
            tenant: The tenant that sent the request.
            tokens: Estimated tokens of its prompts.
            places: Number of places that it takes: one for each answer.

        Raises:
            OverCapacityError: The queue is full.
            ExpertFailedError: The endpoint can't be used.
        """
        if self.failed is not None:
            raise ExpertFailedError(
                f"expert {request.expert!r} can't be used: {self.failed}", retry_after_s=60
            )
        name = request.expert
        ticket = Ticket(_EXPERT, time.monotonic(), tokens, tenant, places=places, name=name)
        self.tickets.enter(ticket, ready=True)
        try:
            await self.tickets.wait(ticket)
            if handed is not None:
                handed.set()
            await self._run_timed(request, send, ticket)
        finally:
            self.tickets.leave(ticket, time.monotonic())
            self.tickets.grant(_READY)

    async def _run_timed(self, request: EngineRequest, send: Send, ticket: Ticket) -> None:
        watch = ResponseTimer(time.monotonic())

        async def timed(message: Message) -> None:
            began_s = time.monotonic()
            watch.on_bytes(message, began_s)
            await send(message)
            watch.on_sent(time.monotonic() - began_s)

        engine = self.engine
        self._users[engine] += 1
        try:
            with self._occupancy.stay() as stay:
                await engine.run(request, timed)
        finally:
            self.tickets.served(ticket, watch.tokens())
            self._release(engine)
        self.latency.learn(watch, ticket.tokens, ticket.places, alone=stay.alone)

    def _release(self, engine: Engine) -> None:
        """Record the end of a request, and stop a replaced engine after its last request."""
        self._users[engine] -= 1
        if self._users[engine]:
            return
        del self._users[engine]
        if engine is not self.engine:
            task = asyncio.create_task(engine.stop())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


def remote_pool_view(pools: Mapping[str, RemotePool], variants: Mapping[str, str]) -> PoolView:
    """Describe all remote experts as one pool, each in its own slot with its variants.

    Args:
        pools: The pools of remote experts.
        variants: The variants of remote experts, each with its base.
    """
    now_s = time.monotonic()
    slots = {name: i for i, name in enumerate(pools)}
    owners = dict(zip(pools, pools, strict=True))
    owners |= {name: base for name, base in variants.items() if base in pools}
    of = {name: pools[owner] for name, owner in owners.items()}
    states = {
        name: ExpertState(
            Residency.DEVICE if remote.failed is None else Residency.FAILED,
            slot=slots[owners[name]],
        )
        for name, remote in of.items()
    }
    return PoolView(
        REMOTE,
        Snapshot(
            boot="remote",
            kind="remote",
            experts=states,
            queues={name: remote.queue_of(name) for name, remote in of.items()},
            capacity={name: remote.max_in_flight for name, remote in of.items()},
            speeds=measured_speeds({n: one.latency.usual for n, one in of.items()}, now_s),
            idle_speeds=measured_speeds({n: one.latency.idle for n, one in of.items()}, now_s),
            shares={name: owner for name, owner in owners.items() if name != owner},
        ),
        0.0,
        {},
    )
