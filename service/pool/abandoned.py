"""The tokens of calls that gateways have given up, for which they charge their clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Gateways that live ask for their calls long before there are this many.
_MOST = 4096
# An engine takes less than that to stop a request.
_WAIT_S = 6.0


class AbandonedCalls:
    """The tokens of each call that ended without its answer, by request id."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[int, int]] = {}
        self._under_way: dict[str, asyncio.Event] = {}
        self._running: set[str] = set()

    @contextmanager
    def call(self, request_id: str) -> Iterator[None]:
        """Follow a call while it waits or runs in this pool."""
        ended = self._under_way[request_id] = asyncio.Event()
        try:
            yield
        except BaseException:
            if request_id not in self._running:
                # It never ran.
                self.record(request_id, 0, 0)
            raise
        finally:
            self._running.discard(request_id)
            del self._under_way[request_id]
            ended.set()

    def mark_running(self, request_id: str) -> None:
        """Leave it to the engine, which has the call now, to record its tokens."""
        self._running.add(request_id)

    def record(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Record the tokens of a call that was given up."""
        self._used[request_id] = prompt_tokens, answer_tokens
        if len(self._used) > _MOST:
            del self._used[next(iter(self._used))]

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Return the prompt and answer tokens of a call that its gateway has given up.

        It waits until the call has ended, which takes an engine a moment. The tokens are returned
        once.

        Returns:
            The tokens, or None where they are not known.
        """
        ended = self._under_way.get(request_id)
        if ended is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await ended.wait()
        return self._used.pop(request_id, None)
