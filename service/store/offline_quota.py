"""What one gateway may still spend when Redis is gone: slices that it was granted before. Pure.

Of each account in use a gateway holds a small share of what is left. It counts as
reserved in the store, so that all gateways' slices together never exceed a limit.
What is believed here is never more than the store holds for us: a slice is made smaller
here first and there afterwards, and greater there first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.store.protocol import Account, Granted, Refused, StoreClaim

_MOST_ACCOUNTS = 256
_FORGET_S = 120.0
# Of less than this a share would be nothing, or all of it.
_LEAST_ROOM = 8


@dataclass(slots=True)
class OfflineQuota:
    """Of one account: `held` for us in the store, of it `busy`, and what is left for all."""

    account: Account
    used_s: float
    held: int = 0
    busy: int = 0
    room: int = -1


class OfflineQuotas:
    """One gateway's slices. Times are `time.monotonic` seconds, windows in ms since 1970."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._slices: dict[str, OfflineQuota] = {}

    def seen(self, claim: StoreClaim, now_s: float) -> None:
        """These accounts are in use: slices of them are worth having."""
        if not self.share:
            return
        for line in claim.lines:
            known = self._slices.get(line.account.name)
            if known is not None:
                known.used_s = now_s
                known.account = line.account
            elif len(self._slices) < _MOST_ACCOUNTS:
                self._slices[line.account.name] = OfflineQuota(line.account, now_s)

    def plan(self, now_s: float) -> list[tuple[Account, int, int]]:
        """For the next beat: account, what we have of it from here on, how much more we want."""
        asked = []
        for one in self._slices.values():
            wanted = math.ceil(self.share * one.room) if one.room >= _LEAST_ROOM else 0
            if now_s - one.used_s > _FORGET_S:
                wanted = 0
            elif one.room < 0:
                # Not known yet: the store bounds it by our share.
                wanted = one.account.limit
            one.held = min(one.held, max(wanted, one.busy))
            asked.append((one.account, one.held, max(0, wanted - one.held)))
        return asked

    def told(self, answer: Sequence[tuple[str, int, int]], now_s: float) -> None:
        """What the store holds for us now, and what is left of each account for all."""
        for name, held, room in answer:
            if (one := self._slices.get(name)) is not None:
                one.held, one.room = held, room
        for name in [
            name
            for name, one in self._slices.items()
            if not one.held and not one.busy and now_s - one.used_s > _FORGET_S
        ]:
            del self._slices[name]

    def take(self, claim: StoreClaim, now_ms: int) -> Granted | Refused:
        """Grant a claim from the slices alone. Refused: what was granted before is used up."""
        tokens = claim.tokens
        for line in claim.lines:
            one = self._slices.get(line.account.name)
            fits = line.affordable(one.held - one.busy) if one is not None else -1
            if fits < claim.least:
                return Refused(line.account.name, None)
            tokens = min(tokens, fits)
        amounts = tuple(line.amount(tokens) for line in claim.lines)
        for line, amount in zip(claim.lines, amounts, strict=True):
            self._slices[line.account.name].busy += amount
        starts = tuple(line.account.window.span(now_ms)[0] for line in claim.lines)
        return Granted(claim, tokens, amounts, starts, offline=True)

    def used(self, granted: Granted, used: Sequence[int]) -> None:
        """A claim granted from here has ended: what it did not use may be spent again."""
        for line, amount, spent in zip(granted.claim.lines, granted.amounts, used, strict=True):
            if (one := self._slices.get(line.account.name)) is not None:
                one.busy -= amount - spent

    def delivered(self, granted: Granted, used: Sequence[int]) -> None:
        """The store has been told what was used: it is spent there, and no slice any more."""
        for line, spent in zip(granted.claim.lines, used, strict=True):
            # One that nothing was spent of may have been forgotten meanwhile.
            if (one := self._slices.get(line.account.name)) is not None:
                one.busy -= spent
                one.held = max(0, one.held - spent)

    def lost(self) -> None:
        """The store holds nothing for us any more."""
        for one in self._slices.values():
            one.held, one.room = 0, -1
