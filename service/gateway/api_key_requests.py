"""Bodies of the endpoints that change API keys, and the records that are made of them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.broker.limit_and_budget_ledger import limits_of
from service.config import Config, LimitsConfig
from service.config.schema import unknown_tenant
from service.config.section_base import Name
from service.config.tenants import Priority, known_tenant
from service.errors import InvalidRequestError
from service.store.api_keys import KeyRecord

_Body = TypeVar("_Body", bound=BaseModel)


class NewKey(LimitsConfig):
    """The body of `POST /admin/keys`."""

    tenant: Name = "default"
    label: str = Field("", max_length=200)
    priority: Priority | None = None
    expires_in_s: float | None = Field(None, gt=0)


class Rotation(BaseModel):
    """The body of `POST /admin/keys/{id}/rotate`."""

    model_config = ConfigDict(extra="forbid")
    grace_s: float = Field(0, ge=0, le=30 * 86_400)


def parse_key_body(kind: type[_Body], raw: bytes) -> _Body:
    """Parse a body by its schema; an empty body is an empty object.

    Raises:
        InvalidRequestError: The body doesn't fit the schema; the error names the field.
    """
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, detail["loc"]))
        raise InvalidRequestError(
            f"{field or 'the body'}: {detail['msg']}", param=field or None
        ) from None


def new_key_record(config: Config, body: NewKey, now_s: float) -> KeyRecord:
    """Make the record of a new key, without its id and digest.

    Raises:
        InvalidRequestError: The config has no such expert or tenant.
    """
    unknown = [name for name in body.experts or () if name not in config.experts]
    if unknown:
        raise InvalidRequestError(f"no expert {unknown[0][:128]!r}", param="experts")
    if not known_tenant(body.tenant, config.tenants):
        raise InvalidRequestError(unknown_tenant(body.tenant, config.tenants), param="tenant")
    return KeyRecord(
        "",
        body.tenant,
        "",
        label=body.label,
        expires_s=now_s + body.expires_in_s if body.expires_in_s else None,
        experts=body.experts,
        priority=body.priority,
        limits=limits_of(body),
    )
