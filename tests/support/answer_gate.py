"""A gate that holds simulated answers, so that a request runs for as long as a test needs it to.

A simulated engine takes a fixed time for an answer, and a slow machine may take longer for whatever
a test does beside it. A test that needs a running request holds its answer here instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import orjson

from service.engine.engine_interface import EngineRequest, Message, Send
from service.engine.simulated_engine import SimulatedEngine
from service.errors import EngineDeadError


class AnswerGate:
    """A gate that requests or answers pass. It is shut at first, and opens once.

    Attributes:
        held: The number of those that wait at the gate.
    """

    def __init__(self) -> None:
        self.held = 0
        self._opened = False

    def open(self) -> None:
        """Let all pass."""
        self._opened = True

    async def _wait(self, engine: SimulatedEngine | None, expert: str) -> None:
        self.held += 1
        try:
            while True:
                if engine is not None and (why := engine.failure()) is not None:
                    raise EngineDeadError(f"the engine of expert {expert!r} died: {why}")
                if self._opened:
                    return
                await asyncio.sleep(0.002)
        finally:
            self.held -= 1


@contextmanager
def held_answers(limit: int | None = None) -> Iterator[AnswerGate]:
    """Hold the answers that simulated engines begin in this block, until the gate is opened.

    A stream sends its first token and then waits; a whole answer is not sent. The end of the block
    opens the gate. When its engine dies, a whole answer fails at once, and a stream when the gate
    is open.

    Args:
        limit: Hold only the answers to requests with this `max_tokens`; by default all.
    """
    gate = AnswerGate()
    run = SimulatedEngine.run

    async def gated(engine: SimulatedEngine, request: EngineRequest, send: Send) -> None:
        body = orjson.loads(request.body)
        if limit is not None and body.get("max_tokens") != limit:
            await run(engine, request, send)
            return
        stream = bool(body.get("stream"))
        free = 2 if stream else 0  # the start of a stream, and its first token

        async def at_gate(message: Message) -> None:
            nonlocal free
            if free:
                free -= 1
            else:
                await gate._wait(None if stream else engine, request.expert)
            await send(message)

        await run(engine, request, at_gate)

    with _patched(gated, gate):
        yield gate


@contextmanager
def held_requests() -> Iterator[AnswerGate]:
    """Hold the requests that simulated engines get in this block, until the gate is opened.

    An engine has such a request, and has sent nothing of its answer. The request fails when the
    engine dies. The end of the block opens the gate.
    """
    gate = AnswerGate()
    run = SimulatedEngine.run

    async def gated(engine: SimulatedEngine, request: EngineRequest, send: Send) -> None:
        await gate._wait(engine, request.expert)
        await run(engine, request, send)

    with _patched(gated, gate):
        yield gate


@contextmanager
def _patched(run: Any, gate: AnswerGate) -> Iterator[None]:
    with patch.object(SimulatedEngine, "run", run):
        try:
            yield
        finally:
            gate.open()
