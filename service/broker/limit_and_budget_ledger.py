"""Limits and budgets: claims of requests, and their settlement.

A request is counted when it arrives, before its body is read. Once it is parsed, it reserves in
every account that bounds it (of its key, its tenant and the named budgets), atomically. At the end
it is charged what it really used. Of budgets it reserves the most that it may cost, so that nothing
is ever overspent. Of tokens per minute it reserves what it is expected to use, so that clients
without bounds do not wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

from service.broker.savings import Saving
from service.broker.token_prices import MICRO, micro
from service.config import BudgetConfig, Config, LimitsConfig
from service.errors import RateLimitExceededError
from service.store.limit_windows import DAY, MINUTE, MONTH, NOW, Window, fixed
from service.store.store_interface import (
    Account,
    AccountBalance,
    Charge,
    Granted,
    Refused,
    Settlement,
    Store,
    StoreClaim,
    UsageNote,
)
from service.types import Limits, Tenant, Usage

_KEEP_USAGE_S = 400 * 86_400
_DAY_S = 86_400
_PERIODS = {"day": DAY, "month": MONTH}
# Most tenants and keys whose accounts are kept at hand.
_MOST_KNOWN = 4096

_Kind = Literal["requests", "tokens", "concurrent", "budget"]


@dataclass(frozen=True, slots=True)
class UsageBound:
    """Bounds and estimates of what a request uses, all its calls together.

    Attributes:
        prompt_tokens: The most that the prompts of all calls may have.
        max_tokens: The most that one answer may have; it may be clipped, to `least` at the least.
        answers: How many answers of that length there may be (choices times calls).
        prompt_cost: Units of cost of the prompts, at the most.
        token_cost: Units of cost for each token of `max_tokens`, all answers together.
        needs_clip: The request itself does not bound its answers so far, and has to be given
            that bound.
        likely_prompt: Tokens that the prompts of all calls are expected to have.
        likely_tokens: Tokens that one answer is expected to have; None where the client has
            bounded it, and then it is that bound.
        places: How many requests at once it counts as.
    """

    prompt_tokens: int
    max_tokens: int = 0
    answers: int = 1
    prompt_cost: float = 0.0
    token_cost: float = 0.0
    least: int = 1
    needs_clip: bool = False
    likely_prompt: int | None = None
    likely_tokens: int | None = None
    places: int = 1

    def rate_line(self, account: Account) -> Charge:
        """Its charge to a limit of tokens per minute."""
        prompt = self.prompt_tokens if self.likely_prompt is None else self.likely_prompt
        if self.likely_tokens is None:
            return Charge(account, prompt, self.answers)
        answers = self.answers * min(self.likely_tokens, self.max_tokens)
        # Where the limit is smaller than usual answers, one request at a time may still try.
        least = prompt + self.answers * self.least
        return Charge(account, min(prompt + answers, max(account.limit, least)))


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget now, in units of cost, with its window in seconds since 1970.

    `reserved` is held by open requests, which will spend only a part of it. `tenant` and `key` name
    its only user; None and empty where others spend it, too.
    """

    amount: float
    spent: float
    reserved: float
    starts_s: float
    ends_s: float
    tenant: str | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A granted claim of a request. `max_tokens` is the bound of its answer.

    It has to be passed to `Ledger.settle` exactly once, whatever the outcome of the request.
    """

    tenant: Tenant
    bound: UsageBound
    max_tokens: int
    granted: Granted


@dataclass(frozen=True, slots=True)
class _TenantAccounts:
    """The accounts of one tenant and key.

    Attributes:
        limits: The key's own limits, which they are made of.
        all: All of them, each with its kind.
        at_once: What a request is charged before its body is read.
    """

    limits: Limits
    all: tuple[tuple[_Kind, Account], ...]
    at_once: tuple[Charge, ...]


_NOTHING = UsageBound(0)


class Ledger:
    """Claims and charges of one service's tenants, counted in a store."""

    def __init__(self, config: Config, store: Store) -> None:
        self._store = store
        self._tenants = {name: limits_of(tenant) for name, tenant in config.tenants.items()}
        self._budgets = {name: _budget(name, budget) for name, budget in config.budgets.items()}
        self._of_tenant = {name: budget.tenant for name, budget in config.budgets.items()}
        self._known: dict[tuple[str, str], _TenantAccounts] = {}

    def bounds(self, tenant: Tenant) -> bool:
        """Whether this tenant's tokens or costs are bounded, so that answers need a bound."""
        limits = (tenant.limits, self._tenants.get(tenant.name, Limits()))
        return any(
            limit.tokens_per_min is not None or limit.budget is not None for limit in limits
        ) or any(self._concerns(name, tenant) for name in self._budgets)

    async def arrive(self, request_id: str, tenant: Tenant) -> Reservation:
        """Count a request before its body is read.

        Raises RateLimitExceededError, StoreUnavailableError.
        """
        return await self._claim(request_id, tenant, _NOTHING, self._accounts(tenant).at_once)

    async def look_up(self, request_id: str, tenant: Tenant) -> None:
        """Count a request that needs no expert.

        Raises RateLimitExceededError, StoreUnavailableError.
        """
        lines = []
        for kind, account in self._accounts(tenant).all:
            if kind == "requests":
                name = account.name.removesuffix("requests") + "lookups"
                lines.append(Charge(replace(account, name=name), 1))
        held = await self._claim(request_id, tenant, UsageBound(0), lines)
        await self._store.settle(held.granted, [1] * len(lines), None)

    async def reserve(self, request_id: str, tenant: Tenant, bound: UsageBound) -> Reservation:
        """Reserve what an arrived request may use.

        Raises RateLimitExceededError, naming the limit; StoreUnavailableError.
        """
        lines = []
        for kind, account in self._accounts(tenant).all:
            if kind == "concurrent":
                # It has taken one place when it arrived, and takes no more than there are.
                more = min(bound.places, account.limit) - 1
                lines += [Charge(account, more)] if more > 0 else []
            elif kind != "requests":
                lines.append(_line(kind, account, bound))
        return await self._claim(request_id, tenant, bound, lines)

    async def _claim(
        self, claim_id: str, tenant: Tenant, bound: UsageBound, lines: Sequence[Charge]
    ) -> Reservation:
        if not lines:
            granted = Granted(StoreClaim(claim_id, ()), bound.max_tokens, (), ())
            return Reservation(tenant, bound, bound.max_tokens, granted)
        claim = StoreClaim(
            claim_id, tuple(lines), bound.max_tokens, min(bound.least, bound.max_tokens)
        )
        answer = await self._store.reserve(claim)
        if isinstance(answer, Refused):
            raise _too_many(answer, next(a for a in lines if a.account.name == answer.account))
        return Reservation(tenant, bound, answer.tokens, answer)

    async def settle(
        self,
        reservation: Reservation,
        usage: Usage,
        *,
        expert: str = "",
        ended_s: float = 0.0,
        counts: bool = True,
        noted: bool = True,
        savings: Sequence[Saving] = (),
    ) -> None:
        """Charge what was used, and release the rest.

        Args:
            reservation: What `arrive` or `reserve` granted; each is settled once.
            usage: What all calls of the request used.
            expert: The expert that answered.
            ended_s: When it ended, in seconds since 1970.
            counts: Whether it counts as a request; not where its failure is this service's fault.
            noted: Whether this is the reservation of the request with which its usage is noted.
            savings: What it saved against each baseline.
        """
        settlement = self.settlement(
            reservation,
            usage,
            expert=expert,
            ended_s=ended_s,
            counts=counts,
            noted=noted,
            savings=savings,
        )
        await self.deliver(settlement)

    async def deliver(self, settlement: Settlement) -> None:
        """Settle a claim. Raises StoreUnavailableError."""
        await self._store.settle(settlement.granted, settlement.used, settlement.note)

    def settlement(
        self,
        reservation: Reservation,
        usage: Usage,
        *,
        expert: str = "",
        ended_s: float = 0.0,
        counts: bool = True,
        noted: bool = True,
        savings: Sequence[Saving] = (),
    ) -> Settlement:
        """What `settle` charges, with the same arguments."""
        granted = reservation.granted
        used = tuple(_used(line, usage, counts) for line in granted.claim.lines)
        note = _note(reservation.tenant, usage, expert, ended_s, savings) if noted else None
        return Settlement(granted, used, note)

    @property
    def has_budgets(self) -> bool:
        """Whether the config has any: keys may have budgets of their own besides."""
        return bool(self._budgets) or any(
            limits.budget is not None for limits in self._tenants.values()
        )

    async def state(self, keys: Iterable[Tenant] = ()) -> dict[str, BudgetState]:
        """Return the state of every budget.

        Named budgets have their names, tenants' own `tenant/NAME`, and those of the keys of these
        tenants `key/ID`. Raises StoreUnavailableError.
        """
        named: dict[str, tuple[Account, str | None, str]] = {
            name: (account, self._of_tenant[name], "") for name, account in self._budgets.items()
        }
        for tenant, limits in self._tenants.items():
            if (account := _own_budget(f"tenant/{tenant}", limits)) is not None:
                named[f"tenant/{tenant}"] = (account, tenant, "")
        for owner in keys:
            if (account := _own_budget(f"key/{owner.key}", owner.limits)) is not None:
                named[f"key/{owner.key}"] = (account, owner.name, owner.key)
        if not named:
            return {}
        balances = await self._store.balances([account for account, *_ in named.values()])
        return {
            name: _state(account, balance, tenant, key)
            for (name, (account, tenant, key)), balance in zip(named.items(), balances, strict=True)
        }

    async def limits(self, tenant: Tenant) -> dict[str, tuple[Account, AccountBalance]]:
        """The accounts that bound a tenant and its key, with their balances."""
        accounts = [account for _, account in self._accounts(tenant).all]
        balances = await self._store.balances(accounts)
        return {a.name: (a, b) for a, b in zip(accounts, balances, strict=True)}

    async def usage(self, tenant: Tenant, now_s: float, days: int) -> dict[str, dict[str, int]]:
        """Usage on each of the last `days` days (UTC), by day; days without usage are left out.

        Keys: requests, prompt_tokens, completion_tokens, cost_micro, and the same per
        expert as `NAME/requests` and so on; `savings.totals` reads the others.
        """
        starts = [int(now_s // _DAY_S) * _DAY_S - i * _DAY_S for i in range(days)]
        found = await self._store.counts([_usage_name(tenant, start) for start in starts])
        return {_day(start): counts for start, counts in zip(starts, found, strict=True) if counts}

    def _accounts(self, tenant: Tenant) -> _TenantAccounts:
        """The accounts that bound a tenant and its key; they are the same for all its requests."""
        known = self._known.get((tenant.name, tenant.key))
        if known is None or (known.limits is not tenant.limits and known.limits != tenant.limits):
            found: list[tuple[_Kind, Account]] = []
            if tenant.key:
                found += _limited(f"key/{tenant.key}", tenant.limits)
            found += _limited(f"tenant/{tenant.name}", self._tenants.get(tenant.name, Limits()))
            found += [
                ("budget", account)
                for name, account in self._budgets.items()
                if self._concerns(name, tenant)
            ]
            at_once = [Charge(a, 1) for kind, a in found if kind in ("requests", "concurrent")]
            known = _TenantAccounts(tenant.limits, tuple(found), tuple(at_once))
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[tenant.name, tenant.key] = known
        return known

    def _concerns(self, budget: str, tenant: Tenant) -> bool:
        return self._of_tenant[budget] in (None, tenant.name)


def limits_of(given: LimitsConfig) -> Limits:
    """The limits that a section of the config gives."""
    return Limits(
        given.requests_per_min,
        given.tokens_per_min,
        given.concurrent,
        given.budget.amount if given.budget is not None else None,
        given.budget.period if given.budget is not None else "day",
    )


def _budget(name: str, given: BudgetConfig) -> Account:
    window: Window
    if given.window_s is not None:
        window = fixed(given.window_s)
    else:
        assert given.period is not None
        window = _PERIODS[given.period]
    return Account(f"budget/{name}", _whole(given.amount), window)


def _own_budget(whose: str, limits: Limits) -> Account | None:
    if limits.budget is None:
        return None
    return Account(f"{whose}/budget", _whole(limits.budget), _PERIODS[limits.period])


def _limited(whose: str, limits: Limits) -> Iterator[tuple[_Kind, Account]]:
    """The accounts of the limits of a tenant or a key."""
    if limits.requests_per_min is not None:
        yield "requests", Account(f"{whose}/requests", limits.requests_per_min, MINUTE)
    if limits.tokens_per_min is not None:
        yield "tokens", Account(f"{whose}/tokens", limits.tokens_per_min, MINUTE)
    if limits.concurrent is not None:
        yield "concurrent", Account(f"{whose}/concurrent", limits.concurrent, NOW)
    if (account := _own_budget(whose, limits)) is not None:
        yield "budget", account


def _line(kind: _Kind, account: Account, bound: UsageBound) -> Charge:
    """What a request is charged in an account of tokens or costs."""
    if kind == "tokens":
        return bound.rate_line(account)
    return Charge(account, micro(bound.prompt_cost), bound.token_cost * MICRO)


@lru_cache(_MOST_KNOWN)
def _kind(account: str) -> str:
    """The kind of an account by its name: requests, lookups, tokens, concurrent, or budget."""
    return "budget" if account.startswith("budget/") else account.rpartition("/")[2]


def _used(line: Charge, usage: Usage, counts: bool) -> int:
    kind = _kind(line.account.name)
    if kind == "budget":
        return micro(usage.cost)
    if kind == "tokens":
        return usage.prompt_tokens + usage.completion_tokens
    return 1 if kind == "requests" and counts else 0


def _whole(units: float) -> int:
    """Units of a limit in millionths, rounded down."""
    return math.floor(round(units * MICRO, 6))


def _state(account: Account, balance: AccountBalance, tenant: str | None, key: str) -> BudgetState:
    return BudgetState(
        account.limit / MICRO,
        balance.spent / MICRO,
        balance.reserved / MICRO,
        balance.starts_ms / 1000,
        balance.ends_ms / 1000,
        tenant,
        key,
    )


_WORDS = {
    "requests": "requests per minute",
    "lookups": "requests per minute that ask no expert",
    "tokens": "tokens per minute",
    "concurrent": "requests at once",
}


def _too_many(refused: Refused, line: Charge) -> RateLimitExceededError:
    whose, _, kind = refused.account.rpartition("/")
    limit = line.account.limit
    if kind in _WORDS and not refused.account.startswith("budget/"):
        of = "this key" if whose.startswith("key/") else "this tenant"
        what, code = f"{of} may use {limit} {_WORDS[kind]}", "rate_limit_exceeded"
    else:
        amount = f"{limit / MICRO:g}"
        of = {"key": "this key's budget", "tenant": "this tenant's budget"}.get(
            whose.partition("/")[0], f"budget {refused.account.partition('/')[2]!r}"
        )
        what, code = f"{of} of {amount} units is used up", "insufficient_quota"
    if refused.retry_after_s is None:
        what = f"this request alone is larger than what is allowed: {what}"
    elif refused.busy:
        what += "; requests under way hold what is left"
    vain = refused.retry_after_s is None or (code == "insufficient_quota" and not refused.busy)
    return RateLimitExceededError(what, retry_after_s=refused.retry_after_s, code=code, final=vain)


def _usage_name(tenant: Tenant, start_s: int) -> str:
    return f"usage/{tenant.key or tenant.name}/{_day(start_s)}"


def _day(start_s: float) -> str:
    return _date(int(start_s // _DAY_S))


@lru_cache(_MOST_KNOWN)
def _date(day: int) -> str:
    return datetime.fromtimestamp(day * _DAY_S, UTC).strftime("%Y-%m-%d")


def _note(
    tenant: Tenant, usage: Usage, expert: str, ended_s: float, savings: Sequence[Saving]
) -> UsageNote:
    counts: Mapping[str, int] = {
        "requests": 1,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost_micro": micro(usage.cost),
    }
    if expert:
        counts = {**counts, **{f"{expert}/{name}": count for name, count in counts.items()}}
    for saving in savings:
        counts = {**counts, **saving.counts()}
    return UsageNote(_usage_name(tenant, int(ended_s)), counts, _KEEP_USAGE_S)
