"""The right to run one request, and how a slot can revoke it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.engine.base import Engine, EngineReport


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
