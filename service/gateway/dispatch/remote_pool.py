"""Remote experts' places in this gateway, and what the broker sees of them: a pool like others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.broker.pool_state import REMOTE, PoolView
from service.engine.base import Engine, EngineRequest, Message, Send
from service.errors import CoeError, ExpertFailedError
from service.pool.queue import Ticket, TicketQueue
from service.rpc.latency import LatencyEstimator, ResponseTimer
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import NOBODY, Residency, Tenant

# A seat's queue knows one expert only, and it is always there.
_IT = ""
_READY = {_IT}


@dataclass(slots=True)
class RemotePool:
    """A remote expert's places: bounded; tenants take turns as in a pool's queue.

    It outlives a config, because the endpoint's bound holds for the requests of all of them.
    """

    engine: Engine
    max_in_flight: int
    max_queued_requests: int
    failed: str | None = None
    queues: TicketQueue = field(init=False)
    waits: dict[Ticket, asyncio.Future[None]] = field(init=False, default_factory=dict)
    speed: LatencyEstimator = field(init=False, default_factory=LatencyEstimator)
    # Engines that run requests, by how many; an engine that was replaced ends with the last.
    _users: Counter[Engine] = field(init=False, default_factory=Counter)
    _ending: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.queues = TicketQueue(
            (_IT,), capacity=self.max_in_flight, max_waiting=self.max_queued_requests
        )

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self.queues.counts(_IT)[0]

    @property
    def queue(self) -> Queue:
        """As pools tell theirs."""
        queues = self.queues
        return Queue(*queues.counts(_IT), queues.places(_IT), queues.waiting_tokens(_IT))

    @property
    def running(self) -> int:
        """Requests that the endpoint has."""
        return self.queues.counts(_IT)[1]

    async def start(self) -> None:
        """Connect. Whoever can't be is shown as failed."""
        self.failed = None
        try:
            await self.engine.start()
        except CoeError as error:
            self.failed = error.message

    async def replace(self, engine: Engine, max_in_flight: int, max_queued_requests: int) -> None:
        """Answer new requests by another engine, within other bounds.

        Requests under way stay with theirs, and count against the new bound as well.
        """
        before, self.engine = self.engine, engine
        self.max_in_flight, self.max_queued_requests = max_in_flight, max_queued_requests
        self.queues.resize(max_in_flight, max_queued_requests)
        await self.start()
        if not self._users[before]:
            await before.stop()
        self._grant()

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
        """Answer a request when there is room for it. Raises OverCapacityError, ExpertFailedError.

        `handed` is set once there is, and the endpoint has the request. `tokens`: about how long
        its prompts are; `places`: how many it takes, for its answers.
        """
        if self.failed is not None:
            raise ExpertFailedError(
                f"expert {request.expert!r} can't be used: {self.failed}", retry_after_s=60
            )
        for gone in self.queues.ticket_to_shed(_IT, tenant, tokens=tokens, places=places):
            self._reject(gone, request.expert)
        ticket = self.queues.offer(
            _IT,
            time.monotonic(),
            ready=True,
            tokens=tokens,
            places=places,
            tenant=tenant,
            named=request.expert,
        )
        try:
            if not ticket.running:
                self.waits[ticket] = asyncio.get_running_loop().create_future()
                await self.waits[ticket]
            if handed is not None:
                handed.set()
            await self._timed(request, send, ticket)
        finally:
            self.waits.pop(ticket, None)
            self.queues.close(ticket, time.monotonic())
            self._grant()

    def _grant(self) -> None:
        for ticket in self.queues.grant(_READY):
            wait = self.waits.get(ticket)
            if wait is not None and not wait.done():
                wait.set_result(None)
            else:
                # Its client left between being woken and running.
                self.queues.close(ticket)

    def _reject(self, ticket: Ticket, expert: str) -> None:
        wait = self.waits.pop(ticket, None)
        full = self.queues.full(_IT, expert)
        self.queues.close(ticket)
        if wait is not None and not wait.done():
            wait.set_exception(full)

    async def _timed(self, request: EngineRequest, send: Send, ticket: Ticket) -> None:
        watch = ResponseTimer(time.monotonic())

        async def timed(message: Message) -> None:
            watch.on_bytes(message, time.monotonic())
            await send(message)

        engine = self.engine
        self._users[engine] += 1
        try:
            await engine.run(request, timed)
        finally:
            self.queues.served(ticket, watch.tokens())
            self._left(engine)
        watch.report(self.speed, ticket.tokens)

    def _left(self, engine: Engine) -> None:
        """A request of an engine has ended."""
        self._users[engine] -= 1
        if self._users[engine]:
            return
        del self._users[engine]
        if engine is not self.engine:
            task = asyncio.create_task(engine.stop())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


def remote_pool_view(seats: Mapping[str, RemotePool]) -> PoolView:
    """All remote experts as one pool, each in a slot of its own."""
    now_s = time.monotonic()
    states = {
        name: ExpertState(Residency.DEVICE if seat.failed is None else Residency.FAILED, slot=i)
        for i, (name, seat) in enumerate(seats.items())
    }
    return PoolView(
        REMOTE,
        Snapshot(
            boot=REMOTE,
            kind="remote",
            experts=states,
            queues={name: seat.queue for name, seat in seats.items()},
            capacity={name: seat.max_in_flight for name, seat in seats.items()},
            speeds={
                name: speed
                for name, seat in seats.items()
                if (speed := seat.speed.speed(now_s)) != Speed()
            },
        ),
        0.0,
        {},
    )
