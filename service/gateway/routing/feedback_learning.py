"""Learns from feedback: counts votes on replies, and shifts the quality model by them.

Each reply has one vote, of the tenant that it answered. Votes are counted in the store, so that
gateways share them and Redis keeps them, and they are the tenant's own: they shift what recipes
are worth for its requests only. Which reply was whose may be lost, and stands elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from service.broker.feedback_prior import fields, recent, shift, slice_of, tally
from service.broker.recipe_catalog import RecipeCatalog
from service.config import FeedbackConfig
from service.errors import (
    ConflictError,
    InvalidRequestError,
    ReplyNotFoundError,
    StoreUnavailableError,
)
from service.gateway.routing.quality_model import QualityModel
from service.store.record_names import join_name
from service.store.store_interface import Granted, Store, StoreClaim, UsageNote
from service.store.volatile_store import VolatileStore
from service.task_cancellation import cancel_and_wait
from service.types import Tenant

log = logging.getLogger("coe.feedback")

_MOST = 100_000
_RENEW_S = 2.0
# Votes of a tenant without requests are followed for this long.
_ACTIVE_S = 600.0
_LONGEST_ID = 200
_OURS = re.compile(r"(?:^|[-_])([0-9a-f]{24})(?:-[a-z0-9]{1,8})*$")


@dataclass(frozen=True, slots=True)
class Vote:
    """A score for a reply."""

    reply: str
    score: float


def read_vote(raw: bytes) -> Vote:
    """Parse a vote. Raises InvalidRequestError, which names the field."""
    try:
        data: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object with `id` and `score`")
    unknown = data.keys() - {"id", "score"}
    if unknown:
        raise InvalidRequestError(f"unknown field {min(unknown)[:64]!r}; fields: id, score")
    reply, score = data.get("id"), data.get("score")
    if not isinstance(reply, str) or not 1 <= len(reply) <= _LONGEST_ID:
        raise InvalidRequestError("`id` must be a reply's id", param="id")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise InvalidRequestError("`score` must be a number from 0 to 1", param="score")
    return Vote(reply, float(score))


class FeedbackService:
    """Remembers replies for a while, counts votes on them, and shifts the quality model."""

    def __init__(
        self,
        config: FeedbackConfig,
        store: Store,
        volatile: VolatileStore,
        quality_model: QualityModel,
        catalog: RecipeCatalog,
        *,
        shared: bool,
        tenants: Iterable[str] = (),
        after: FeedbackService | None = None,
    ) -> None:
        """Prepare to learn from votes.

        `shared`: other gateways use the same `volatile` store. `tenants`: votes of these are read
        from the start, votes of others at their first request. `after`: the service of the previous
        config, whose replies may still be voted on.
        """
        self.enabled = config.enabled
        self._config = config
        self._store = store
        self._volatile = volatile
        self._quality_model = quality_model
        self._catalog = catalog
        self._columns = {recipe.name: i for i, recipe in enumerate(catalog.recipes)}
        self._replies: OrderedDict[str, tuple[float, str]] = (
            OrderedDict() if after is None else after._replies
        )
        self._shared = shared
        # When each tenant last sent a request. Votes of other tenants are not read.
        self._active: dict[str, float] = dict.fromkeys(tenants, time.monotonic())
        # Counts by tenant and slice; only the newest slices change.
        self._slices: dict[str, dict[int, Mapping[str, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to follow the votes."""
        if self.enabled:
            self._renewing = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop the background tasks."""
        await cancel_and_wait(*self._tasks, self._renewing)

    def record_answer(self, tenant: Tenant, ids: tuple[str, ...], label: str, recipe: int) -> None:
        """Remember a reply, so that it can be voted on.

        Args:
            tenant: The tenant that got it.
            ids: Its ids; the first is its own.
            label: Its category.
            recipe: The index of the recipe that answered.
        """
        now_s = time.monotonic()
        if not self.enabled or label not in self._quality_model.index:
            return
        self._active[tenant.name] = now_s
        # The recipe is kept by name: other gateways and later configs may number recipes anew.
        about = f"{ids[0]}\n{label}\n{self._catalog.recipes[recipe].name}"
        for reply_id in ids:
            self._replies[join_name(tenant.name, reply_id)] = (now_s, about)
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
            for reply_id in ids:
                name = join_name("replied", tenant.name, reply_id)
                await self._volatile.put(name, about.encode(), ttl_s=self._config.keep_s)
        except StoreUnavailableError:
            log.debug("cannot share a reply for feedback: the store is unavailable")

    async def vote(self, tenant: Tenant, vote: Vote) -> dict[str, Any]:
        """Count a vote. Raises ReplyNotFoundError, ConflictError, StoreUnavailableError."""
        # A client's own id may look like one of ours with an endpoint's prefix.
        about = await self._about(tenant, vote.reply) or await self._about(
            tenant, _plain(vote.reply)
        )
        if about is None:
            raise ReplyNotFoundError(
                f"no reply {vote.reply[:64]!r} of yours in the last {self._config.keep_s} s, or it "
                "was of an expert that you named",
                param="id",
            )
        reply, label, recipe = about.split("\n")
        voted = join_name("vote", tenant.name, reply)
        # The mark stays as long as anybody could vote on the reply.
        if not await self._volatile.add(voted, b"1", ttl_s=self._config.keep_s):
            raise ConflictError(f"feedback for {vote.reply[:64]!r} was already submitted")
        note = UsageNote(
            _slice_name(slice_of(time.time(), self._config.half_life_s), tenant.name),
            fields(_subject(label, recipe), tenant.key, vote.score),
            int(5 * self._config.half_life_s),
        )
        await self._store.settle(Granted(StoreClaim(voted, ()), 0, (), ()), [], note)
        self._active[tenant.name] = time.monotonic()
        # A vote counts also while the store is away; the store gets it later.
        with contextlib.suppress(StoreUnavailableError):
            await self.refresh([tenant.name])
        return {"id": vote.reply, "recipe": recipe, "category": label, "score": vote.score}

    async def _about(self, tenant: Tenant, reply: str) -> str | None:
        held = self._replies.get(join_name(tenant.name, reply))
        if held is not None and time.monotonic() - held[0] <= self._config.keep_s:
            return held[1]
        if not self._shared:
            return None
        shared = await self._volatile.get(join_name("replied", tenant.name, reply))
        return shared.decode() if shared is not None else None

    async def _follow(self) -> None:
        while True:
            since_s = time.monotonic() - _ACTIVE_S
            self._active = {name: at_s for name, at_s in self._active.items() if at_s >= since_s}
            try:
                await self.refresh(list(self._active))
            except StoreUnavailableError:
                log.debug("cannot read votes; keeping the last ones")
            await asyncio.sleep(_RENEW_S)

    async def refresh(self, tenants: Sequence[str]) -> None:
        """Read the votes of these tenants, and shift the quality model by them."""
        numbers = recent(time.time(), self._config.half_life_s)
        wanted = [
            (tenant, number)
            for tenant in tenants
            for number in numbers
            if number >= numbers[0] - 1 or number not in self._slices.get(tenant, {})
        ]
        found = await self._store.counts([_slice_name(n, tenant) for tenant, n in wanted])
        for (tenant, number), counts in zip(wanted, found, strict=True):
            self._slices.setdefault(tenant, {})[number] = counts
        for tenant in tenants:
            known = self._slices[tenant]
            self._slices[tenant] = {number: known[number] for number in numbers if number in known}
            self._shift(tenant, [known.get(number, {}) for number in numbers])

    def _shift(self, tenant: str, slices: list[Mapping[str, int]]) -> None:
        voted = tally(slices)
        if not voted:
            self._quality_model.shifts.pop(tenant, None)
            return
        config, quality_model = self._config, self._quality_model
        fresh = np.zeros((len(quality_model.labels), len(self._catalog.recipes)))
        for subject, voters in voted.items():
            label, _, recipe = subject.partition("\n")
            row, column = quality_model.index.get(label), self._columns.get(recipe)
            if row is not None and column is not None:
                believed = quality_model.expected(label, column)
                fresh[row, column] = shift(voters, believed, config.votes, config.max_shift)
        quality_model.shifts[tenant] = fresh


def _plain(reply: str) -> str:
    """A reply's id without the prefixes and suffixes of endpoints: chatcmpl-ID, msg_ID, ID-0."""
    ours = _OURS.search(reply)
    return ours[1] if ours is not None else reply


def _subject(label: str, recipe: str) -> str:
    return f"{label}\n{recipe}"


def _slice_name(number: int, tenant: str) -> str:
    return join_name("votes", str(number), tenant)
