"""What calls had used that were given up: for gateways, which charge their clients for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# More than gateways leave unasked for, unless they die.
_MOST = 4096
# Longer than an engine takes to stop a request.
_WAIT_S = 6.0


class AbandonedCalls:
    """Remembers the tokens of each call that ended without its answer, by request id."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[int, int]] = {}
        self._under_way: dict[str, asyncio.Event] = {}
        self._begun: set[str] = set()

    @contextmanager
    def call(self, request_id: str) -> Iterator[None]:
        """A call is under way in this pool, waiting or running."""
        ended = self._under_way[request_id] = asyncio.Event()
        try:
            yield
        except BaseException:
            if request_id not in self._begun:
                # It waited all the time.
                self.note(request_id, 0, 0)
            raise
        finally:
            self._begun.discard(request_id)
            del self._under_way[request_id]
            ended.set()

    def begun(self, request_id: str) -> None:
        """An engine has the call now: only it can tell what was used."""
        self._begun.add(request_id)

    def note(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """A call that is given up had a prompt of so many tokens, and this much of an answer."""
        self._used[request_id] = prompt_tokens, answer_tokens
        if len(self._used) > _MOST:
            del self._used[next(iter(self._used))]

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Tokens of a given-up call's prompt and answer, told once; None where nobody knows.

        Waits until the call has ended, which it does soon: its gateway has left it.
        """
        ended = self._under_way.get(request_id)
        if ended is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await ended.wait()
        return self._used.pop(request_id, None)
