"""The quotas from which a gateway grants claims while Redis is unavailable. Pure.

A gateway holds a small share of the free room in each account that it uses. Redis counts these
quotas as reserved, so that the quotas of all gateways together never exceed a limit.

Invariant: the local quota never exceeds the quota that Redis holds for the gateway. A quota shrinks
locally first, and it grows in Redis first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.store.store_interface import Account, Granted, Refused, StoreClaim

_MAX_ACCOUNTS = 256
_IDLE_S = 120.0
# A share of less room than this would be either nothing or all of the room.
_MIN_ROOM = 8


@dataclass(slots=True)
class OfflineQuota:
    """This gateway's offline quota of one account.

    Attributes:
        account: The account.
        used_s: When a claim last used the account.
        held: The amount that Redis holds for this gateway.
        busy: The part of `held` that is already granted or used.
        room: The amount left for all gateways, or -1 until Redis has reported it.
    """

    account: Account
    used_s: float
    held: int = 0
    busy: int = 0
    room: int = -1


class OfflineQuotas:
    """All quotas of a gateway. Times are `time.monotonic` seconds, windows in ms since 1970."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._quotas: dict[str, OfflineQuota] = {}

    def track(self, claim: StoreClaim, now_s: float) -> None:
        """Record that the claim's accounts are in use, so that quotas of them are wanted."""
        if not self.share:
            return
        for line in claim.lines:
            known = self._quotas.get(line.account.name)
            if known is not None:
                known.used_s = now_s
                known.account = line.account
            elif len(self._quotas) < _MAX_ACCOUNTS:
                self._quotas[line.account.name] = OfflineQuota(line.account, now_s)

    def plan(self, now_s: float) -> list[tuple[Account, int, int]]:
        """Shrink quotas, and list (account, held, wanted more) for the next heartbeat."""
        plan = []
        for quota in self._quotas.values():
            wanted = math.ceil(self.share * quota.room) if quota.room >= _MIN_ROOM else 0
            if now_s - quota.used_s > _IDLE_S:
                wanted = 0
            elif quota.room < 0:
                # The room is unknown. Redis limits the quota to this gateway's share.
                wanted = quota.account.limit
            quota.held = min(quota.held, max(wanted, quota.busy))
            plan.append((quota.account, quota.held, max(0, wanted - quota.held)))
        return plan

    def update(self, quotas: Sequence[tuple[str, int, int]], now_s: float) -> None:
        """Apply a heartbeat's reply: account, amount held, room left for all gateways."""
        for name, held, room in quotas:
            if (quota := self._quotas.get(name)) is not None:
                quota.held, quota.room = held, room
        for name in [
            name
            for name, quota in self._quotas.items()
            if not quota.held and not quota.busy and now_s - quota.used_s > _IDLE_S
        ]:
            del self._quotas[name]

    def take(self, claim: StoreClaim, now_ms: int) -> Granted | Refused:
        """Grant a claim from the quotas alone, or refuse it where a quota is exhausted."""
        tokens = claim.tokens
        for line in claim.lines:
            quota = self._quotas.get(line.account.name)
            fits = line.affordable(quota.held - quota.busy) if quota is not None else -1
            if fits < claim.least:
                return Refused(line.account.name, None)
            tokens = min(tokens, fits)
        amounts = tuple(line.amount(tokens) for line in claim.lines)
        for line, amount in zip(claim.lines, amounts, strict=True):
            self._quotas[line.account.name].busy += amount
        starts = tuple(line.account.window.span(now_ms)[0] for line in claim.lines)
        return Granted(claim, tokens, amounts, starts, offline=True)

    def release_unused(self, granted: Granted, used: Sequence[int]) -> None:
        """Free the part of an offline grant that was not used."""
        for line, amount, spent in zip(granted.claim.lines, granted.amounts, used, strict=True):
            if (quota := self._quotas.get(line.account.name)) is not None:
                quota.busy -= amount - spent

    def mark_delivered(self, granted: Granted, used: Sequence[int]) -> None:
        """Subtract the used amount from the quota, because Redis has charged it now."""
        for line, spent in zip(granted.claim.lines, used, strict=True):
            # An unspent quota may have been dropped meanwhile.
            if (quota := self._quotas.get(line.account.name)) is not None:
                quota.busy -= spent
                quota.held = max(0, quota.held - spent)
