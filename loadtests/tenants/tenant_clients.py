"""Clients with one key that send requests until they are refused; some leave early."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_MESSAGES, _RESPONSES = "/v1/messages", "/v1/responses"
# An event with a token, in each API.
_PIECES = (b'"choices":[{', b'"content_block_delta"', b'"response.output_text.delta"')
_MOST_PIECES = 3
_MOST_S = 40.0
_TOKENS = 7
_SAID = {"messages": [{"role": "user", "content": "hammer"}]}


@dataclass(frozen=True)
class Shape:
    """A form of request: its endpoint, and its body without length and stream.

    Attributes:
        path: Path of the endpoint.
        body: The body.
        refused: Whether every service must refuse it.
        length: The field that bounds the answer's tokens.
    """

    path: str
    body: dict[str, Any]
    refused: bool = False
    length: str = "max_tokens"

    @property
    def most_tokens(self) -> int:
        """Most tokens of all its answers together; 0 where it is refused."""
        if self.refused:
            return 0
        prompts = self.body.get("prompt")
        count = len(prompts) if isinstance(prompts, list) else 1
        return _TOKENS * count * int(self.body.get("n", 1))


PLAIN = (Shape(_CHAT, _SAID),)
# Whatever asks for more than one answer, in every way that an engine would understand.
MANY = (
    Shape(_CHAT, _SAID),
    Shape(_CHAT, {**_SAID, "n": 4}),
    Shape(_TEXT, {"prompt": "hammer"}),
    Shape(_TEXT, {"prompt": ["hammer"] * 3}),
    Shape(_TEXT, {"prompt": ["hammer"] * 3, "n": 2}),
    Shape(_CHAT, {**_SAID, "n": "128"}, refused=True),
    Shape(_CHAT, {**_SAID, "n": 64.0}, refused=True),
    Shape(_TEXT, {"prompt": ["hammer"] * 400}, refused=True),
    Shape(_TEXT, {"prompt": "hammer", "best_of": "16384"}, refused=True),
)
# One answer, from each endpoint that makes any.
ENDPOINTS = (
    Shape(_CHAT, _SAID),
    Shape(_TEXT, {"prompt": "hammer"}),
    Shape(_MESSAGES, _SAID),
    Shape(_RESPONSES, {"input": "hammer"}, length="max_output_tokens"),
)


class Clients:
    """What came of it: answers and their tokens, refusals, and those who left.

    Attributes:
        served: Whole answers.
        used_tokens: Tokens of those answers, by their usage.
        refused: Replies of status 429.
        invalid: Requests that were refused as invalid.
        left: Clients that left in a stream.
        seen_tokens: Tokens that those had received.
        gone: Clients that left before they knew whether they were let in.
        most_unseen_tokens: Most tokens that were made for those who left, beyond what they saw.
        left_on: Clients that left, by endpoint and whether they streamed.

    Raises RuntimeError on any other reply than an answer or a 429.
    """

    def __init__(self, port: int, key: str, *, seed: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._headers = {"authorization": f"Bearer {key}"}
        self._draw = random.Random(seed)
        self.served = self.used_tokens = self.refused = self.left = self.invalid = 0
        self.gone = self.seen_tokens = self.most_unseen_tokens = 0
        self.left_on: Counter[tuple[str, bool]] = Counter()

    async def hammer(
        self, clients: int, allowed: int, *, leaving: float, shapes: Sequence[Shape] = PLAIN
    ) -> None:
        """Ask, all at once and again and again, until the limit is used up in the ledger.

        `leaving`: the share that leaves early: of streams after a few tokens, of whole answers
        before the first byte.
        """
        end_s = time.monotonic() + _MOST_S
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers) as session:

            async def one() -> None:
                while not full.is_set() and time.monotonic() < end_s:
                    leaves = self._draw.random() < leaving
                    await self._ask(session, self._draw.choice(shapes), leaves=leaves)

            async def watch() -> None:
                while not full.is_set() and time.monotonic() < end_s:
                    if await self._spent(session) >= allowed:
                        full.set()
                    await asyncio.sleep(0.5)

            full = asyncio.Event()
            await asyncio.gather(watch(), *(one() for _ in range(clients)))
            # Once more, together, against a limit that is used up.
            again = (self._ask(session, shapes[0], leaves=False) for _ in range(clients))
            await asyncio.gather(*again)

    async def _ask(self, session: aiohttp.ClientSession, shape: Shape, *, leaves: bool) -> None:
        stream = leaves and self._draw.random() < 0.5
        body = {"model": "sim", **shape.body, shape.length: _TOKENS, "stream": stream}
        asking = session.post(self._url + shape.path, json=body)
        if leaves and not stream and not shape.refused:
            # Before the first byte: the answer takes longer than that.
            try:
                async with asyncio.timeout(self._draw.uniform(0.0, 0.02)):
                    async with asking as reply:
                        await self._read(reply, shape, leaves=False)
            except TimeoutError:
                self.gone += 1
                self._record_left(shape, 0, stream=False)
            return
        async with asking as reply:
            await self._read(reply, shape, leaves=leaves)

    async def _read(self, reply: aiohttp.ClientResponse, shape: Shape, *, leaves: bool) -> None:
        if reply.status == 429:
            if "retry-after" not in reply.headers:
                raise RuntimeError("a 429 without Retry-After")
            self.refused += 1
            return
        if shape.refused and reply.status == 400:
            self.invalid += 1
            return
        if reply.status != 200 or shape.refused:
            raise RuntimeError(f"status {reply.status}: {(await reply.text())[:200]}")
        if leaves:
            seen, most = 0, self._draw.randint(1, _MOST_PIECES)
            while seen < most and (event := await reply.content.readuntil(b"\n\n")):
                seen += any(piece in event for piece in _PIECES)
            reply.close()
            self.left += 1
            self._record_left(shape, seen, stream=True)
            return
        payload: Any = orjson.loads(await reply.read())
        self.served += 1
        usage = payload["usage"]
        self.used_tokens += usage.get("completion_tokens", usage.get("output_tokens"))

    def _record_left(self, shape: Shape, seen: int, *, stream: bool) -> None:
        self.seen_tokens += seen
        self.most_unseen_tokens += shape.most_tokens - seen
        self.left_on[shape.path, stream] += 1

    async def spent(self) -> int:
        """Return the ledger's usage once nothing but offline quotas is reserved."""
        async with aiohttp.ClientSession(headers=self._headers) as session:
            return await self._spent(session)

    async def _spent(self, session: aiohttp.ClientSession) -> int:
        async with session.get(self._url + "/v1/usage") as reply:
            (limit,) = (await reply.json())["limits"]
            spent: int = round(limit["spent"])
            return spent
