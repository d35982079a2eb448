"""Checks whether grammars are safe and cheap, in a process that may crash over them.

One worker process serves all engines of this process. Verdicts are kept: a schema that comes with
every request is tried once.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import orjson

from service.engine.grammar_worker import frame
from service.errors import InvalidRequestError, OverCapacityError

# How long reading a grammar may block a thread: vLLM blocks a pool's event loop for as long.
HOLD_S = 0.03
_ATTEMPTS = 2
_AT_ONCE = 2
_KEPT = 1024
_WAIT_S = 60.0
# Variables that Python with native libraries needs; the worker gets no keys of this process.
_ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar for a native compiler.

    Attributes:
        kind: json, regex, ebnf, lark or structural_tag.
        spec: The schema, pattern, grammar or tag as text.
    """

    kind: str
    spec: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a grammar is compiled for: a name, and xgrammar's own form of them."""

    name: str
    info: str


@dataclass(slots=True)
class _Asking:
    """A grammar whose verdict is awaited: by how many, and whether its trial has begun."""

    task: asyncio.Task[str] | None = None
    waiting: int = 0
    begun: bool = False


class WorkerLostError(Exception):
    """The worker process ended, or could not be started."""


class GrammarChecker:
    """Verdicts on grammars. `cpu_s`: the most processor time of one trial, in s."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._asking: dict[bytes, _Asking] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._worker: _Worker | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the worker before it is needed. A failure shows with the first grammar."""
        with suppress(WorkerLostError):
            await self._running_worker()

    async def check(self, grammar: Grammar, vocabulary: Vocabulary | None) -> None:
        """Try a grammar out.

        Args:
            grammar: The grammar.
            vocabulary: The tokens to compile it for; None: it is only read.

        Raises:
            InvalidRequestError: It is not valid, too costly, or crashes its reader.
            OverCapacityError: It could not be tried out now.
        """
        name = vocabulary.name if vocabulary is not None else ""
        key = hashlib.sha256(
            "\0".join((name, grammar.kind, grammar.spec)).encode(errors="surrogatepass")
        ).digest()
        why = self._verdicts.get(key)
        if why is None:
            asking = self._asking.get(key)
            if asking is None:
                asking = self._asking[key] = _Asking()
                asking.task = asyncio.create_task(self._ask(grammar, vocabulary, asking))
                asking.task.add_done_callback(lambda done: self._keep(key, done))
            why = await self._verdict(key, asking)
        else:
            self._verdicts.move_to_end(key)
        if why:
            raise InvalidRequestError(f"the request's {_WORDS[grammar.kind]} is refused: {why}")

    async def _verdict(self, key: bytes, asking: _Asking) -> str:
        """Await a trial. A trial that has not begun is cancelled when its last client leaves."""
        assert asking.task is not None
        asking.waiting += 1
        try:
            return await asyncio.shield(asking.task)
        finally:
            asking.waiting -= 1
            # A trial that runs goes on: its verdict will be used, and a fork can't be called back.
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
        for _ in range(_ATTEMPTS):
            with suppress(WorkerLostError, TimeoutError):
                async with asyncio.timeout(_WAIT_S), self._turns:
                    asking.begun = True
                    worker = await self._running_worker()
                    return await worker.ask(grammar, vocabulary, self._cpu_s)
        raise OverCapacityError("the request's grammar could not be tried out", retry_after_s=5)

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
        """Raises WorkerLostError."""
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
        """Why a grammar must not be used, or empty. Raises WorkerLostError."""
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
            with suppress(ConnectionError):  # the reader reports it to the waiting calls
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
        """End the process: it ends when its input is closed."""
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
    """One checker for all engines of a process: made for the first, ended with the last."""

    def __init__(self, make: Callable[[], GrammarChecker]) -> None:
        self._make = make
        self._checker: GrammarChecker | None = None
        self._users = 0

    def acquire(self) -> GrammarChecker:
        """The checker. Every call needs a `release`."""
        self._users += 1
        if self._checker is None:
            self._checker = self._make()
        return self._checker

    async def release(self) -> None:
        """Undo one `acquire`. The last one ends the worker."""
        self._users -= 1
        if self._users == 0 and self._checker is not None:
            checker, self._checker = self._checker, None
            await checker.close()
