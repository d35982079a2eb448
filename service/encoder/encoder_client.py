"""The gateway's side of the encoder: batches, a cache, and a time limit for every request.

Texts of all requests that arrive while a batch runs go into the next one, in turn by tenant. A
batch is so small that it takes half of the time limit. A request waits for its vector no longer
than the limit. An encoder that fails, hangs or is often too slow is left alone for a while, so that
requests don't wait for it in vain. That is counted for each tenant, and only where the worker is
slow, not where others are before it; so no tenant takes the encoder from another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.encoder.encoder_worker import HEADER, LENGTH, READY, VECTORS, batch

log = logging.getLogger("coe.encoder")

Vector = NDArray[np.float32]

# Characters of a text that count, from either end; far more than the tokens that do.
_EDGE_CHARS = 1000
_MAX_BATCH = 16
_MAX_WAITING = 64
# After so many requests of a tenant in a row that waited in vain, it leaves the encoder alone for a
# while.
_SLOW_IN_A_ROW = 5
# A worker is slow where one text alone takes this share of the time limit.
_SLOW_SHARE = 0.9
_MAX_TENANTS = 10_000
_FIRST_PAUSE_S, _LAST_PAUSE_S = 5.0, 300.0
_START_S = 60.0
_HUNG_S = 10.0
# Variables that Python with native libraries needs. The worker gets no API keys.
_ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


class EncoderUnavailableError(Exception):
    """There is no vector in time.

    Attributes:
        reason: `starting`, `failed`, `busy`, `slow` or `paused`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How an encoder runs.

    Attributes:
        folder: The encoder's folder.
        threads: Threads of one batch.
        max_tokens: Tokens of a text that count.
        cache_entries: Vectors that are kept; 0: none.
        timeout_s: The longest that a request waits for its vector.
    """

    folder: Path
    threads: int = 1
    max_tokens: int = 128
    cache_entries: int = 10_000
    timeout_s: float = 0.05


@dataclass(slots=True, eq=False)
class _Waiting:
    """A text on its way through the encoder, and how many requests wait for its vector."""

    text: str
    vector: asyncio.Future[Vector]
    wanted: int = 0

    def fail(self, reason: str = "failed") -> None:
        """Give up, if there is no vector yet."""
        if not self.vector.done():
            self.vector.set_exception(EncoderUnavailableError(reason))
            self.vector.exception()  # nobody may wait for it any more


class _FairQueue:
    """Texts that wait for the encoder, taken in turn by tenant. None is the gateway itself."""

    def __init__(self) -> None:
        self._of: OrderedDict[str | None, deque[_Waiting]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, tenant: str | None, waiting: _Waiting) -> None:
        self._of.setdefault(tenant, deque()).append(waiting)
        self._size += 1

    def has_room(self, tenant: str) -> bool:
        """Whether a text of a tenant may wait.

        Where the queue is full, the newest text of the tenant with the most gives way, if it then
        still has no fewer than this one.
        """
        if self._size < _MAX_WAITING:
            return True
        others = {name: len(texts) for name, texts in self._of.items() if name is not None}
        most = max(others, key=others.__getitem__, default=None)
        if most is None or others[most] <= others.get(tenant, 0) + 1:
            return False
        self._of[most].pop().fail("busy")
        self._size -= 1
        return True

    def drop(self, tenant: str, waiting: _Waiting) -> None:
        """Take a text out that nobody waits for any more, unless a batch has it already."""
        texts = self._of.get(tenant)
        if texts is None or waiting not in texts:
            return
        texts.remove(waiting)
        self._size -= 1
        if not texts:
            del self._of[tenant]
        waiting.fail("slow")

    def take(self, most: int) -> list[_Waiting]:
        """Take texts out, one of each tenant in turn."""
        taken: list[_Waiting] = []
        while self._of and len(taken) < most:
            tenant, texts = self._of.popitem(last=False)
            taken.append(texts.popleft())
            if texts:
                self._of[tenant] = texts  # its next turn is after all others
        self._size -= len(taken)
        return taken


@dataclass(slots=True)
class _Slowness:
    """How often a tenant waited in vain in a row, and how long it leaves the encoder alone."""

    in_a_row: int = 0
    pause_s: float = _FIRST_PAUSE_S
    paused_until_s: float = -float("inf")


class EncoderClient:
    """Runs one worker process and gives out its vectors. All calls are from one event loop.

    Args:
        settings: How the encoder runs.
        clock: Seconds that only grow.

    Attributes:
        dims: Length of the vectors; 0 until the worker is ready.
        problem: Why the encoder can't be used; None while it can.
    """

    def __init__(
        self, settings: EncoderSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.dims = 0
        self.problem: str | None = None
        self._clock = clock
        self._cache: OrderedDict[bytes, Vector] = OrderedDict()
        self._pending: dict[bytes, _Waiting] = {}
        self._queue = _FairQueue()
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._slow: OrderedDict[str, _Slowness] = OrderedDict()
        # The batch that runs: when it began, and how many texts it has.
        self._running: tuple[float, int] | None = None
        self._text_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._salt = secrets.token_bytes(16)

    def start(self) -> None:
        """Start the worker in the background."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_running())

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the worker is ready. Returns False where it fails or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        return self.dims > 0

    async def embed(self, text: str, tenant: str = "") -> Vector:
        """Return a text's vector, (dims,), of length 1.

        Vectors are kept for each tenant, so that no tenant learns from the time which prompts
        others have sent.

        Raises:
            EncoderUnavailableError: There is no vector within the time limit.
        """
        text = clip(text)
        key = self._key(text, tenant)
        if (known := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return known
        if self.dims == 0:
            raise EncoderUnavailableError("starting" if self.problem is None else "failed")
        slow = self._slow.get(tenant)
        if slow is not None and self._clock() < slow.paused_until_s:
            raise EncoderUnavailableError("paused")
        found = self._pending.get(key)
        if found is None:
            if not self._queue.has_room(tenant):
                raise EncoderUnavailableError("busy")
            found = self._enqueue(text, tenant)
            self._pending[key] = found
            found.vector.add_done_callback(lambda done: self._keep(key, done))
        found.wanted += 1
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                vector = await asyncio.shield(found.vector)
        except TimeoutError:
            self._count_slow(tenant)
            raise EncoderUnavailableError("slow") from None
        finally:
            found.wanted -= 1
            if not found.wanted:
                # An overloaded worker must not spend its time on texts whose requests have gone on.
                self._queue.drop(tenant, found)
        self._slow.pop(tenant, None)
        return vector

    async def embed_all(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of many texts, (texts, dims), without a time limit.

        Raises:
            EncoderUnavailableError: The worker is not ready, or fails.
        """
        if self.dims == 0:
            raise EncoderUnavailableError("starting" if self.problem is None else "failed")
        found: list[Vector] = []
        # Requests come between the parts.
        for begin in range(0, len(texts), _MAX_BATCH):
            chunk = texts[begin : begin + _MAX_BATCH]
            part = [self._enqueue(clip(text), None).vector for text in chunk]
            found += await asyncio.gather(*part)
        return np.stack(found) if found else np.zeros((0, self.dims), np.float32)

    async def close(self) -> None:
        """End the worker process."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _key(self, text: str, tenant: str) -> bytes:
        raw = f"{len(tenant)}:{tenant}{text}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(raw, digest_size=16, key=self._salt).digest()

    def _enqueue(self, text: str, tenant: str | None) -> _Waiting:
        waiting = _Waiting(text, asyncio.get_running_loop().create_future())
        self._queue.put(tenant, waiting)
        self._wake.set()
        return waiting

    def _keep(self, key: bytes, done: asyncio.Future[Vector]) -> None:
        del self._pending[key]
        # Asking for the exception marks it as seen: the request may have left long ago.
        if done.cancelled() or done.exception() is not None or not self.settings.cache_entries:
            return
        self._cache[key] = done.result()
        if len(self._cache) > self.settings.cache_entries:
            self._cache.popitem(last=False)

    def _count_slow(self, tenant: str) -> None:
        """Count a request that waited in vain, where that is due to the worker itself."""
        if self._running is None:
            return
        began_s, texts = self._running
        if self._clock() - began_s < _SLOW_SHARE * self.settings.timeout_s * texts:
            return  # others were before it, or with it
        slow = self._slow.setdefault(tenant, _Slowness())
        if len(self._slow) > _MAX_TENANTS:
            self._slow.popitem(last=False)
        slow.in_a_row += 1
        if slow.in_a_row < _SLOW_IN_A_ROW:
            return
        log.warning(
            "the encoder was too slow %d times in a row; the router does without it for %.0f s",
            slow.in_a_row,
            slow.pause_s,
        )
        slow.in_a_row = 0
        slow.paused_until_s = self._clock() + slow.pause_s
        slow.pause_s = min(2 * slow.pause_s, _LAST_PAUSE_S)

    def _batch_size(self) -> int:
        """The texts of which a batch takes half of the time limit, as far as is known."""
        if self._text_s <= 0:
            return _MAX_BATCH
        return max(1, min(_MAX_BATCH, int(0.5 * self.settings.timeout_s / self._text_s)))

    # --- the worker

    async def _keep_running(self) -> None:
        """Run the worker; start it again after a growing pause where it ends."""
        pause_s = 1.0
        while True:
            began_s = self._clock()
            try:
                await self._run()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                problem = str(error) or type(error).__name__
                if problem != self.problem:  # said once, however often it happens
                    log.error("the encoder failed; the router does without it: %s", problem)
                self.problem = problem
            finally:
                self.dims = 0
                self._fail_waiting()
            if self._clock() - began_s > _LAST_PAUSE_S:
                pause_s = 1.0
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _fail_waiting(self) -> None:
        for waiting in self._queue.take(len(self._queue)):
            waiting.fail()

    async def _run(self) -> None:
        """Run one worker process until it fails.

        Raises:
            OSError: The process could not be started.
            _WorkerFailedError: It ended, hung, or can't use the model.
        """
        settings = self.settings
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.encoder.encoder_worker", str(settings.folder)),
            *(str(settings.threads), str(settings.max_tokens)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                "OMP_NUM_THREADS": str(settings.threads),
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        try:
            kind, body = await self._reply(process, _START_S)
            if kind != READY:
                raise _WorkerFailedError(body.decode("utf-8", "replace"))
            (self.dims,) = LENGTH.unpack(body)
            self.problem = None
            self._ready.set()
            while True:
                await self._run_batch(process)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()

    async def _run_batch(self, process: asyncio.subprocess.Process) -> None:
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()
        taken = self._queue.take(self._batch_size())
        began_s = self._clock()
        self._running = began_s, len(taken)
        try:
            assert process.stdin is not None
            process.stdin.write(batch([waiting.text for waiting in taken]))
            await process.stdin.drain()
            kind, body = await self._reply(process, _HUNG_S)
            if kind != VECTORS:
                raise _WorkerFailedError(body.decode("utf-8", "replace"))
            text_s = (self._clock() - began_s) / len(taken)
            self._text_s = text_s if self._text_s <= 0 else 0.8 * self._text_s + 0.2 * text_s
            vectors = np.frombuffer(body, dtype=np.float32).reshape(len(taken), self.dims)
            for waiting, vector in zip(taken, vectors, strict=True):
                if not waiting.vector.done():
                    waiting.vector.set_result(vector.copy())
        finally:
            self._running = None
            for waiting in taken:
                waiting.fail()

    async def _reply(
        self, process: asyncio.subprocess.Process, timeout_s: float
    ) -> tuple[bytes, bytes]:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                kind, length = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
                return kind, await process.stdout.readexactly(length)
        except TimeoutError:
            raise _WorkerFailedError(f"no answer within {timeout_s:.0f} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _WorkerFailedError("its process ended") from None


class _WorkerFailedError(Exception):
    """The worker process ended, hung or reported an error."""


def clip(text: str) -> str:
    """The two ends of a text that an encoder sees."""
    if len(text) <= 2 * _EDGE_CHARS:
        return text
    return f"{text[:_EDGE_CHARS]}\n{text[-_EDGE_CHARS:]}"
