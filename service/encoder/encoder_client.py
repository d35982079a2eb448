"""The gateway's side of the encoder: batches, a cache, and a time limit for every request.

Texts of all requests that arrive while a batch runs go into the next one. A request waits for its
vector no longer than the time limit. An encoder that fails, hangs or is often too slow is left
alone for a while, so that requests don't wait for it in vain.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import sys
import time
from collections import OrderedDict
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
# After so many requests in a row that waited in vain, the encoder is left alone for a while.
_SLOW_IN_A_ROW = 5
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


@dataclass(slots=True)
class _Waiting:
    text: str
    vector: asyncio.Future[Vector]

    def fail(self) -> None:
        """Give up, if there is no vector yet."""
        if not self.vector.done():
            self.vector.set_exception(EncoderUnavailableError("failed"))
            self.vector.exception()  # nobody may wait for it any more


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
        self._pending: dict[bytes, asyncio.Future[Vector]] = {}
        self._queue: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._slow = 0
        self._pause_s = _FIRST_PAUSE_S
        self._paused_until_s = -float("inf")
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
        if self._clock() < self._paused_until_s:
            raise EncoderUnavailableError("paused")
        found = self._pending.get(key)
        if found is None:
            if len(self._queue) >= _MAX_WAITING:
                raise EncoderUnavailableError("busy")
            found = self._enqueue(text)
            self._pending[key] = found
            found.add_done_callback(lambda done: self._keep(key, done))
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                vector = await asyncio.shield(found)
        except TimeoutError:
            self._count_slow()
            raise EncoderUnavailableError("slow") from None
        self._slow, self._pause_s = 0, _FIRST_PAUSE_S
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
            part = [self._enqueue(clip(text)) for text in texts[begin : begin + _MAX_BATCH]]
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

    def _enqueue(self, text: str) -> asyncio.Future[Vector]:
        vector: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(text, vector))
        self._wake.set()
        return vector

    def _keep(self, key: bytes, done: asyncio.Future[Vector]) -> None:
        del self._pending[key]
        # Asking for the exception marks it as seen: the request may have left long ago.
        if done.cancelled() or done.exception() is not None or not self.settings.cache_entries:
            return
        self._cache[key] = done.result()
        if len(self._cache) > self.settings.cache_entries:
            self._cache.popitem(last=False)

    def _count_slow(self) -> None:
        self._slow += 1
        if self._slow < _SLOW_IN_A_ROW:
            return
        log.warning(
            "the encoder was too slow %d times in a row; the router does without it for %.0f s",
            self._slow,
            self._pause_s,
        )
        self._slow = 0
        self._paused_until_s = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)

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
        waiting, self._queue = self._queue, []
        for one in waiting:
            one.fail()

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
        taken, self._queue = self._queue[:_MAX_BATCH], self._queue[_MAX_BATCH:]
        try:
            assert process.stdin is not None
            process.stdin.write(batch([one.text for one in taken]))
            await process.stdin.drain()
            kind, body = await self._reply(process, _HUNG_S)
            if kind != VECTORS:
                raise _WorkerFailedError(body.decode("utf-8", "replace"))
            vectors = np.frombuffer(body, dtype=np.float32).reshape(len(taken), self.dims)
            for one, vector in zip(taken, vectors, strict=True):
                if not one.vector.done():
                    one.vector.set_result(vector.copy())
        finally:
            for one in taken:
                one.fail()

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
