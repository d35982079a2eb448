"""The store that several gateways share, and what a gateway does when it is gone.

While Redis answers, every claim is decided there. When it does not, a gateway spends the
slices that it was granted before, for as long as its lease runs, and then refuses (503).
What could not be told meanwhile is kept and told when Redis is back, each thing once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import StoreUnavailableError
from service.store.offline_quota import OfflineQuotas
from service.store.protocol import (
    Account,
    AccountBalance,
    Granted,
    Health,
    Refused,
    StoreClaim,
    UsageNote,
)
from service.store.redis_client import Lines, RedisClient
from service.store.windows import Window
from service.tasks import cancel_and_wait

log = logging.getLogger("coe.store")

_BEAT_S = 1.0
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 2.0
_TIDY_S = 1.0


@dataclass(frozen=True, slots=True)
class _PendingSettlement:
    """What the store has to be told still. `used` None: a claim of unknown outcome is undone."""

    granted: Granted | None
    claim_id: str
    used: tuple[int, ...] | None = None
    note: UsageNote | None = None

    @property
    def lines(self) -> Lines:
        """As the client takes them."""
        assert self.granted is not None
        assert self.used is not None
        return lines_of(self.granted, self.used)


def lines_of(granted: Granted, used: Sequence[int]) -> Lines:
    """As the client takes them."""
    return [
        (
            line.account.name,
            start,
            amount,
            spent,
            line.account.limit,
            *_sliding(line.account.window),
        )
        for line, start, amount, spent in zip(
            granted.claim.lines, granted.starts_ms, granted.amounts, used, strict=True
        )
    ]


def _sliding(window: Window) -> tuple[int, int]:
    """Length and piece of a sliding window in ms; of others 0."""
    return (window.length_ms, window.part_ms) if window.kind == "sliding" else (0, 0)


class RedisStore:
    """See `Store`. `up`: whether Redis answers, as far as known."""

    def __init__(
        self, client: RedisClient, *, share: float, lease_s: float, beat_s: float = _BEAT_S
    ) -> None:
        self._client = client
        self._lease_s = lease_s
        self._beat_s = beat_s
        self._slices = OfflineQuotas(share)
        self._open: dict[str, Granted] = {}
        self._owed: dict[str, _PendingSettlement] = {}
        self._notes: dict[str, UsageNote] = {}
        self._sent_notes: tuple[int, list[UsageNote]] = (0, [])
        self._number = 0
        self._lease_ends_s = 0.0
        self._retry_s = _FIRST_RETRY_S
        self._gone_since_s = time.monotonic()
        self._beating: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._stopping = False
        self._why = "the store is gone"
        self.up = False
        self.outages = 0
        self.offline_grants = 0

    async def start(self) -> None:
        """See `Store`."""
        await self._heartbeat()
        self._beating = asyncio.create_task(self._heartbeat_loop())

    async def stop(self) -> None:
        """See `Store`."""
        self._stopping = True
        self._hurry.set()
        if self._beating is not None:
            await asyncio.wait({self._beating}, timeout=_TIDY_S)
            await cancel_and_wait(self._beating)
        try:
            async with asyncio.timeout(_TIDY_S):
                await self._heartbeat()
                if self.up:
                    await self._client.leave()
        except (StoreUnavailableError, TimeoutError):
            log.warning("stopping without the store: what is reserved there ends with its lease")
        await self._client.close()

    def health(self) -> Health:
        """See `Store`."""
        return Health(self.up, len(self._owed), self.outages, self.offline_grants)

    # --- claims

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """See `Store`."""
        if not claim.lines:
            return Granted(claim, claim.tokens, (), ())
        self._slices.seen(claim, time.monotonic())
        if self.up:
            try:
                answer = await self._client.reserve(claim)
            except StoreUnavailableError as error:
                # It may have been granted, or may be yet: that is undone when Redis is back.
                self._owed[claim.id] = _PendingSettlement(None, claim.id)
                self._lost(error)
                claim = StoreClaim(claim.id + ".", claim.lines, claim.tokens, claim.least)
            except asyncio.CancelledError:
                self._owed[claim.id] = _PendingSettlement(None, claim.id)
                self._hurry.set()
                raise
            else:
                if isinstance(answer, Granted):
                    self._open[claim.id] = answer
                return answer
        return self._from_slices(claim)

    def _from_slices(self, claim: StoreClaim) -> Granted:
        retry_s = max(1.0, self._retry_s)
        if time.monotonic() >= self._lease_ends_s:
            raise StoreUnavailableError(
                f"limits can't be counted: {self._why}", retry_after_s=retry_s
            )
        granted = self._slices.take(claim, int(time.time() * 1000))
        if isinstance(granted, Refused):
            raise StoreUnavailableError(
                "limits can't be counted: the store is gone, and what was granted before is "
                "used up",
                retry_after_s=retry_s,
            )
        self.offline_grants += 1
        return granted

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        """See `Store`."""
        claim_id = granted.claim.id
        if not granted.claim.lines:
            if note is not None:
                self._add_note(note)
            return
        owed = _PendingSettlement(granted, claim_id, tuple(used), note)
        if granted.offline and claim_id not in self._owed:
            self._slices.used(granted, used)
            self._owed[claim_id] = owed
            return
        if self._open.get(claim_id) is not granted or claim_id in self._owed:
            return
        self._owed[claim_id] = owed
        if self.up:
            try:
                await self._deliver(owed)
            except StoreUnavailableError as error:
                self._lost(error)

    async def _deliver(self, owed: _PendingSettlement) -> None:
        """Tell the store, and forget it. Told twice, it counts once."""
        if owed.used is None:
            await self._client.undo(owed.claim_id)
        else:
            offline = owed.granted is not None and owed.granted.offline
            await self._client.settle(owed.claim_id, owed.lines, owed.note, offline=offline)
        if self._owed.pop(owed.claim_id, None) is None:
            return
        self._open.pop(owed.claim_id, None)
        if owed.granted is not None and owed.granted.offline and owed.used is not None:
            self._slices.delivered(owed.granted, owed.used)

    def _add_note(self, note: UsageNote) -> None:
        known = self._notes.get(note.name)
        counts = dict(known.counts) if known is not None else {}
        for name, count in note.counts.items():
            counts[name] = counts.get(name, 0) + count
        self._notes[note.name] = UsageNote(note.name, counts, note.keep_s)

    # --- being heard of

    async def _heartbeat_loop(self) -> None:
        while not self._stopping:
            if self.up:
                wait_s = self._beat_s
            else:
                # Not all gateways at the same moment.
                wait_s = self._retry_s * random.uniform(0.5, 1.0)
                self._retry_s = min(_LAST_RETRY_S, self._retry_s * 2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._hurry.wait()
            self._hurry.clear()
            if not self._stopping:
                try:
                    await self._heartbeat()
                except Exception:
                    # Whoever is not heard of any more is taken for dead, and grants nothing.
                    log.exception("a beat failed unexpectedly")

    async def _heartbeat(self) -> None:
        """Tell Redis that we are there, exchange slices, and deliver what is owed."""
        sent_s = time.monotonic()
        self._number += 1
        if not self._sent_notes[1] and self._notes:
            self._sent_notes = (self._sent_notes[0] + 1, list(self._notes.values()))
            self._notes = {}
        batch, notes = self._sent_notes
        plan = self._slices.plan(sent_s)
        try:
            told = await self._client.beat(self._number, self._slices.share, plan, batch, notes)
            if told.get("stale"):
                return
            self._sent_notes = (batch, [])
            if not told["known"] and self._lease_ends_s:
                await self._on_session_lost(lapsed=bool(told["lapsed"]))
            answer = [(name, int(held), int(room)) for name, held, room in told["slices"] or ()]
            self._slices.told(answer, sent_s)
            for owed in list(self._owed.values()):
                await self._deliver(owed)
        except StoreUnavailableError as error:
            self._lost(error)
            return
        self._lease_ends_s = sent_s + self._lease_s
        self._retry_s = _FIRST_RETRY_S
        if not self.up:
            gone_s = time.monotonic() - self._gone_since_s
            self.up = True
            if self.outages:
                log.warning("the store is back after %.1f s; all that was used is told", gone_s)

    async def _on_session_lost(self, *, lapsed: bool) -> None:
        """The store does not know us: our lease ended, or it came back without its memory."""
        if lapsed:
            log.warning("the store gave up on this gateway for not being heard of")
            return
        log.error("the store has lost its memory; what is under way is reserved anew")
        known = [*self._open.values()]
        claims = [(one.claim.id, lines_of(one, [0] * len(one.amounts))) for one in known]
        if claims:
            await self._client.restore(claims)

    def _lost(self, error: StoreUnavailableError) -> None:
        if error.message != self._why and not self.up:
            # Said once for each reason: a wrong password, then nobody there.
            log.error("%s", error.message)
        self._why = error.message
        if self.up:
            self.up = False
            self.outages += 1
            self._gone_since_s = time.monotonic()
            log.error("%s; spending what was granted before", error.message)
            self._hurry.set()

    # --- everything else

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """See `Store`."""
        return await self._client.balances(accounts) if accounts else []

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """See `Store`. What has no limit to be charged to is up to a second late."""
        return await self._client.counts(names)

    async def records(self, table: str) -> dict[str, bytes]:
        """See `Store`."""
        self._check()
        return await self._client.records(table)

    async def version(self, table: str) -> bytes | None:
        """See `Store`."""
        self._check()
        return await self._client.version(table)

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """See `Store`."""
        self._check()
        return await self._client.replace(table, record_id, expected, value)

    def _check(self) -> None:
        """Nobody waits for a store that is known to be gone."""
        if not self.up:
            raise StoreUnavailableError(self._why, retry_after_s=max(1.0, self._retry_s))
