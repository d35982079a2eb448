"""`POST /v1/feedback`: a reply's id and a score, and what is learned from it.

Votes are counted in the store, so that gateways share them and Redis keeps them. Each
reply has one vote, of the tenant that it answered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from service.api.worth import Worth
from service.broker.book import Book
from service.broker.votes import SCALE, recent, shift, slice_of
from service.config import FeedbackConfig
from service.errors import Conflict, InvalidRequest, StoreGone, UnknownReply
from service.store.ending import end
from service.store.protocol import Account, Claim, Line, Note, Refused, Store
from service.store.windows import Window
from service.types import Tenant

log = logging.getLogger("coe.feedback")

_MOST = 100_000
_RENEW_S = 2.0
_LONGEST_ID = 200
_OURS = re.compile(r"(?:^|[-_])([0-9a-f]{24})(?:-[a-z0-9]{1,8})*$")


@dataclass(frozen=True, slots=True)
class Vote:
    """What was said of a reply."""

    reply: str
    score: float


def read_vote(raw: bytes) -> Vote:
    """A vote's body. Raises InvalidRequest, naming the field."""
    try:
        data: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object with `id` and `score`")
    unknown = data.keys() - {"id", "score"}
    if unknown:
        raise InvalidRequest(f"unknown field {min(unknown)[:64]!r}; fields: id, score")
    reply, score = data.get("id"), data.get("score")
    if not isinstance(reply, str) or not 1 <= len(reply) <= _LONGEST_ID:
        raise InvalidRequest("`id` must be a reply's id", param="id")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise InvalidRequest("`score` must be a number from 0 to 1", param="score")
    return Vote(reply, float(score))


class Feedback:
    """Remembers replies for a while, counts votes, and shifts what recipes are worth."""

    def __init__(
        self,
        config: FeedbackConfig,
        store: Store,
        worth: Worth,
        book: Book,
        *,
        shared: bool,
        after: Feedback | None = None,
    ) -> None:
        """`shared`: other gateways use the same store. `after`: by another config, whose replies
        may still be voted on."""
        self.enabled = config.enabled
        self._config = config
        self._store = store
        self._worth = worth
        self._book = book
        self._replies: OrderedDict[str, tuple[float, str]] = (
            OrderedDict() if after is None else after._replies
        )
        self._shared = shared
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the votes."""
        if self.enabled:
            self._renewing = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """End what is under way."""
        await end(*self._tasks, self._renewing)

    def answered(self, tenant: Tenant, ids: tuple[str, ...], label: str, recipe: int) -> None:
        """A reply went out under these ids, the first of which is its own: it may be voted on."""
        if not self.enabled or label not in self._worth.index:
            return
        # By its name: other gateways, and this one after a reload, may number recipes otherwise.
        about = f"{ids[0]}\n{label}\n{self._book.recipes[recipe].name}"
        now_s = time.monotonic()
        for one in ids:
            self._replies[_name(tenant, one)] = (now_s, about)
        while self._replies:
            oldest = next(iter(self._replies))
            stale = now_s - self._replies[oldest][0] > self._config.keep_s
            if not stale and len(self._replies) <= _MOST:
                break
            del self._replies[oldest]
        if self._shared:
            task = asyncio.create_task(self._share(tenant, ids, about))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _share(self, tenant: Tenant, ids: tuple[str, ...], about: str) -> None:
        try:
            for one in ids:
                await self._store.put(
                    f"replied/{_name(tenant, one)}", about.encode(), ttl_s=self._config.keep_s
                )
        except StoreGone:
            log.debug("a reply can't be voted on elsewhere: the store is gone")

    async def vote(self, tenant: Tenant, vote: Vote) -> dict[str, Any]:
        """Count a vote. Raises UnknownReply, Conflict, StoreGone."""
        name = _name(tenant, _plain(vote.reply))
        about = await self._about(name)
        if about is None:
            raise UnknownReply(
                f"no reply {vote.reply[:64]!r} of yours in the last {self._config.keep_s} s, or it "
                "was of an expert that you named",
                param="id",
            )
        reply, label, recipe = about.split("\n")
        voted = f"vote/{_name(tenant, reply)}"
        # For as long as anybody could vote on it, whatever day it is.
        once = Account(voted, 1, Window("sliding", self._config.keep_s * 1000))
        granted = await self._store.reserve(Claim(voted, (Line(once, 1),)))
        if isinstance(granted, Refused):
            raise Conflict(f"reply {vote.reply[:64]!r} has its vote")
        key = _key(label, recipe)
        now_s = time.time()
        note = Note(
            _slice_name(slice_of(now_s, self._config.half_life_s)),
            {f"{key}/n": 1, f"{key}/sum": round(vote.score * SCALE)},
            int(5 * self._config.half_life_s),
        )
        await self._store.settle(granted, [1], note)
        await self._renew()
        return {"id": vote.reply, "recipe": recipe, "category": label, "score": vote.score}

    async def _about(self, name: str) -> str | None:
        held = self._replies.get(name)
        if held is not None and time.monotonic() - held[0] <= self._config.keep_s:
            return held[1]
        if not self._shared:
            return None
        told = await self._store.get(f"replied/{name}")
        return told.decode() if told is not None else None

    async def _follow(self) -> None:
        while True:
            try:
                await self._renew()
            except StoreGone:
                log.debug("votes can't be read; the last ones stand")
            await asyncio.sleep(_RENEW_S)

    async def _renew(self) -> None:
        """Shift what is believed by the votes that there are now."""
        config = self._config
        names = [_slice_name(i) for i in recent(time.time(), config.half_life_s)]
        slices = await self._store.counts(names)
        keys = {key.rpartition("/")[0] for counts in slices for key in counts}
        shifts = self._worth.shift
        fresh = np.zeros_like(shifts)
        for row, label in enumerate(self._worth.labels):
            prefix = _key(label, "")
            if not any(key.startswith(prefix) for key in keys):
                continue
            for column, recipe in enumerate(self._book.recipes):
                key = _key(label, recipe.name)
                if key in keys:
                    believed = self._worth.expected(label, column)
                    fresh[row, column] = shift(
                        list(slices), key, believed, config.votes, config.max_shift
                    )
        shifts[:] = fresh


def _plain(reply: str) -> str:
    """A reply's id without what endpoints put around ours: chatcmpl-ID, msg_ID, ID-0."""
    ours = _OURS.search(reply)
    return ours[1] if ours is not None else reply


def _name(tenant: Tenant, reply: str) -> str:
    return f"{tenant.name}/{reply}"


def _key(label: str, recipe: str) -> str:
    return f"{label}\n{recipe}"


def _slice_name(number: int) -> str:
    return f"votes/{number}"
