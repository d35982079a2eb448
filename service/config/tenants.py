"""Sections `tenants`, `keys`, `budgets`, `store`: limits, and the store that counts usage."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.answer_cache import CacheConfig
from service.config.guard import GuardConfig
from service.config.section_base import Bytes, Name, Section

Period = Literal["day", "month"]
Priority = Literal["high", "normal", "low"]
_ENV = r"^[A-Z_][A-Z0-9_]{0,63}$"
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
        pattern=_ENV,
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


class StoreConfig(Section):
    """The store of limits, budgets, keys and usage."""

    kind: Literal["memory", "redis"] = Field(
        "memory",
        description="memory: in the gateway's process, lost when it ends; one gateway only. "
        "redis: shared by gateways; Redis' own settings decide on persistence.",
    )
    url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://[^\s]+$",
        description="Redis: its URL. Put a URL that contains a password in `url_env`.",
    )
    url_env: str | None = Field(
        None,
        pattern=_ENV,
        description="Redis: environment variable that holds the URL, instead of `url`.",
    )
    prefix: str = Field(
        "coe", pattern=r"^[A-Za-z0-9._-]{1,32}$", description="Redis: prefix of all its keys."
    )
    lease_s: float = Field(
        30.0,
        ge=2,
        le=3600,
        description="Redis: time in s after which the reservations of a silent gateway expire, and "
        "for which a gateway admits from its offline quota while Redis is unreachable.",
    )
    slice: Annotated[float, Field(ge=0, le=0.25)] = Field(
        0.02,
        description="Redis: offline quota of a gateway, as a share of the rest of each limit, for "
        "times when Redis is unreachable. 0: none; the gateway then answers 503 at once.",
    )
    keys_file: str | None = Field(
        None,
        description="memory: file for the hashes of API keys. "
        "Default: keys.jsonl beside the admin key.",
    )
    timeout_ms: int = Field(
        1000, ge=10, le=60_000, description="Redis: longest wait for a reply, in ms."
    )
    cache_url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://[^\s]+$",
        description="Redis: URL of a second one for volatile data: cached answers, and replies "
        "that can be voted on. Set its maxmemory-policy to allkeys-lru. Without it each gateway "
        "keeps its own, and a vote must reach the gateway that answered.",
    )
    cache_url_env: str | None = Field(
        None,
        pattern=_ENV,
        description="Redis: environment variable that holds that URL, instead of `cache_url`.",
    )
    cache_bytes: Bytes = Field(
        256 * 1024**2,
        ge=1024**2,
        description="Without `cache_url`: memory of a gateway for volatile data, in bytes; the "
        "least recently used entries are dropped first.",
    )

    @model_validator(mode="after")
    def _check_place(self) -> StoreConfig:
        if self.kind == "redis" and (self.url is None) == (self.url_env is None):
            raise ValueError("kind redis needs exactly one of url, url_env")
        if self.kind == "memory" and (self.url is not None or self.url_env is not None):
            raise ValueError("url and url_env need kind redis")
        if self.kind == "redis" and self.keys_file is not None:
            raise ValueError("keys_file needs kind memory; Redis holds the keys otherwise")
        if self.cache_url is not None and self.cache_url_env is not None:
            raise ValueError("set at most one of cache_url, cache_url_env")
        if self.kind == "memory" and (self.cache_url or self.cache_url_env):
            raise ValueError("cache_url and cache_url_env need kind redis")
        for name in ("url", "cache_url"):
            given = getattr(self, name)
            if given is not None and "@" in given.split("?")[0]:
                raise ValueError(f"put a URL that contains a password in {name}_env")
        return self


# Tenant of keys that name none, and of requests without a key.
DEFAULT_TENANT = "default"


def known_tenant(name: str, tenants: Collection[str]) -> bool:
    """Return whether a tenant exists; until the config lists some, every name does."""
    return not tenants or name == DEFAULT_TENANT or name in tenants
