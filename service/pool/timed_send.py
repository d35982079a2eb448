"""The ASGI send of a pool: times an answer, counts its tokens, and adds the headers with its times.

It also commits the lease at the first message, and drops what a run sends whose lease was revoked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from service.engine.engine_interface import Message, Send
from service.http.token_usage import reply_usage
from service.pool.slots.base_slot import Lease
from service.rpc.call_headers import ENGINE_MS, QUEUE_MS, SWAP_MS, Times
from service.rpc.expert_latency import EngineStay, ExpertLatency, ResponseTimer


class TimedSend:
    """An ASGI send that times chunks, counts tokens, and adds the headers with the times.

    Args:
        send: Receives the messages.
        first_byte_limit: A timeout that is lifted at the first byte. None means that the timeout
            holds for the whole answer.
    """

    def __init__(self, send: Send, first_byte_limit: asyncio.Timeout | None) -> None:
        self._send = send
        self._limit = first_byte_limit
        # The event loop's clock may be coarse, and it may stand still during a callback.
        self._clock = time.monotonic
        self._queue_s = 0.0
        self._swap_s = 0.0
        self._arrived_s = self._clock()
        self._timer: ResponseTimer | None = None
        self._stay = EngineStay(alone=False)
        self._record_tokens: Callable[[int], None] = lambda _tokens: None
        self._commit: Callable[[], bool] = lambda: True
        self._is_revoked = False

    def begin(self, lease: Lease, record_tokens: Callable[[int], None], stay: EngineStay) -> None:
        """Start to measure a run of the request under this lease."""
        self._stay = stay
        self._commit = lease.commit
        self._is_revoked = False
        self._record_tokens = record_tokens
        self._queue_s = lease.queue_s
        self._swap_s = lease.swap_s
        self._timer = ResponseTimer(self._clock())

    def silent(self) -> bool:
        """Return whether the engine had the request for most of the time and sent nothing."""
        timer = self._timer
        if timer is None or timer.first_s:
            return False
        return self._queue_s < self._clock() - timer.began_s

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_revoked = not self._commit()
        if self._is_revoked:
            return  # another run will answer the request
        if self._timer is not None:
            self._timer.on_bytes(message, self._clock())
        if message["type"] == "http.response.start":
            if self._limit is not None:
                self._limit.reschedule(None)
            timer = self._timer
            engine_s = timer.first_s - timer.began_s if timer is not None else 0.0
            times = [
                (QUEUE_MS.encode(), f"{self._queue_s * 1000:.1f}".encode()),
                (SWAP_MS.encode(), f"{self._swap_s * 1000:.1f}".encode()),
                (ENGINE_MS.encode(), f"{engine_s * 1000:.2f}".encode()),
            ]
            message = {**message, "headers": [*message["headers"], *times]}
        elif self._timer is not None:
            self._count(message, self._timer.chunks)
        began_s = self._clock()
        await self._send(message)
        if self._timer is not None:
            self._timer.on_sent(self._clock() - began_s)

    def _count(self, message: Message, chunks: int) -> None:
        """Record tokens. A chunk has about one token, and a whole answer reports its usage."""
        if message.get("more_body", False):
            self._record_tokens(1)
        elif chunks == 1 and (usage := reply_usage(message.get("body", b""))) is not None:
            self._record_tokens(usage.answer_tokens or 0)

    def times(self) -> Times:
        """Return when the answer began and how long its request waited."""
        timer = self._timer
        return Times(
            self._arrived_s,
            timer.began_s if timer is not None else 0.0,
            timer.first_s if timer is not None else 0.0,
            self._clock(),
            self._queue_s,
            self._swap_s,
        )

    def report(self, latency: ExpertLatency, prompt_tokens: int, sequences: int = 1) -> None:
        """Report the speed of the answer to its expert's latency."""
        if self._timer is not None:
            latency.learn(self._timer, prompt_tokens, sequences, alone=self._stay.alone)
