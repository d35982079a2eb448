"""Remote experts' places in this gateway, and what the broker sees of them: a pool like others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.broker.board import REMOTE, PoolView
from service.engine.protocol import Engine, EngineRequest, Message, Send
from service.errors import ExpertFailed, OverCapacity
from service.link.snapshot import ExpertState, Queue, Snapshot, Speed
from service.link.speed import Speedometer, Stopwatch
from service.types import Residency


@dataclass(slots=True)
class RemoteSeat:
    """A remote expert's places: bounded, first come, first served."""

    engine: Engine
    max_in_flight: int
    max_queue: int
    failed: str | None = None
    places: asyncio.Semaphore = field(init=False)
    waiting: int = field(init=False, default=0)
    running: int = field(init=False, default=0)
    speed: Speedometer = field(init=False, default_factory=Speedometer)

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.max_in_flight)

    async def run(
        self, request: EngineRequest, send: Send, handed: asyncio.Event | None = None
    ) -> None:
        """Answer a request when there is a place. Raises OverCapacity, ExpertFailed.

        `handed` is set once it has one, and the endpoint has the request.
        """
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
        if handed is not None:
            handed.set()
        try:
            await self._timed(request, send)
        finally:
            self.running -= 1
            self.places.release()

    async def _timed(self, request: EngineRequest, send: Send) -> None:
        watch = Stopwatch(time.monotonic())

        async def timed(message: Message) -> None:
            watch.saw(message, time.monotonic())
            await send(message)

        await self.engine.run(request, timed)
        watch.tell(self.speed, 1 + len(request.body) // 4)


def seats_view(seats: Mapping[str, RemoteSeat]) -> PoolView:
    """All remote experts as one pool, each in a slot of its own."""
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
            queues={name: Queue(seat.waiting, seat.running) for name, seat in seats.items()},
            capacity={name: seat.max_in_flight for name, seat in seats.items()},
            speeds={
                name: speed
                for name, seat in seats.items()
                if (speed := seat.speed.speed()) != Speed()
            },
        ),
        0.0,
        {},
    )
