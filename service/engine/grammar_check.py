"""Checks whether grammars are safe and cheap, in a separate process that may crash.

One worker process serves all engines of this process. Verdicts are cached, so that a schema in
every request is tried only once. Tenants take turns, so that one with many costly grammars delays
another by no more than the trials that run.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import struct
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import orjson

from service.engine.grammar_worker import frame
from service.errors import InvalidRequestError, OverCapacityError

# The longest time to read a grammar. vLLM blocks the pool's event loop for this time.
HOLD_S = 0.03
_ATTEMPTS = 2
_AT_ONCE = 2
_KEPT = 1024
_WAIT_S = 60.0
# Variables that Python with native libraries needs. The worker gets no API keys.
_ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar for a native compiler.

    Attributes:
        kind: One of json, regex, ebnf, lark and structural_tag.
        spec: The schema, pattern, grammar or tag as text.
    """

    kind: str
    spec: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary that a grammar is compiled for: a name, and xgrammar's serialised form."""

    name: str
    info: str


@dataclass(slots=True)
class _Asking:
    """A pending trial: the number of waiting calls, its turn, and whether the trial has begun."""

    turn: asyncio.Future[None]
    task: asyncio.Task[str] | None = None
    waiting: int = 0
    begun: bool = False


class _Turns:
    """Gives turns to trials, to one tenant after another and to each in the order of its trials.

    A trial that several tenants wait for stands in the line of each, and gets the first turn.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._lines: OrderedDict[str, deque[_Asking]] = OrderedDict()

    def enter(self, tenant: str, asking: _Asking) -> None:
        """Put a trial at the end of a tenant's line, unless it had its turn."""
        if not asking.turn.done():
            self._lines.setdefault(tenant, deque()).append(asking)
            self._grant()

    def leave(self) -> None:
        """End a turn."""
        self._free += 1
        self._grant()

    def _grant(self) -> None:
        while self._free and self._lines:
            tenant, line = self._lines.popitem(last=False)
            while line and line[0].turn.done():
                line.popleft()  # another tenant's line had it, or everybody left
            if not line:
                continue
            self._free -= 1
            line.popleft().turn.set_result(None)
            if line:
                self._lines[tenant] = line


class WorkerLostError(Exception):
    """The worker process ended or could not be started."""


