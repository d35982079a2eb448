"""A reply on its way out of a pool: timed, counted, and told how long it waited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from service.engine.base import Message, Send
from service.http.usage import reply_usage
from service.pool.lease import Lease
from service.rpc.call_headers import ENGINE_MS, QUEUE_MS, SWAP_MS, Times
from service.rpc.expert_speed import LatencyEstimator, ResponseTimer


class TimedSend:
    """An ASGI send that times chunks, adds the queue header, and ends the wait for a first byte."""

    def __init__(self, send: Send, first_byte_limit: asyncio.Timeout | None) -> None:
        self._send = send
        self._limit = first_byte_limit
        # The loop's own may be coarse and stand still while it works.
        self._clock = time.monotonic
        self._queue_s = 0.0
        self._swap_s = 0.0
        self._arrived_s = self._clock()
        self._watch: ResponseTimer | None = None
        self._served: Callable[[int], None] = lambda tokens: None
        self._begun: Callable[[], bool] = lambda: True
        self._void = False

    def lease_began(self, lease: Lease, served: Callable[[int], None]) -> None:
        self._begun = lease.commit
        self._void = False
        self._served = served
        self._queue_s = lease.queue_s
        self._swap_s = lease.swap_s
        self._watch = ResponseTimer(self._clock())

    def silent(self) -> bool:
        """Whether the engine had the request for most of the time, and said nothing."""
        watch = self._watch
        if watch is None or watch.first_s:
            return False
        return self._queue_s < self._clock() - watch.began_s

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._void = not self._begun()
        if self._void:
            return  # the request was put back: it will be answered by another run
        if self._watch is not None:
            self._watch.on_bytes(message, self._clock())
        if message["type"] == "http.response.start":
            if self._limit is not None:
                self._limit.reschedule(None)
            watch = self._watch
            engine_s = watch.first_s - watch.began_s if watch is not None else 0.0
            told = [
                (QUEUE_MS.encode(), f"{self._queue_s * 1000:.1f}".encode()),
                (SWAP_MS.encode(), f"{self._swap_s * 1000:.1f}".encode()),
                (ENGINE_MS.encode(), f"{engine_s * 1000:.2f}".encode()),
            ]
            message = {**message, "headers": [*message["headers"], *told]}
        elif self._watch is not None:
            self._count(message, self._watch.chunks)
        await self._send(message)

    def _count(self, message: Message, chunks: int) -> None:
        """Tokens made, for fairness: a chunk is about one, a whole reply says how many."""
        if message.get("more_body", False):
            self._served(1)
        elif chunks == 1 and (usage := reply_usage(message.get("body", b""))) is not None:
            self._served(usage.answer_tokens or 0)

    def times(self) -> Times:
        watch = self._watch
        return Times(
            self._arrived_s,
            watch.began_s if watch is not None else 0.0,
            watch.first_s if watch is not None else 0.0,
            self._clock(),
            self._queue_s,
            self._swap_s,
        )

    def tell(self, meter: LatencyEstimator, prompt_tokens: int) -> None:
        """How fast it was."""
        if self._watch is not None:
            self._watch.report(meter, prompt_tokens)
