"""The interface of a store: claims on limited accounts, exact under concurrency, and small records.

An account counts something with a limit: requests, tokens or millionths of cost in a window, or
concurrent requests. A claim reserves an upper bound either in all its accounts at once or in no
account. A settlement replaces the reservation by the amount used. A claim belongs to an owner,
which is a gateway's process. An owner renews its lease by heartbeats. When the lease expires, the
owner's reservations are released.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.store.limit_windows import Window

MOST_WINDOWS_OWED = 1440
"""Most sliding windows that a debt is spread over: a day of minutes."""


@dataclass(frozen=True, slots=True)
class Account:
    """A counter of whole numbers that is bounded by `limit` in each `window`."""

    name: str
    limit: int
    window: Window


@dataclass(frozen=True, slots=True)
class Charge:
    """One account's part of a claim: `base`, plus `per_token` for each token of the answer."""

    account: Account
    base: int
    per_token: float = 0.0

    def amount(self, tokens: int) -> int:
        """Return the amount for an answer of `tokens` tokens, rounded up."""
        # The rule is the same as in reserve.lua. Less than a millionth is floating-point error.
        return math.ceil(self.base + self.per_token * tokens - 1e-6)

    def affordable(self, room: int) -> int:
        """Return the number of answer tokens that fit into `room`.

        The result is 2**53 where there is no bound, and -1 where even `base` does not fit.
        """
        if self.base > room:
            return -1
        if self.per_token <= 0:
            return 2**53
        tokens = math.floor((room - self.base) / self.per_token + 1e-6)
        return tokens if self.amount(tokens) <= room else tokens - 1


@dataclass(frozen=True, slots=True)
class StoreClaim:
    """An upper bound on what a request may use.

    Attributes:
        id: A unique id.
        lines: One charge for each account.
        tokens: The number of answer tokens that the request asks for.
        least: The smallest number of answer tokens to grant.
    """

    id: str
    lines: tuple[Charge, ...]
    tokens: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """A granted claim.

    Attributes:
        claim: The claim.
        tokens: The number of granted answer tokens.
        amounts: The amount reserved for each line.
        starts_ms: The start of the window of each line, in ms since 1970.
        offline: Whether it was granted from an offline quota while the store was unavailable.
    """

    claim: StoreClaim
    tokens: int
    amounts: tuple[int, ...]
    starts_ms: tuple[int, ...]
    offline: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A refused claim.

    Attributes:
        account: The name of the account without room.
        retry_after_s: Seconds until the account surely has room. None means that the claim is too
            large for the account at any time.
        busy: Whether only open claims are in the way. They may end sooner.
    """

    account: str
    retry_after_s: float | None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class AccountBalance:
    """An account's amounts in its current window. Offline quotas count as reserved."""

    spent: int
    reserved: int
    starts_ms: int
    ends_ms: int


@dataclass(frozen=True, slots=True)
class UsageNote:
    """Usage counts to add under a name when a claim is settled, kept for `keep_s`."""

    name: str
    counts: Mapping[str, int] = field(default_factory=dict)
    keep_s: int = 0


@dataclass(frozen=True, slots=True)
class Settlement:
    """What settles one claim.

    Attributes:
        granted: The granted claim.
        used: The amount used of each line.
        note: The usage to add together with it.
    """

    granted: Granted
    used: tuple[int, ...]
    note: UsageNote | None = None

    def free(self) -> Settlement:
        """The settlement that releases the claim and charges nothing."""
        return Settlement(self.granted, (0,) * len(self.used))


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A piece of work that is charged once, however often it is done and whoever settles it.

    Attributes:
        group: The name of the whole work, such as a batch.
        name: The name of the item in it.
    """

    group: str
    name: str


@dataclass(frozen=True, slots=True)
class Health:
    """State of a store.

    Attributes:
        up: Whether the store answers.
        pending_settlements: The number of settlements that it has not confirmed.
        outages: How often it became unavailable.
        offline_grants: The number of claims granted from offline quotas.
    """

    up: bool = True
    pending_settlements: int = 0
    outages: int = 0
    offline_grants: int = 0


class Store(Protocol):
    """Limits and records that gateways share. Every method may raise StoreUnavailableError."""

    async def start(self) -> None:
        """Start the heartbeats. The call does not wait until the store can be reached."""

    async def stop(self) -> None:
        """Release this owner's reservations and quotas, and close the store."""

    def health(self) -> Health:
        """Return the state of the store."""

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """Reserve a claim's upper bound either in all its accounts or in no account.

        The tokens are reduced to the number that every account has room for, but not below
        `least`.
        """

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        """Charge `used`, line by line, and release the reservation. This happens exactly once.

        In a sliding window a request may use more than it reserved. The excess is charged to the
        current window as far as it has room. The rest of it is charged to the next windows, up to
        their limit.
        """

    async def settle_once(self, item: WorkItem, settlement: Settlement) -> None:
        """Charge an item of work, and release the reservation of this attempt at it.

        The first settlement of an item is charged, and later ones only release. Any owner may
        settle a claim of any other, also after that one's lease has expired. The call returns when
        the store has counted the settlement, and may be repeated until then.
        """

    async def close_group(self, group: str) -> None:
        """End a group: no item of it is charged any more, and the store forgets its items."""

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """Return the current balance of each account."""

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """Return the usage counts recorded under each name."""

    async def records(self, table: str) -> dict[str, bytes]:
        """Return the records of a table by their ids. A record stays until it is replaced."""

    async def version(self, table: str) -> bytes | None:
        """Return a value that differs after every change of a table, or None before the first."""

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """Replace a record if it still equals `expected` (compare and set).

        An `expected` of None means that there is no record yet.

        Returns:
            False where the record has another value. Nothing is written then.
        """
