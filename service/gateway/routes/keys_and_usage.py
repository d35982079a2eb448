"""The endpoints of tenants and keys: `/v1/usage`, and `/admin/keys` for who has the admin key."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.broker.ledger import limits_of
from service.broker.prices import MICRO
from service.config import Config, LimitsConfig
from service.config.base import Name
from service.config.schema import unknown_tenant
from service.config.tenants import Priority, known_tenant
from service.errors import InvalidRequestError
from service.gateway.admission import Admission
from service.gateway.routes.admin import as_json, guarded, note
from service.http.asgi import read_body
from service.store.keys import KeyRecord, KeyService
from service.store.protocol import Account, AccountBalance

_MOST_BYTES = 64 * 1024
_DAYS = 30
_MOST_DAYS = 400
_Body = TypeVar("_Body", bound=BaseModel)


class NewKey(LimitsConfig):
    """What `POST /admin/keys` takes."""

    tenant: Name = "default"
    label: str = Field("", max_length=200)
    priority: Priority | None = None
    expires_in_s: float | None = Field(None, gt=0)


class Rotation(BaseModel):
    """What `POST /admin/keys/{id}/rotate` takes."""

    model_config = ConfigDict(extra="forbid")
    grace_s: float = Field(0, ge=0, le=30 * 86_400)


def record_of(config: Config, wanted: NewKey, now_s: float) -> KeyRecord:
    """What is to be kept of a new key. Raises InvalidRequestError."""
    unknown = [name for name in wanted.experts or () if name not in config.experts]
    if unknown:
        raise InvalidRequestError(f"no expert {unknown[0][:128]!r}", param="experts")
    if not known_tenant(wanted.tenant, config.tenants):
        raise InvalidRequestError(unknown_tenant(wanted.tenant, config.tenants), param="tenant")
    return KeyRecord(
        "",
        wanted.tenant,
        "",
        label=wanted.label,
        expires_s=now_s + wanted.expires_in_s if wanted.expires_in_s else None,
        experts=wanted.experts,
        priority=wanted.priority,
        limits=limits_of(wanted),
    )


class AccountEndpoints:
    """Answers what is asked about keys and their use."""

    def __init__(self, config: Config, admission: Admission, keys: KeyService) -> None:
        self._config = config
        self._admission = admission
        self._keys = keys

    def routes(self, admin_key: str | None) -> list[Route]:
        """Without an admin key there are no admin endpoints."""
        found = [Route("/v1/usage", self._usage, methods=["GET"])]
        if admin_key is not None:
            for path, method, endpoint in (
                ("/admin/keys", "GET", self._list),
                ("/admin/keys", "POST", self._create),
                ("/admin/keys/{id}/rotate", "POST", self._rotate),
                ("/admin/keys/{id}/revoke", "POST", self._revoke),
            ):
                found.append(Route(path, guarded(endpoint, admin_key), methods=[method]))
        return found

    async def _usage(self, request: Request) -> Response:
        tenant = await self._admission.look_up(dict(request.scope["headers"]))
        given = request.query_params.get("days", str(_DAYS))
        if not given.isdigit() or len(given) > 3 or not 1 <= int(given) <= _MOST_DAYS:
            raise InvalidRequestError(
                f"`days` must be an integer from 1 to {_MOST_DAYS}", param="days"
            )
        ledger = self._admission.ledger
        limits = await ledger.limits(tenant)
        days = await ledger.usage(tenant, time.time(), int(given))
        return as_json(
            {
                "object": "usage",
                "tenant": tenant.name,
                "key": tenant.key or None,
                "limits": [
                    _limit(account, balance, shared=bool(tenant.key) and self._shared(account))
                    for account, balance in limits.values()
                ],
                "days": {day: _day(counts) for day, counts in days.items()},
            }
        )

    def _shared(self, account: Account) -> bool:
        """Whether others' requests count there, too."""
        kind, _, name = account.name.partition("/")
        budget = self._config.budgets.get(name)
        return kind == "budget" and budget is not None and budget.tenant is None

    async def _list(self, request: Request) -> Response:
        del request
        now_s = time.time()
        return as_json({"keys": [one.to_public(now_s) for one in await self._keys.records()]})

    async def _create(self, request: Request) -> Response:
        wanted = await _body(request, NewKey)
        now_s = time.time()
        record = record_of(self._config, wanted, now_s)
        made, key = await self._keys.create(record, now_s)
        await self._admission.authenticator.look()
        note(request, key=made.id, tenant=made.tenant)
        return as_json({**made.to_public(now_s), "key": key})

    async def _rotate(self, request: Request) -> Response:
        wanted = await _body(request, Rotation)
        now_s = time.time()
        made, key = await self._keys.rotate(request.path_params["id"], now_s, wanted.grace_s)
        await self._admission.authenticator.look()
        note(request, key=made.id, tenant=made.tenant)
        return as_json({**made.to_public(now_s), "key": key})

    async def _revoke(self, request: Request) -> Response:
        now_s = time.time()
        record = await self._keys.revoke(request.path_params["id"], now_s)
        await self._admission.authenticator.look()
        note(request, key=record.id, tenant=record.tenant)
        return as_json(record.to_public(now_s))


async def _body(request: Request, kind: type[_Body]) -> _Body:
    return parsed(kind, await read_body(request.receive, _MOST_BYTES))


def parsed(kind: type[_Body], raw: bytes) -> _Body:
    """A body as its schema says. Raises InvalidRequestError, naming the field."""
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise InvalidRequestError(
            f"{place or 'the body'}: {fault['msg']}", param=place or None
        ) from None


def _limit(account: Account, balance: AccountBalance, *, shared: bool = False) -> dict[str, Any]:
    """An account as its key may see it: of a `shared` one not what others have used."""
    costs = account.name.startswith("budget/") or account.name.endswith("/budget")
    scale = MICRO if costs else 1
    told: dict[str, Any] = {
        "name": account.name,
        "unit": "cost" if costs else account.name.rpartition("/")[2],
        "limit": account.limit / scale,
    }
    left = max(0.0, (account.limit - balance.spent - balance.reserved) / scale)
    if shared:
        told |= {"shared": True, "used_up": left <= 0}
    else:
        told |= {
            "spent": balance.spent / scale,
            "reserved": balance.reserved / scale,
            "left": left,
        }
    if account.window.kind in ("day", "month", "fixed"):
        told |= {"starts_s": balance.starts_ms / 1000, "ends_s": balance.ends_ms / 1000}
    return told


def _day(counts: dict[str, int]) -> dict[str, Any]:
    """A day's counts, in all and by expert."""
    told: dict[str, Any] = {"experts": {}}
    for name, count in sorted(counts.items()):
        expert, _, what = name.rpartition("/")
        value = count / MICRO if what == "cost_micro" else count
        place = told["experts"].setdefault(expert, {}) if expert else told
        place["cost" if what == "cost_micro" else what] = value
    return told
