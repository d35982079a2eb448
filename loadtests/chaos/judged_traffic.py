"""Traffic for the chaos and soak runs, and a judge of every reply.

The simulated engine's answer is a function of expert, prompt and length. The judge therefore sees
in the text itself whether another model answered, or a piece was mixed up, doubled or lost.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from service.engine.simulated_engine import answer_text

# How a request can end.
RIGHT = "right"
TYPED = "typed error"
BROKEN = "stream ended by an error event"
RESET = "reset"
LEFT = "left by the client"
# And how none may.
WRONG = "wrong or doubled answer"
UNTYPED = "untyped error"
LATE = "late"
BAD = (WRONG, UNTYPED, LATE)
_LATE_S = 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a request. Times of `time.monotonic`; `detail`: error code or observation."""

    kind: str
    model: str
    began_s: float
    ended_s: float
    detail: str = ""


@dataclass(slots=True)
class Ask:
    """A request of the traffic."""

    model: str
    text: str
    tokens: int
    stream: bool
    deadline_s: float
    experts: frozenset[str]

    def body(self) -> dict[str, Any]:
        """Return the request's JSON body."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.tokens,
            "stream": self.stream,
        }


def judged(ask: Ask, status: int, expert: str, body: bytes) -> tuple[str, str]:
    """Classify a reply's end, with a detail. `told` is the header x-coe-expert."""
    if status != 200:
        try:
            error = orjson.loads(body)["error"]
            typed = {"message", "type", "param", "code"} <= error.keys() and error["code"]
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            typed = False
        if typed and status >= 400:
            return TYPED, f"{status} {error['code']}"
        return UNTYPED, f"{status} {body[:80]!r}"
    try:
        texts, models, ended = _streamed(body) if ask.stream else _whole(body)
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        return WRONG, f"unreadable ({type(error).__name__}): {body[:80]!r}"
    if ended == "error":
        right = answer_text(expert, ask.text, ask.tokens)
        if expert in ask.experts and texts == right[: len(texts)]:
            return BROKEN, ""
        return WRONG, f"broken and wrong by {expert}: {''.join(texts)[:60]!r}"
    if ended != "done" or models != {expert} or expert not in ask.experts:
        return WRONG, f"{ended} by {expert}, models {sorted(models)}"
    if "".join(texts) != "".join(answer_text(expert, ask.text, ask.tokens)):
        return WRONG, f"by {expert}: {''.join(texts)[:60]!r}"
    return RIGHT, ""


def _whole(body: bytes) -> tuple[list[str], set[str], str]:
    data = orjson.loads(body)
    return [choice["message"]["content"] for choice in data["choices"]], {data["model"]}, "done"


def _streamed(body: bytes) -> tuple[list[str], set[str], str]:
    """Texts, models, and how it ended: done, error, cut, or twice."""
    texts: list[str] = []
    models: set[str] = set()
    ended = "cut"
    for line in body.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            ended = {"cut": "done", "error": "error"}.get(ended, "twice")
            continue
        event = orjson.loads(line[6:])
        if "error" in event:
            ended = "error"
            continue
        if ended != "cut":
            ended = "twice"
        models.add(event["model"])
        texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
    return texts, models, ended


@dataclass(slots=True)
class Tally:
    """The results of the requests in one period."""

    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        """Return the number of requests by kind of end."""
        return Counter(verdict.kind for verdict in self.verdicts)

    @property
    def codes(self) -> Counter[str]:
        """Errors by status and code."""
        return Counter(verdict.detail for verdict in self.verdicts if verdict.kind == TYPED)

    def details(self, kind: str) -> list[str]:
        """Return the details of one kind, the most frequent first."""
        seen = Counter(verdict.detail for verdict in self.verdicts if verdict.kind == kind)
        return [f"{count} x {detail}" for detail, count in seen.most_common(3)]

    def works_again_s(self, fault_s: float) -> float:
        """From a fault until the first request begun after it was answered right; inf: never."""
        right = (
            verdict.ended_s
            for verdict in self.verdicts
            if verdict.kind == RIGHT and verdict.began_s >= fault_s
        )
        return min(right, default=float("inf")) - fault_s


class Traffic:
    """Clients in closed loops, each with one request under way.

    `mix`: a model to ask for, the experts that may answer then, and a deadline in s.
    `leaving`: share of streams whose client leaves after the first piece.
    `give_up_s`: time after which a client leaves a request that has not ended; it counts as late.
    """

    def __init__(
        self,
        port: int,
        mix: list[tuple[str, frozenset[str], float]],
        clients: int,
        *,
        key: str = "",
        seed: int = 1,
        pause_s: float = 0.02,
        leaving: float = 0.0,
        host: str = "127.0.0.1",
        give_up_s: float | None = None,
    ) -> None:
        self._url = f"http://{host}:{port}/v1/chat/completions"
        self._mix = mix
        self._clients = clients
        self._key = key
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._leaving = leaving
        self._give_up_s = give_up_s
        self._ids = itertools.count()
        self._tallies: list[Tally] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.idle = asyncio.Event()

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Collect the requests that end within the context."""
        made = Tally()
        self._tallies.append(made)
        try:
            yield made
        finally:
            self._tallies.remove(made)

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(self._clients)]
        return self

    async def __aexit__(self, *args: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._give_up_s),
        ) as session:
            while not self._stopping:
                model, experts, deadline_s = self._mix[next(self._ids) % len(self._mix)]
                ask = Ask(
                    model,
                    f"number {next(self._ids)} of client {number}",
                    self._random.choice((1, 4, 16, 32)),
                    self._random.random() < 0.5,
                    deadline_s,
                    experts,
                )
                verdict = await self._one(session, ask)
                for tally in self._tallies:
                    tally.verdicts.append(verdict)
                # One that fails at once must not become a flood.
                await asyncio.sleep(self._pause_s if verdict.kind != RESET else 0.1)

    async def _one(self, session: aiohttp.ClientSession, ask: Ask) -> Verdict:
        headers = {"x-coe-deadline-ms": str(int(ask.deadline_s * 1000))}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        began_s = time.monotonic()
        first_s = 0.0
        body = bytearray()
        leaves = ask.stream and self._random.random() < self._leaving
        try:
            async with session.post(self._url, json=ask.body(), headers=headers) as reply:
                first_s = time.monotonic()
                async for piece in reply.content.iter_any():
                    body += piece
                    if leaves:
                        reply.close()
                        return Verdict(LEFT, ask.model, began_s, time.monotonic())
            kind, detail = judged(
                ask, reply.status, reply.headers.get("x-coe-expert", ""), bytes(body)
            )
        except TimeoutError:
            kind, detail = LATE, f"no end within {self._give_up_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            kind, detail = RESET, type(error).__name__
        ended_s = time.monotonic()
        due_s = began_s + ask.deadline_s + _LATE_S
        if kind not in (RESET, LATE) and (first_s if ask.stream else ended_s) > due_s:
            return Verdict(
                LATE, ask.model, began_s, ended_s, f"{kind} after {ended_s - began_s:.1f} s"
            )
        return Verdict(kind, ask.model, began_s, ended_s, detail)
