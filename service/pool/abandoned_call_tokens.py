"""The tokens of calls that ended without a complete answer, until their gateways fetch them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A live gateway fetches its counts long before this many calls are kept.
_MOST_ABANDONED = 4096
# An engine stops a request in less time than this.
_WAIT_S = 6.0


class AbandonedCalls:
    """The token counts of calls that ended without a complete answer, by request id."""

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
                # The engine never got the call, so no tokens will be recorded.
                self.record(request_id, 0, 0)
            raise
        finally:
            self._running.discard(request_id)
            # A later call of the same id has an event of its own, which must stay.
            if self._under_way.get(request_id) is ended:
                del self._under_way[request_id]
            ended.set()

    def mark_running(self, request_id: str) -> None:
        """Mark that an engine has the call now. The engine records its tokens."""
        self._running.add(request_id)

    def record(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Record the tokens of an abandoned call."""
        self._used[request_id] = prompt_tokens, answer_tokens
        if len(self._used) > _MOST_ABANDONED:
            del self._used[next(iter(self._used))]

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Return the prompt and answer tokens of a call that its gateway has abandoned.

        The method waits until the call has ended, because an engine needs a moment to stop it. It
        returns the counts only once.

        Returns:
            The numbers of prompt and answer tokens, or None where they are unknown.
        """
        ended = self._under_way.get(request_id)
        if ended is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await ended.wait()
        return self._used.pop(request_id, None)
