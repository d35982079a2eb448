"""Sections `tenants`, `keys` and `budgets`: who may use the service, and how much of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from service.config.answer_cache import CacheConfig
from service.config.guard import GuardConfig
from service.config.section_base import ENV_VARIABLE_PATTERN, Name, Section

Period = Literal["day", "month"]
Priority = Literal["high", "normal", "low"]
# In units of cost. Millionths of it are counted exactly, in 53 bits.
_MAX_AMOUNT = 9e9


class SpendConfig(Section):
    """A bound on spending in a calendar day or month (UTC), in units of cost (see `price`)."""

    amount: float = Field(gt=0, le=_MAX_AMOUNT, description="Units of cost.")
    period: Period = Field("day", description="Calendar day or month, UTC.")


class LimitsConfig(Section):
    """Limits of a key or a tenant."""

    experts: tuple[str, ...] | None = Field(None, description="Allowed experts. Default: all.")
    requests_per_min: int | None = Field(
        None, ge=1, description="Requests in any 60 s; more get 429. Default: no bound."
    )
    tokens_per_min: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompts and answers in any 60 s; more get 429. Default: no bound.",
    )
    concurrent: int | None = Field(
        None, ge=1, description="Concurrent requests; more get 429. Default: no bound."
    )
    budget: SpendConfig | None = Field(None, description="Bound on spending. Default: none.")


class TenantConfig(LimitsConfig):
    """A tenant: common limits of all its keys, and its share in queues."""

    priority: Priority = Field(
        "normal",
        description="Class in queues: high goes first, low goes when no other request waits. "
        "Aging prevents starvation.",
    )
    weight: float = Field(
        1.0, gt=0, le=1000, description="Relative share of the tokens served within its class."
    )
    share_prefix: bool = Field(
        False,
        description="Share the engines' prefix cache with other tenants that allow it. This is "
        "faster for prompts with the same beginning, but response times then reveal whether "
        "another tenant's prompt began the same way. Without keys all requests share the cache.",
    )
    shadow: bool = Field(
        False,
        description="Evaluate a share of the tenant's requests by other experts (see `shadow`), "
        "after they were answered.",
    )
    shadow_prompts: bool = Field(
        False,
        description="Keep the prompts and final answers of these requests with their outcomes. "
        "Without it only a hash and the category are kept. It needs `shadow`.",
    )
    guard: GuardConfig = Field(default_factory=lambda: GuardConfig())
    cache: CacheConfig = Field(default_factory=lambda: CacheConfig())

    @model_validator(mode="after")
    def _check_shadow(self) -> TenantConfig:
        if self.shadow_prompts and not self.shadow:
            raise ValueError("shadow_prompts needs shadow: true")
        return self


class KeyConfig(LimitsConfig):
    """An API key of the config; `coe keys create` makes others."""

    tenant: Name = Field("default", description="Tenant of the key.")
    key_env: str | None = Field(
        None,
        pattern=ENV_VARIABLE_PATTERN,
        description="Environment variable that holds the key. Never the key itself.",
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the key in hexadecimal, instead of `key_env`.",
    )
    priority: Priority | None = Field(None, description="Class in queues. Default: the tenant's.")

    @model_validator(mode="after")
    def _check_source(self) -> KeyConfig:
        if (self.key_env is None) == (self.sha256 is None):
            raise ValueError("needs exactly one of key_env, sha256")
        return self


class BudgetConfig(Section):
    """A named budget, for all requests or for one tenant's."""

    amount: float = Field(
        gt=0, le=_MAX_AMOUNT, description="Units of cost in a window (see `price`)."
    )
    period: Period | None = Field(
        None, description="The window is a calendar day or month (UTC); or give `window_s`."
    )
    window_s: int | None = Field(
        None, ge=1, le=31_536_000, description="Length of a window in s, counted from 1970."
    )
    tenant: Name | None = Field(None, description="Tenant whose requests count. Default: all.")

    @model_validator(mode="after")
    def _check_window(self) -> BudgetConfig:
        if (self.period is None) == (self.window_s is None):
            raise ValueError("needs exactly one of period, window_s")
        return self


# Tenant of keys that name none, and of requests without a key.
DEFAULT_TENANT = "default"


def known_tenant(name: str, tenants: Collection[str]) -> bool:
    """Return whether a tenant exists; until the config lists some, every name does."""
    return not tenants or name == DEFAULT_TENANT or name in tenants
