"""`GET /v1/usage`: the limits of a key, what is left of them, and its usage by day."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.broker.savings import is_saving, totals
from service.broker.token_prices import MICRO
from service.config import Config
from service.errors import InvalidRequestError
from service.gateway.dependencies import CountedTenant, Services, json_response
from service.store.store_interface import Account, AccountBalance

router = APIRouter()

_DEFAULT_DAYS = 30
_MAX_DAYS = 400


@router.get("/v1/usage")
async def usage(request: Request, services: Services, tenant: CountedTenant) -> Response:
    """Return limits and usage of the key that the request shows."""
    given = request.query_params.get("days", str(_DEFAULT_DAYS))
    if not given.isdecimal() or len(given) > 3 or not 1 <= int(given) <= _MAX_DAYS:
        raise InvalidRequestError(f"`days` must be an integer from 1 to {_MAX_DAYS}", param="days")
    ledger = services.admission.ledger
    limits = await ledger.limits(tenant)
    days = await ledger.usage(tenant, time.time(), int(given))
    return json_response(
        {
            "object": "usage",
            "tenant": tenant.name,
            "key": tenant.key or None,
            "cost_unit": services.config.prices.unit,
            "limits": [
                _limit(
                    account,
                    balance,
                    shared=bool(tenant.key) and _is_shared(services.config, account),
                )
                for account, balance in limits.values()
            ],
            "days": {day: _day(counts) for day, counts in days.items()},
            "savings": {
                name: total.to_json() for name, total in totals(list(days.values())).items()
            },
        }
    )


def _is_shared(config: Config, account: Account) -> bool:
    """Whether the requests of other tenants count in this account, too."""
    kind, _, name = account.name.partition("/")
    budget = config.budgets.get(name)
    return kind == "budget" and budget is not None and budget.tenant is None


def _limit(account: Account, balance: AccountBalance, *, shared: bool = False) -> dict[str, Any]:
    """An account as its key may see it; a `shared` one doesn't show what others have used."""
    costs = account.name.startswith("budget/") or account.name.endswith("/budget")
    scale = MICRO if costs else 1
    limit: dict[str, Any] = {
        "name": account.name,
        "unit": "cost" if costs else account.name.rpartition("/")[2],
        "limit": account.limit / scale,
    }
    left = max(0.0, (account.limit - balance.spent - balance.reserved) / scale)
    if shared:
        limit |= {"shared": True, "used_up": left <= 0}
    else:
        limit |= {
            "spent": balance.spent / scale,
            "reserved": balance.reserved / scale,
            "left": left,
        }
    if account.window.kind in ("day", "month", "fixed"):
        limit |= {"starts_s": balance.starts_ms / 1000, "ends_s": balance.ends_ms / 1000}
    return limit


def _day(counts: dict[str, int]) -> dict[str, Any]:
    """One day's counts, in total and by expert."""
    day: dict[str, Any] = {"experts": {}}
    if savings := totals([counts]):
        day["savings"] = {name: total.to_json() for name, total in savings.items()}
    for name, count in sorted(counts.items()):
        if is_saving(name):
            continue
        expert, _, unit = name.rpartition("/")
        value = count / MICRO if unit == "cost_micro" else count
        place = day["experts"].setdefault(expert, {}) if expert else day
        place["cost" if unit == "cost_micro" else unit] = value
    return day
