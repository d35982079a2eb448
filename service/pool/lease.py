"""The right to run one request, and how it can be taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.engine.base import Engine, EngineReport


def _nothing(tokens: int) -> None:
    """Nobody counts them."""


def _always() -> bool:
    """Nobody takes this lease back."""
    return True


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one request on the slot's engine, and how long it waited for it.

    `swap_s`: how much of that other weights were being put in place. `served` is told
    of tokens as they are made, for whose turn it is next; `begun` is asked
    before the first byte goes out: from then on the request is not put back any more, and
    where it answers False it was already, and nothing may go out.
    """

    engine: Engine
    report: EngineReport
    queue_s: float
    swap_s: float = 0.0
    served: Callable[[int], None] = _nothing
    begun: Callable[[], bool] = _always


class LeaseRevokedError(Exception):
    """A request that must ask for a lease again, with this: it keeps its place in the queue.

    `arrived_s`: when it first came. `put_back`: it ran, and was put back before its first byte; who
    only waited and was moved to another slot has not used up that right. Not an error: nobody but
    the pool sees it.
    """

    def __init__(self, arrived_s: float, *, put_back: bool) -> None:
        super().__init__("asked again")
        self.arrived_s = arrived_s
        self.put_back = put_back


@dataclass(slots=True)
class Run:
    """A running request: the task it runs in, and whether it may still be put back."""

    task: asyncio.Task[Any]
    begun: bool = False
    revoked: bool = False

    def begin(self) -> bool:
        """Its first byte is about to go out. False where it was put back."""
        self.begun = self.begun or not self.revoked
        return self.begun
