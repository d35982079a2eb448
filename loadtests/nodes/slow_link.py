"""A relay between two network interfaces that delays packets and loses some.

`python -m loadtests.nodes.slow_link INTERFACE INTERFACE DELAY_MS LOSS`. Some kernels lack `netem`.
"""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import sys
import time
from collections.abc import Callable

_ALL_PROTOCOLS = 0x0003
_PACKET_OUTGOING = 4
_FRAME_BYTES = 65_536
# More frames than this at once, and the rest is lost, as in a router's queue.
_MOST_WAITING = 20_000


class DelayLine:
    """Frames on their way, in the order in which they arrive.

    Args:
        delay_s: The time that each takes.
        loss: The share that is lost, in [0, 1].
        draw: Draws from [0, 1).
    """

    def __init__(self, delay_s: float, loss: float, draw: Callable[[], float]) -> None:
        self._delay_s, self._loss, self._draw = delay_s, loss, draw
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, int, bytes]] = []

    def put(self, now_s: float, side: int, frame: bytes) -> None:
        """Take a frame that goes out at `side`, or lose it."""
        if self._draw() >= self._loss and len(self._waiting) < _MOST_WAITING:
            heapq.heappush(self._waiting, (now_s + self._delay_s, next(self._order), side, frame))

    def due(self, now_s: float) -> list[tuple[int, bytes]]:
        """Take the frames that have arrived, each with its side."""
        found = []
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, side, frame = heapq.heappop(self._waiting)
            found.append((side, frame))
        return found

    def wait_s(self, now_s: float) -> float | None:
        """Return the time until the next frame arrives; None where none is on its way."""
        return max(0.0, self._waiting[0][0] - now_s) if self._waiting else None


def relay(one: str, other: str, line: DelayLine) -> None:
    """Relay between two interfaces for ever."""
    ends = []
    for interface in (one, other):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
        end.bind((interface, 0))
        end.setblocking(False)
        ends.append(end)
    while True:
        ready, _, _ = select.select(ends, [], [], line.wait_s(time.monotonic()))
        now_s = time.monotonic()
        for end in ready:
            side = 1 - ends.index(end)
            for frame in _frames(end):
                line.put(now_s, side, frame)
        for side, frame in line.due(time.monotonic()):
            try:
                ends[side].send(frame)
            except OSError:
                continue  # too long, or the interface's queue is full: lost, as on any link


def _frames(end: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < 256:
        try:
            frame, address = end.recvfrom(_FRAME_BYTES)
        except OSError:
            break
        if address[2] != _PACKET_OUTGOING:
            found.append(frame)
    return found


if __name__ == "__main__":
    relay(
        sys.argv[1],
        sys.argv[2],
        DelayLine(float(sys.argv[3]) / 1000, float(sys.argv[4]), random.Random(1).random),
    )
