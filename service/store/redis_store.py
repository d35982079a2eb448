"""The store that several gateways share, and how a gateway survives an outage of Redis.

While Redis answers, it decides every claim. During an outage a gateway grants claims from its
offline quotas until its lease expires, and then refuses claims (503). It keeps settlements that it
could not send, and delivers each of them once when Redis answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import StoreUnavailableError
from service.store.limit_windows import Window
from service.store.offline_quota import OfflineQuotas
from service.store.redis_commands import Lines, RedisClient
from service.store.store_interface import (
    Account,
    AccountBalance,
    Granted,
    Health,
    Refused,
    Settlement,
    StoreClaim,
    UsageNote,
    WorkItem,
)
from service.task_cancellation import cancel_and_wait

log = logging.getLogger("coe.store")

_HEARTBEAT_S = 1.0
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 2.0
_SHUTDOWN_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class _PendingSettlement:
    """A settlement that Redis has not confirmed.

    Attributes:
        granted: The granted claim, or None where Redis did not answer and the claim has to be
            undone.
        claim_id: The claim's id.
        used: The amount used of each line, or None where the claim has to be undone.
        note: The usage to add together with the settlement.
    """

    granted: Granted | None
    claim_id: str
    used: tuple[int, ...] | None = None
    note: UsageNote | None = None

    @property
    def lines(self) -> Lines:
        """Return the lines in the client's format. The settlement must have a grant."""
        assert self.granted is not None
        assert self.used is not None
        return lines_of(self.granted, self.used)


def lines_of(granted: Granted, used: Sequence[int]) -> Lines:
    """Return the lines of a settlement in the client's format."""
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
    """Return the length and the part length of a sliding window in ms; 0 for other windows."""
    return (window.length_ms, window.part_ms) if window.kind == "sliding" else (0, 0)


