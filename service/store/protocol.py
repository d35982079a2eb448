"""The interface of a store: claims on limited accounts, exact under concurrency, and small records.

An account is anything with a limit: requests, tokens or millionths of cost in a window, or
concurrent requests. A claim reserves an upper bound in several accounts at once, or in none;
settling it replaces the reservation by what was used. A claim belongs to an owner, which is a
gateway's process. An owner renews its lease by heartbeats. When the lease expires, the owner's
reservations are released.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.store.windows import Window

MOST_WINDOWS_OWED = 1440
"""Most sliding windows that a debt is spread over: a day of minutes."""


@dataclass(frozen=True, slots=True)
class Account:
    """Something counted in whole numbers and bounded by `limit` in each `window`."""

    name: str
    limit: int
    window: Window


@dataclass(frozen=True, slots=True)
class Charge:
    """One account's part of a claim: `base`, and `per_token` for each token of the answer."""

    account: Account
    base: int
    per_token: float = 0.0

    def amount(self, tokens: int) -> int:
        """Amount that an answer of `tokens` tokens takes, rounded up."""
        # The same as in reserve.lua; less than a millionth is floating-point error.
        return math.ceil(self.base + self.per_token * tokens - 1e-6)

    def affordable(self, room: int) -> int:
        """How many tokens of answer fit into `room`: 2**53 if unbounded, -1 if not even `base`."""
        if self.base > room:
            return -1
        if self.per_token <= 0:
            return 2**53
        tokens = math.floor((room - self.base) / self.per_token + 1e-6)
        return tokens if self.amount(tokens) <= room else tokens - 1


@dataclass(frozen=True, slots=True)
class StoreClaim:
    """The most that a request may use.

    Attributes:
        id: Unique id.
        lines: One charge for each account.
        tokens: Tokens of answer that it asks for.
        least: Tokens of answer that have to be granted at least.
    """

    id: str
    lines: tuple[Charge, ...]
    tokens: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """A claim that was granted.

    Attributes:
        claim: The claim.
        tokens: Tokens of answer that were granted.
        amounts: Amount reserved for each line.
        starts_ms: Start of the window of each line, in ms since 1970.
        offline: Granted from an offline quota, while the store was unavailable.
    """

    claim: StoreClaim
    tokens: int
    amounts: tuple[int, ...]
    starts_ms: tuple[int, ...]
    offline: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A claim that was refused.

    Attributes:
        account: Name of the account without room.
        retry_after_s: When it surely has room; None: never for so large a claim.
        busy: Only open claims are in the way, which may end sooner.
    """

    account: str
    retry_after_s: float | None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class AccountBalance:
    """An account in its current window: amounts spent and reserved, offline quotas included."""

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
class Health:
    """State of a store.

    Attributes:
        up: Whether it answers.
        pending_settlements: Settlements that it has not confirmed.
        outages: How often it became unavailable.
        offline_grants: Claims granted from offline quotas.
    """

    up: bool = True
    pending_settlements: int = 0
    outages: int = 0
    offline_grants: int = 0


class Store(Protocol):
    """Limits and records that gateways share. Every method may raise StoreUnavailableError."""

    async def start(self) -> None:
        """Start the heartbeats. Does not wait until the store can be reached."""

    async def stop(self) -> None:
        """Release what this owner holds, and close."""

    def health(self) -> Health:
        """The state of the store."""

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """Reserve a claim's upper bound in all its accounts, or in none.

        Tokens are clipped to what every account has room for, `least` at the least.
        """

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        """Charge `used`, line by line, and release what was reserved. Exactly once.

        In a sliding window more may be used than was reserved. The current window is charged with
        the rest as far as it has room, and the next windows with what remains, up to their limit.
        """

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """The current balance of each account."""

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """The usage counts noted under each name."""

    async def records(self, table: str) -> dict[str, bytes]:
        """Every record of a table, by its id. Records are kept until they are replaced."""

    async def version(self, table: str) -> bytes | None:
        """A value that is new after every change of the table; None: it never had a record."""

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """Compare and set: replace a record if it still is `expected` (None: there is none).

        Returns:
            False where the record has changed since; nothing is written then.
        """