class GrammarChecker:
    """Gives verdicts on grammars.

    Args:
        cpu_s: The longest processor time of one trial in seconds.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._asking: dict[bytes, _Asking] = {}
        self._turns = _Turns(_AT_ONCE)
        self._worker: _Worker | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the worker in advance. A failure is reported for the first grammar."""
        with suppress(WorkerLostError):
            await self._running_worker()

    async def check(
        self, grammar: Grammar, vocabulary: Vocabulary | None, tenant: str = ""
    ) -> None:
        """Try a grammar out.

        Args:
            grammar: The grammar.
            vocabulary: The vocabulary to compile the grammar for. None means that the grammar is
                parsed but not compiled.
            tenant: The tenant that asks.

        Raises:
            InvalidRequestError: The grammar is invalid, costs too much, or crashes its parser.
            OverCapacityError: The grammar could not be tried out now.
        """
        name = vocabulary.name if vocabulary is not None else ""
        key = hashlib.sha256(
            "\0".join((name, grammar.kind, grammar.spec)).encode(errors="surrogatepass")
        ).digest()
        why = self._verdicts.get(key)
        if why is None:
            asking = self._asking.get(key)
            if asking is None:
                asking = self._asking[key] = _Asking(asyncio.get_running_loop().create_future())
                asking.task = asyncio.create_task(self._ask(grammar, vocabulary, asking))
                asking.task.add_done_callback(lambda done: self._keep(key, done))
            why = await self._verdict(key, asking, tenant)
        else:
            self._verdicts.move_to_end(key)
        if why:
            raise InvalidRequestError(f"the request's {_WORDS[grammar.kind]} is refused: {why}")

    async def _verdict(self, key: bytes, asking: _Asking, tenant: str) -> str:
        """Await a trial. A trial that has not begun is cancelled when its last client leaves."""
        assert asking.task is not None
        asking.waiting += 1
        self._turns.enter(tenant, asking)
        try:
            return await asyncio.shield(asking.task)
        finally:
            asking.waiting -= 1
            # A running trial goes on, because a fork can't be cancelled and its verdict is cached.
            if not asking.waiting and not asking.begun and not asking.task.done():
                del self._asking[key]
                asking.task.cancel()

    def _keep(self, key: bytes, done: asyncio.Task[str]) -> None:
        asking = self._asking.get(key)
        if asking is not None and asking.task is done:
            del self._asking[key]
        if not done.cancelled() and done.exception() is None:
            self._verdicts[key] = done.result()
            while len(self._verdicts) > _KEPT:
                self._verdicts.popitem(last=False)

    async def _ask(self, grammar: Grammar, vocabulary: Vocabulary | None, asking: _Asking) -> str:
        late = OverCapacityError("the request's grammar could not be tried out", retry_after_s=5)
        try:
            async with asyncio.timeout(_WAIT_S):
                await asking.turn
            asking.begun = True
            for _ in range(_ATTEMPTS):
                with suppress(WorkerLostError, TimeoutError):
                    async with asyncio.timeout(_WAIT_S):
                        worker = await self._running_worker()
                        return await worker.ask(grammar, vocabulary, self._cpu_s)
        except TimeoutError:
            raise late from None
        finally:
            asking.turn.cancel()
            if not asking.turn.cancelled():  # its turn has come, perhaps just now
                self._turns.leave()
        raise late

    async def _running_worker(self) -> _Worker:
        async with self._starting:
            if self._worker is None or self._worker.lost:
                self._worker = await _Worker.start()
            return self._worker

    async def close(self) -> None:
        """End the worker process."""
        tasks = [asking.task for asking in self._asking.values() if asking.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._worker is not None:
            await self._worker.close()
            self._worker = None


_WORDS = {
    "json": "JSON schema",
    "regex": "regular expression",
    "ebnf": "grammar",
    "lark": "grammar",
    "structural_tag": "structural tag",
}


class _Worker:
    """One worker process, and the requests that wait for its verdicts."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._sent_vocabularies: set[str] = set()
        self.lost = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> _Worker:
        """Start a worker process.

        Raises:
            WorkerLostError: The process could not be started.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.engine.grammar_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise WorkerLostError(str(error)) from None
        return cls(process)

    async def ask(self, grammar: Grammar, vocabulary: Vocabulary | None, cpu_s: float) -> str:
        """Return why a grammar must not be used, or an empty string.

        Raises:
            WorkerLostError: The process ended before its verdict.
        """
        number = next(self._numbers)
        request = {
            "id": number,
            "kind": grammar.kind,
            "spec": grammar.spec,
            "tokenizer": vocabulary.name if vocabulary is not None else "",
            "cpu_s": cpu_s,
            "hold_s": HOLD_S,
        }
        verdict_future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = verdict_future
        try:
            assert self._process.stdin is not None
            if vocabulary is not None and vocabulary.name not in self._sent_vocabularies:
                self._sent_vocabularies.add(vocabulary.name)
                known = {"tokenizer": vocabulary.name, "info": vocabulary.info}
                self._process.stdin.write(frame(known))
            self._process.stdin.write(frame(request))
            with suppress(ConnectionError):  # the reader fails the waiting calls
                await self._process.stdin.drain()
            return await verdict_future
        finally:
            del self._waiting[number]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                (length,) = struct.unpack(">I", await self._process.stdout.readexactly(4))
                verdict = orjson.loads(await self._process.stdout.readexactly(length))
                verdict_future = self._waiting.get(verdict["id"])
                if verdict_future is not None and not verdict_future.done():
                    verdict_future.set_result(verdict["why"])
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.lost = True
            for verdict_future in self._waiting.values():
                if not verdict_future.done():
                    verdict_future.set_exception(WorkerLostError("the worker process ended"))

    async def close(self) -> None:
        """End the process by closing its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        await self._reader


class SharedChecker:
    """One checker for all engines of a process. It lives from the first use to the last."""

    def __init__(self, make: Callable[[], GrammarChecker]) -> None:
        self._make = make
        self._checker: GrammarChecker | None = None
        self._users = 0

    def acquire(self) -> GrammarChecker:
        """Return the checker. Every call needs a later `release`."""
        self._users += 1
        if self._checker is None:
            self._checker = self._make()
        return self._checker

    async def release(self) -> None:
        """Undo one `acquire`. The last release ends the worker."""
        self._users -= 1
        if self._users == 0 and self._checker is not None:
            checker, self._checker = self._checker, None
            await checker.close()