class RedisStore:
    """A `Store` in Redis, which several gateways share.

    Attributes:
        up: Whether Redis answered the last call.
        outages: How often Redis stopped answering.
        offline_grants: The number of claims granted from offline quotas.
    """

    def __init__(
        self,
        client: RedisClient,
        *,
        share: float,
        lease_s: float,
        heartbeat_s: float = _HEARTBEAT_S,
    ) -> None:
        self._client = client
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._quotas = OfflineQuotas(share)
        self._granted: dict[str, Granted] = {}
        self._pending: dict[str, _PendingSettlement] = {}
        self._notes: dict[str, UsageNote] = {}
        self._sent_notes: tuple[int, list[UsageNote]] = (0, [])
        self._heartbeat_number = 0
        self._lease_ends_s = 0.0
        self._retry_s = _FIRST_RETRY_S
        self._down_since_s = time.monotonic()
        self._heartbeats: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._last_error = "the store is unavailable"
        self.up = False
        self.outages = 0
        self.offline_grants = 0

    async def start(self) -> None:
        await self._heartbeat()
        self._heartbeats = asyncio.create_task(self._heartbeat_loop())

    async def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._heartbeats is not None:
            await asyncio.wait({self._heartbeats}, timeout=_SHUTDOWN_TIMEOUT_S)
            await cancel_and_wait(self._heartbeats)
        try:
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                await self._heartbeat()
                if self.up:
                    await self._client.leave()
        except (StoreUnavailableError, TimeoutError):
            log.warning(
                "Redis is unavailable at shutdown; its claims expire with the gateway lease"
            )
        await self._client.close()

    def health(self) -> Health:
        return Health(self.up, len(self._pending), self.outages, self.offline_grants)

    # --- claims

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        if not claim.lines:
            return Granted(claim, claim.tokens, (), ())
        self._quotas.track(claim, time.monotonic())
        if self.up:
            try:
                answer = await self._client.reserve(claim)
            except StoreUnavailableError as error:
                # Redis may have granted the claim or may still grant it. It is undone later.
                self._pending[claim.id] = _PendingSettlement(None, claim.id)
                self._on_failure(error)
                claim = StoreClaim(claim.id + ".", claim.lines, claim.tokens, claim.least)
            except asyncio.CancelledError:
                self._pending[claim.id] = _PendingSettlement(None, claim.id)
                self._wake.set()
                raise
            else:
                if isinstance(answer, Granted):
                    self._granted[claim.id] = answer
                return answer
        return self._reserve_offline(claim)

    def _reserve_offline(self, claim: StoreClaim) -> Granted:
        retry_s = max(1.0, self._retry_s)
        if time.monotonic() >= self._lease_ends_s:
            raise StoreUnavailableError(
                f"limits can't be counted: {self._last_error}", retry_after_s=retry_s
            )
        granted = self._quotas.take(claim, int(time.time() * 1000))
        if isinstance(granted, Refused):
            raise StoreUnavailableError(
                "limits can't be counted: the store is unavailable, and the offline quota "
                "is used up",
                retry_after_s=retry_s,
            )
        self.offline_grants += 1
        return granted

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        claim_id = granted.claim.id
        if not granted.claim.lines:
            if note is not None:
                self._add_note(note)
            return
        settlement = _PendingSettlement(granted, claim_id, tuple(used), note)
        if granted.offline and claim_id not in self._pending:
            self._quotas.release_unused(granted, used)
            self._pending[claim_id] = settlement
            return
        if self._granted.get(claim_id) is not granted or claim_id in self._pending:
            return
        self._pending[claim_id] = settlement
        if self.up:
            try:
                await self._deliver(settlement)
            except StoreUnavailableError as error:
                self._on_failure(error)

    async def settle_once(self, item: WorkItem, settlement: Settlement) -> None:
        # It is not kept for later: the caller has written it down, and repeats it.
        granted, used = settlement.granted, settlement.used
        await self._try(
            self._client.settle(
                granted.claim.id, lines_of(granted, used), settlement.note, item=item
            )
        )
        self._granted.pop(granted.claim.id, None)
        if granted.offline:
            self._quotas.release_unused(granted, used)
            self._quotas.mark_delivered(granted, used)

    async def close_group(self, group: str) -> None:
        await self._try(self._client.close_group(group))

    async def _try(self, call: Coroutine[Any, Any, None]) -> None:
        """Make a call that the caller repeats when it fails.

        Raises:
            StoreUnavailableError: Redis is unavailable.
        """
        try:
            self._check()
        except StoreUnavailableError:
            call.close()
            raise
        try:
            await call
        except StoreUnavailableError as error:
            self._on_failure(error)
            raise

    async def _deliver(self, settlement: _PendingSettlement) -> None:
        """Send a settlement, and then drop it. Redis counts it only once, even after retries."""
        if settlement.used is None:
            await self._client.undo(settlement.claim_id)
        else:
            offline = settlement.granted is not None and settlement.granted.offline
            await self._client.settle(
                settlement.claim_id, settlement.lines, settlement.note, offline=offline
            )
        if self._pending.pop(settlement.claim_id, None) is None:
            return
        self._granted.pop(settlement.claim_id, None)
        if (
            settlement.granted is not None
            and settlement.granted.offline
            and settlement.used is not None
        ):
            self._quotas.mark_delivered(settlement.granted, settlement.used)

    def _add_note(self, note: UsageNote) -> None:
        known = self._notes.get(note.name)
        counts = dict(known.counts) if known is not None else {}
        for name, count in note.counts.items():
            counts[name] = counts.get(name, 0) + count
        self._notes[note.name] = UsageNote(note.name, counts, note.keep_s)

    # --- heartbeats

    async def _heartbeat_loop(self) -> None:
        while not self._stopping:
            if self.up:
                wait_s = self._heartbeat_s
            else:
                # Jitter spreads the heartbeats of the gateways.
                wait_s = self._retry_s * random.uniform(0.5, 1.0)
                self._retry_s = min(_LAST_RETRY_S, self._retry_s * 2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()
            if not self._stopping:
                try:
                    await self._heartbeat()
                except Exception:
                    # The loop must go on, because the lease expires without heartbeats.
                    log.exception("Redis heartbeat failed")

    async def _heartbeat(self) -> None:
        """Renew the lease, resize the offline quotas, and deliver pending settlements."""
        sent_s = time.monotonic()
        self._heartbeat_number += 1
        if not self._sent_notes[1] and self._notes:
            self._sent_notes = (self._sent_notes[0] + 1, list(self._notes.values()))
            self._notes = {}
        batch, notes = self._sent_notes
        plan = self._quotas.plan(sent_s)
        try:
            reply = await self._client.send_heartbeat(
                self._heartbeat_number, self._quotas.share, plan, batch, notes
            )
            if reply.get("stale"):
                return
            self._sent_notes = (batch, [])
            if not reply["known"] and self._lease_ends_s:
                await self._on_session_lost(lapsed=bool(reply["lapsed"]))
            # In Lua's JSON an empty list is an object.
            quotas = [(name, int(held), int(room)) for name, held, room in reply["quotas"] or ()]
            self._quotas.update(quotas, sent_s)
            pending = list(self._pending.values())
            for settlement in pending:
                await self._deliver(settlement)
        except StoreUnavailableError as error:
            self._on_failure(error)
            return
        self._lease_ends_s = sent_s + self._lease_s
        self._retry_s = _FIRST_RETRY_S
        if not self.up:
            outage_s = time.monotonic() - self._down_since_s
            self.up = True
            if self.outages:
                log.warning(
                    "Redis reconnected after %.1f s; %d pending settlements flushed",
                    outage_s,
                    len(pending),
                )

    async def _on_session_lost(self, *, lapsed: bool) -> None:
        """Restore this owner's state after its lease expired or Redis lost its data."""
        if lapsed:
            log.warning("gateway lease expired in Redis")
            return
        claims = [
            (granted.claim.id, lines_of(granted, [0] * len(granted.amounts)))
            for granted in self._granted.values()
        ]
        log.error("Redis lost its data; re-reserving %d in-flight claims", len(claims))
        if claims:
            await self._client.restore(claims)

    def _on_failure(self, error: StoreUnavailableError) -> None:
        if error.message != self._last_error and not self.up:
            # Each new reason is logged once, such as a wrong password and then no connection.
            log.error("%s", error.message)
        self._last_error = error.message
        if self.up:
            self.up = False
            self.outages += 1
            self._down_since_s = time.monotonic()
            log.error("%s; granting from offline quotas", error.message)
            self._wake.set()

    # --- balances, usage and records

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        return await self._client.balances(accounts) if accounts else []

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        # Notes that belong to no limit are sent with the next heartbeat.
        return await self._client.counts(names)

    async def records(self, table: str) -> dict[str, bytes]:
        self._check()
        return await self._client.records(table)

    async def version(self, table: str) -> bytes | None:
        self._check()
        return await self._client.version(table)

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        self._check()
        return await self._client.replace(table, record_id, expected, value)

    def _check(self) -> None:
        """Fail at once while Redis is known to be unavailable.

        Raises:
            StoreUnavailableError: Redis is unavailable.
        """
        if not self.up:
            raise StoreUnavailableError(self._last_error, retry_after_s=max(1.0, self._retry_s))
