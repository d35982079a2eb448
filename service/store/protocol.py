"""What a store does: claims on limited accounts, exact under concurrency, and few small records.

An account is anything with a limit: requests, tokens or millionths of cost in a window,
or requests at once. A claim reserves an upper bound in several accounts at once, or
nothing at all; settling it puts what was used in its place. A claim belongs to an
owner (a gateway's process): when an owner is not heard of for its lease, what it had
reserved is free again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.store.windows import Window

MOST_WINDOWS_OWED = 1440
"""How many sliding windows a debt is spread over at the most: of minutes a day."""


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
        """What `tokens` tokens of answer take, rounded up."""
        # As in the script for Redis; less than a millionth of one is floating point.
        return math.ceil(self.base + self.per_token * tokens - 1e-6)

    def affordable(self, room: int) -> int:
        """How many tokens of answer fit into `room`; -1: not even none. Unbounded: 2**53."""
        if self.base > room:
            return -1
        if self.per_token <= 0:
            return 2**53
        tokens = math.floor((room - self.base) / self.per_token + 1e-6)
        return tokens if self.amount(tokens) <= room else tokens - 1


@dataclass(frozen=True, slots=True)
class StoreClaim:
    """What a request may use at most: `tokens` of answer, of which `least` have to be granted."""

    id: str
    lines: tuple[Charge, ...]
    tokens: int = 0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """A claim that holds: tokens of answer, and for each line its amount and window.

    `offline`: granted from a slice, while the store was gone.
    """

    claim: StoreClaim
    tokens: int
    amounts: tuple[int, ...]
    starts_ms: tuple[int, ...]
    offline: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The account that has no room, and when it surely has; None: never for so much.

    `busy`: only claims under way stand in the way, which may end sooner.
    """

    account: str
    retry_after_s: float | None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class AccountBalance:
    """An account in the window of now: what was spent, and what is reserved, slices included."""

    spent: int
    reserved: int
    starts_ms: int
    ends_ms: int


@dataclass(frozen=True, slots=True)
class UsageNote:
    """Counts to add under a name when a claim is settled: usage. Kept for `keep_s`."""

    name: str
    counts: Mapping[str, int] = field(default_factory=dict)
    keep_s: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """How it goes with the store: whether it answers, what it has still to be told of,
    how often it was lost, and how many claims were granted from slices meanwhile.
    """

    up: bool = True
    owed: int = 0
    outages: int = 0
    slice_grants: int = 0


class Store(Protocol):
    """Where several gateways count as one. Every method may raise StoreGone."""

    async def start(self) -> None:
        """Begin to be heard of. Does not wait until the store can be reached."""

    async def stop(self) -> None:
        """Give back what this owner holds, and close."""

    def health(self) -> Health:
        """How it goes."""

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """Reserve a claim's upper bound in all its accounts, or in none.

        Tokens are clipped to what every account has room for, `least` at the least.
        """

    async def settle(self, granted: Granted, used: Sequence[int], note: UsageNote | None) -> None:
        """Put `used`, line by line, in the place of what was reserved. Never lost, never twice.

        Of a sliding window more may be used than was reserved: the rest is charged now, and what
        this window has no room for in the next ones, of which each takes as much as the limit.
        """

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """The accounts as of now."""

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """What was noted under each name."""

    async def records(self, table: str) -> dict[str, bytes]:
        """Every record of a table, by its id. Records are kept until they are replaced."""

    async def version(self, table: str) -> bytes | None:
        """Another one whenever a record of the table changed; None: it never had a record."""

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """Put `value` in the place of what was read of a record (None: there was none).

        False, and nothing is changed, where somebody else has changed it since.
        """
