"""Clients with one key that ask until nothing more is granted, some leaving in mid-answer."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import aiohttp
import orjson

_CHAT = "/v1/chat/completions"
_MOST_S = 40.0
_TOKENS = 7


class Clients:
    """What came of it: answers and their tokens, refusals, and those who left.

    Raises RuntimeError on any other reply than an answer or a 429.
    """

    def __init__(self, port: int, key: str, *, seed: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._headers = {"authorization": f"Bearer {key}"}
        self._draw = random.Random(seed)
        self.served = self.used_tokens = self.refused = self.left = 0

    async def hammer(self, clients: int, allowed: int, *, leaving: float) -> None:
        """Ask, all at once and again and again, until the limit is used up in the ledger."""
        end_s = time.monotonic() + _MOST_S
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers) as session:

            async def one() -> None:
                while not full.is_set() and time.monotonic() < end_s:
                    await self._ask(session, leaves=self._draw.random() < leaving)

            async def watch() -> None:
                while not full.is_set() and time.monotonic() < end_s:
                    if await self._spent(session) >= allowed:
                        full.set()
                    await asyncio.sleep(0.2)

            full = asyncio.Event()
            await asyncio.gather(watch(), *(one() for _ in range(clients)))
            # Once more, together, against a limit that is used up.
            await asyncio.gather(*(self._ask(session, leaves=False) for _ in range(clients)))

    async def _ask(self, session: aiohttp.ClientSession, *, leaves: bool) -> None:
        body = {
            "model": "sim",
            "messages": [{"role": "user", "content": "hammer"}],
            "max_tokens": _TOKENS,
            "stream": leaves,
        }
        async with session.post(self._url + _CHAT, json=body) as reply:
            if reply.status == 429:
                if "retry-after" not in reply.headers:
                    raise RuntimeError("a 429 without Retry-After")
                self.refused += 1
                return
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {(await reply.text())[:200]}")
            if leaves:
                await reply.content.readuntil(b"\n\n")
                reply.close()
                self.left += 1
                return
            told: Any = orjson.loads(await reply.read())
            self.served += 1
            self.used_tokens += told["usage"]["completion_tokens"]

    async def spent(self) -> int:
        """What the ledger says, once nothing is reserved but by slices."""
        async with aiohttp.ClientSession(headers=self._headers) as session:
            return await self._spent(session)

    async def _spent(self, session: aiohttp.ClientSession) -> int:
        async with session.get(self._url + "/v1/usage") as reply:
            (limit,) = (await reply.json())["limits"]
            spent: int = round(limit["spent"])
            return spent
