"""The store in this process: for one gateway, and gone when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from service.store.protocol import (
    MOST_WINDOWS_OWED,
    Account,
    AccountBalance,
    Charge,
    Granted,
    Health,
    Refused,
    StoreClaim,
    UsageNote,
)
from service.store.windows import Window

Clock = Callable[[], float]
_BUSY_RETRY_S = 1.0


class _Counts:
    """One account: spent and reserved, by the start of window (or piece of one)."""

    __slots__ = ("reserved", "spent", "window")

    def __init__(self, window: Window) -> None:
        self.window = window
        self.spent: dict[int, int] = {}
        self.reserved: dict[int, int] = {}

    def forget(self, now_ms: int) -> None:
        """Drop windows that count no more."""
        oldest_ms, _ = self.window.span(now_ms)
        if self.window.kind == "sliding":
            # The piece that is partly out of the window still counts whole.
            oldest_ms -= self.window.length_ms
        for counts in (self.spent, self.reserved):
            for start in [start for start in counts if start < oldest_ms]:
                del counts[start]


class MemoryStore:
    """See `Store`. `clock`: seconds since 1970."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._accounts: dict[str, _Counts] = {}
        self._open: dict[str, Granted] = {}
        self._notes: dict[str, tuple[float, dict[str, int]]] = {}
        self._tables: dict[str, dict[str, bytes]] = {}
        self._versions: dict[str, int] = {}
        self._swept_s = 0.0

    async def start(self) -> None:
        """See `Store`."""

    async def stop(self) -> None:
        """See `Store`."""

    def health(self) -> Health:
        """See `Store`. Nothing can be wrong with it."""
        return Health()

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """See `Store`."""
        now_ms = int(self._clock() * 1000)
        tokens = claim.tokens
        refusals: list[Refused] = []
        for line in claim.lines:
            counts = self._counts(line.account, now_ms)
            room = line.account.limit - _taken(counts)
            fits = line.affordable(room)
            if fits < claim.least:
                refusals.append(_refusal(line, claim.least, counts, now_ms))
            tokens = min(tokens, fits)
        if refusals:
            return worst(refusals)
        amounts = tuple(line.amount(tokens) for line in claim.lines)
        starts = tuple(line.account.window.span(now_ms)[0] for line in claim.lines)
        granted = Granted(claim, tokens, amounts, starts)
        for line, amount, start in zip(claim.lines, amounts, starts, strict=True):
            reserved = self._accounts[line.account.name].reserved
            reserved[start] = reserved.get(start, 0) + amount
        if claim.lines:
            self._open[claim.id] = granted
        return granted

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        """See `Store`."""
        if granted.claim.lines and self._open.pop(granted.claim.id, None) is None:
            return
        now_s = self._clock()
        for line, amount, start, spent in zip(
            granted.claim.lines, granted.amounts, granted.starts_ms, used, strict=True
        ):
            # Its window may be over, and the account forgotten.
            counts = self._accounts.get(line.account.name)
            sliding = line.account.window.kind == "sliding"
            within = min(spent, amount) if sliding else spent
            if counts is not None and start in counts.reserved:
                counts.reserved[start] -= amount
                if within:
                    counts.spent[start] = counts.spent.get(start, 0) + within
            if spent > within:
                now_ms = int(now_s * 1000)
                _owe(self._counts(line.account, now_ms), line.account, spent - within, now_ms)
        if note is not None:
            _, noted = self._notes.get(note.name, (0.0, {}))
            for name, count in note.counts.items():
                noted[name] = noted.get(name, 0) + count
            self._notes[note.name] = (now_s + note.keep_s, noted)
        self._sweep(now_s)

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """See `Store`."""
        now_ms = int(self._clock() * 1000)
        told = []
        for account in accounts:
            counts = self._counts(account, now_ms)
            start, end = account.window.span(now_ms)
            told.append(
                AccountBalance(
                    sum(counts.spent.values()), sum(counts.reserved.values()), start, end
                )
            )
        return told

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """See `Store`."""
        now_s = self._clock()
        found = (self._notes.get(name, (0.0, {})) for name in names)
        return [dict(noted) if until > now_s else {} for until, noted in found]

    async def records(self, table: str) -> dict[str, bytes]:
        """See `Store`."""
        return dict(self._tables.get(table, {}))

    async def version(self, table: str) -> bytes | None:
        """See `Store`."""
        known = self._versions.get(table)
        return None if known is None else str(known).encode()

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """See `Store`."""
        records = self._tables.setdefault(table, {})
        if records.get(record_id) != expected:
            return False
        records[record_id] = value
        self._versions[table] = self._versions.get(table, 0) + 1
        return True

    def _counts(self, account: Account, now_ms: int) -> _Counts:
        counts = self._accounts.setdefault(account.name, _Counts(account.window))
        counts.window = account.window
        counts.forget(now_ms)
        return counts

    def _sweep(self, now_s: float) -> None:
        """Once a minute: what has expired."""
        if now_s - self._swept_s < 60:
            return
        self._swept_s = now_s
        self._notes = {n: v for n, v in self._notes.items() if v[0] > now_s}
        for counts in self._accounts.values():
            counts.forget(int(now_s * 1000))
        self._accounts = {n: c for n, c in self._accounts.items() if c.spent or c.reserved}


def _taken(counts: _Counts) -> int:
    return sum(counts.spent.values()) + sum(counts.reserved.values())


def _owe(counts: _Counts, account: Account, over: int, now_ms: int) -> None:
    """Charge what a claim used beyond what it had reserved: what this window has no room for
    is a debt, to be worked off in the next ones."""
    length_ms = account.window.length_ms
    piece = account.window.span(now_ms)[0]
    taken = [0] * (MOST_WINDOWS_OWED + 1)
    for start, amount in (*counts.spent.items(), *counts.reserved.items()):
        later = max(0, -((piece - start) // length_ms))
        taken[min(later, MOST_WINDOWS_OWED)] += amount
    for window in range(MOST_WINDOWS_OWED + 1):
        put = min(over, max(0, account.limit - taken[window]))
        if window == MOST_WINDOWS_OWED:
            put = over
        if put:
            start = piece + window * length_ms
            counts.spent[start] = counts.spent.get(start, 0) + put
        over -= put
        if not over:
            return


def _refusal(line: Charge, least: int, counts: _Counts, now_ms: int) -> Refused:
    """Why a line has no room, and when it surely will."""
    account, wanted = line.account, line.amount(least)
    if wanted > account.limit:
        return Refused(account.name, None)
    missing = _taken(counts) + wanted - account.limit
    if account.window.kind == "sliding":
        for start in sorted(counts.spent.keys() | counts.reserved.keys()):
            missing -= counts.spent.get(start, 0) + counts.reserved.get(start, 0)
            if missing <= 0:
                free_ms = start + account.window.part_ms + account.window.length_ms
                return Refused(account.name, (free_ms - now_ms) / 1000)
    reserved = sum(counts.reserved.values())
    if missing <= reserved or account.window.kind == "now":
        return Refused(account.name, _BUSY_RETRY_S, busy=True)
    return Refused(account.name, (account.window.span(now_ms)[1] - now_ms) / 1000)


def worst(refusals: Sequence[Refused]) -> Refused:
    """The refusal that lasts longest."""
    return max(
        refusals, key=lambda r: r.retry_after_s if r.retry_after_s is not None else float("inf")
    )
