"""A store in the memory of this process, for one gateway."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from service.store.limit_windows import Window
from service.store.store_interface import (
    MOST_WINDOWS_OWED,
    Account,
    AccountBalance,
    Charge,
    Granted,
    Health,
    Refused,
    Settlement,
    StoreClaim,
    UsageNote,
    WorkItem,
)

Clock = Callable[[], float]
_BUSY_RETRY_S = 1.0


class _Counts:
    """The amounts spent and reserved in one account, by the start of a window or part in ms."""

    __slots__ = ("reserved", "spent", "window")

    def __init__(self, window: Window) -> None:
        self.window = window
        self.spent: dict[int, int] = {}
        self.reserved: dict[int, int] = {}

    def forget(self, now_ms: int) -> None:
        """Drop expired windows."""
        oldest_ms, _ = self.window.span(now_ms)
        if self.window.kind == "sliding":
            # A part that is partly outside of the window counts as a whole.
            oldest_ms -= self.window.length_ms
        for counts in (self.spent, self.reserved):
            for start in [start for start in counts if start < oldest_ms]:
                del counts[start]


class MemoryStore:
    """A `Store` in memory. `clock` gives seconds since 1970."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._accounts: dict[str, _Counts] = {}
        self._open: dict[str, Granted] = {}
        self._notes: dict[str, tuple[float, dict[str, int]]] = {}
        self._tables: dict[str, dict[str, bytes]] = {}
        self._versions: dict[str, int] = {}
        # Items that were charged, by group; None for a group that is closed.
        self._charged: dict[str, set[str] | None] = {}
        self._swept_s = 0.0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def health(self) -> Health:
        return Health()

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
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
            return longest(refusals)
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
        if granted.claim.lines and self._open.pop(granted.claim.id, None) is None:
            return
        self._charge(granted, used, note)

    async def settle_once(self, item: WorkItem, settlement: Settlement) -> None:
        charged = self._charged.setdefault(item.group, set())
        was_open = self._open.pop(settlement.granted.claim.id, None) is not None
        if charged is not None and item.name not in charged:
            charged.add(item.name)
            self._charge(settlement.granted, settlement.used, settlement.note, held=was_open)
        elif was_open:
            self._charge(settlement.granted, settlement.free().used, None)

    async def close_group(self, group: str) -> None:
        self._charged[group] = None

    def _charge(
        self, granted: Granted, used: Sequence[int], note: UsageNote | None, *, held: bool = True
    ) -> None:
        """Charge a claim; `held` says whether the store still holds its reservation."""
        now_s = self._clock()
        for line, amount, start, spent in zip(
            granted.claim.lines, granted.amounts, granted.starts_ms, used, strict=True
        ):
            # The window may have ended, and the account may have been dropped.
            counts = self._accounts.get(line.account.name)
            if not held:
                counts = self._counts(line.account, int(now_s * 1000))
            sliding = line.account.window.kind == "sliding"
            within = min(spent, amount) if sliding else spent
            if counts is not None and (start in counts.reserved or not held):
                if held:
                    counts.reserved[start] -= amount
                if within:
                    counts.spent[start] = counts.spent.get(start, 0) + within
            if spent > within:
                now_ms = int(now_s * 1000)
                _charge_debt(
                    self._counts(line.account, now_ms), line.account, spent - within, now_ms
                )
        if note is not None:
            _, noted = self._notes.get(note.name, (0.0, {}))
            for name, count in note.counts.items():
                noted[name] = noted.get(name, 0) + count
            self._notes[note.name] = (now_s + note.keep_s, noted)
        self._sweep(now_s)

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        now_ms = int(self._clock() * 1000)
        balances = []
        for account in accounts:
            counts = self._counts(account, now_ms)
            start, end = account.window.span(now_ms)
            balances.append(
                AccountBalance(
                    sum(counts.spent.values()), sum(counts.reserved.values()), start, end
                )
            )
        return balances

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        now_s = self._clock()
        found = (self._notes.get(name, (0.0, {})) for name in names)
        return [dict(noted) if until > now_s else {} for until, noted in found]

    async def records(self, table: str) -> dict[str, bytes]:
        return dict(self._tables.get(table, {}))

    async def version(self, table: str) -> bytes | None:
        known = self._versions.get(table)
        return None if known is None else str(known).encode()

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        records = self._tables.setdefault(table, {})
        if records.get(record_id) != expected:
            return False
        records[record_id] = value
        self._versions[table] = self._versions.get(table, 0) + 1
        return True

    def _counts(self, account: Account, now_ms: int) -> _Counts:
        counts = self._accounts.get(account.name)
        if counts is None:
            counts = self._accounts[account.name] = _Counts(account.window)
        counts.window = account.window
        counts.forget(now_ms)
        return counts

    def _sweep(self, now_s: float) -> None:
        """Drop expired notes and accounts, once a minute."""
        if now_s - self._swept_s < 60:
            return
        self._swept_s = now_s
        self._notes = {n: v for n, v in self._notes.items() if v[0] > now_s}
        for counts in self._accounts.values():
            counts.forget(int(now_s * 1000))
        self._accounts = {n: c for n, c in self._accounts.items() if c.spent or c.reserved}


def _taken(counts: _Counts) -> int:
    return sum(counts.spent.values()) + sum(counts.reserved.values())


def _charge_debt(counts: _Counts, account: Account, debt: int, now_ms: int) -> None:
    """Charge the use of a claim that exceeds its reservation.

    The current window is charged as far as it has room. The rest is charged to the next windows, up
    to the limit of each window.
    """
    length_ms = account.window.length_ms
    part_start = account.window.span(now_ms)[0]
    taken = [0] * (MOST_WINDOWS_OWED + 1)
    for start, amount in (*counts.spent.items(), *counts.reserved.items()):
        window = max(0, -((part_start - start) // length_ms))
        taken[min(window, MOST_WINDOWS_OWED)] += amount
    for window in range(MOST_WINDOWS_OWED + 1):
        amount = min(debt, max(0, account.limit - taken[window]))
        if window == MOST_WINDOWS_OWED:
            amount = debt
        if amount:
            start = part_start + window * length_ms
            counts.spent[start] = counts.spent.get(start, 0) + amount
        debt -= amount
        if not debt:
            return


def _refusal(line: Charge, least: int, counts: _Counts, now_ms: int) -> Refused:
    """Build the refusal of a line without room, with the time when it surely has room again."""
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


def longest(refusals: Sequence[Refused]) -> Refused:
    """Return the refusal with the longest wait."""
    return max(
        refusals, key=lambda r: r.retry_after_s if r.retry_after_s is not None else float("inf")
    )
