"""Sections `tenants`, `keys`, `budgets`, `store`: who may use how much, and where it counts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.base import Bytes, Name, Section
from service.config.cache import CacheConfig
from service.config.guard import GuardConfig

Period = Literal["day", "month"]
Priority = Literal["high", "normal", "low"]
_ENV = r"^[A-Z_][A-Z0-9_]{0,63}$"
# In units of cost. Counted in millionths, exactly, in 53 bits.
_MOST = 9e9


class SpendConfig(Section):
    """A bound on spending in a calendar day or month (UTC), in units of cost (see `price`)."""

    amount: float = Field(gt=0, le=_MOST, description="Units of cost.")
    period: Period = Field("day", description="Calendar day or month, UTC.")


class LimitsConfig(Section):
    """What a key or a tenant may use."""

    experts: tuple[str, ...] | None = Field(
        None, description="Experts that it may ask for. Default: all."
    )
    requests_per_min: int | None = Field(
        None, ge=1, description="Requests in any 60 s; more get 429. Default: no bound."
    )
    tokens_per_min: int | None = Field(
        None,
        ge=1,
        description="Tokens in any 60 s, prompts and answers; more get 429. Default: no bound.",
    )
    concurrent: int | None = Field(
        None, ge=1, description="Requests at once; more get 429. Default: no bound."
    )
    budget: SpendConfig | None = Field(None, description="Bound on spending. Default: none.")


class TenantConfig(LimitsConfig):
    """One tenant: what all its keys may use together, and its share where there is a queue."""

    priority: Priority = Field(
        "normal",
        description="Class in the pools' queues: high goes first, low when nobody else waits; "
        "nobody waits for ever.",
    )
    weight: float = Field(
        1.0, gt=0, le=1000, description="Share of the tokens served within its class."
    )
    share_prefix: bool = Field(
        False,
        description="Share what engines have cached of prompts with the other tenants that say so. "
        "Faster where their prompts begin alike; but how long an answer takes tells whether "
        "another's prompt began the same way. Without keys everybody shares.",
    )
    guard: GuardConfig = Field(default_factory=lambda: GuardConfig())
    cache: CacheConfig = Field(default_factory=lambda: CacheConfig())


class KeyConfig(LimitsConfig):
    """An API key that the config names; others are made by `coe keys create`."""

    tenant: Name = Field("default", description="Whose key it is.")
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
    priority: Priority | None = Field(None, description="Instead of its tenant's.")

    @model_validator(mode="after")
    def _one_source(self) -> KeyConfig:
        if (self.key_env is None) == (self.sha256 is None):
            raise ValueError("exactly one of key_env, sha256")
        return self


class BudgetConfig(Section):
    """A named budget, for all requests or one tenant's."""

    amount: float = Field(gt=0, le=_MOST, description="Units of cost in a window (see `price`).")
    period: Period | None = Field(
        None, description="The window is a calendar day or month (UTC); or give `window_s`."
    )
    window_s: int | None = Field(
        None, ge=1, le=31_536_000, description="Length of a window in s, counted from 1970."
    )
    tenant: Name | None = Field(None, description="Whose requests count. Default: everybody's.")

    @model_validator(mode="after")
    def _one_window(self) -> BudgetConfig:
        if (self.period is None) == (self.window_s is None):
            raise ValueError("exactly one of period, window_s")
        return self


class StoreConfig(Section):
    """Where limits, budgets, keys and usage are counted and kept."""

    kind: Literal["memory", "redis"] = Field(
        "memory",
        description="memory: in the gateway's process, gone when it ends; one gateway only. "
        "redis: shared by gateways, and kept as Redis is told to keep it.",
    )
    url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://[^\s]+$",
        description="Redis: where it is. A password belongs into `url_env`.",
    )
    url_env: str | None = Field(
        None,
        pattern=_ENV,
        description="Redis: environment variable that holds the URL, instead of `url`.",
    )
    prefix: str = Field(
        "coe", pattern=r"^[A-Za-z0-9._-]{1,32}$", description="Redis: what its keys begin with."
    )
    lease_s: float = Field(
        30.0,
        ge=2,
        le=3600,
        description="Redis: how long what a gateway has reserved stays reserved when it is not "
        "heard of any more, and how long it goes on with its slices when Redis is gone, in s.",
    )
    slice: Annotated[float, Field(ge=0, le=0.25)] = Field(
        0.02,
        description="Redis: share of what is left of each limit that a gateway holds "
        "for when Redis is gone. 0: none, then it answers 503 at once.",
    )
    keys_file: str | None = Field(
        None,
        description="memory: file in which API keys are kept, hashed. "
        "Default: keys.jsonl beside the admin key.",
    )
    timeout_ms: int = Field(
        1000, ge=10, le=60_000, description="Redis: longest wait for a reply, in ms."
    )
    cache_url: str | None = Field(
        None,
        pattern=r"^(redis|rediss|unix)://[^\s]+$",
        description="Redis: another one, for what may be lost: kept answers, and replies that can "
        "be voted on. Tell it maxmemory-policy allkeys-lru. Without it each gateway keeps its own, "
        "and a vote has to reach the gateway that answered.",
    )
    cache_url_env: str | None = Field(
        None,
        pattern=_ENV,
        description="Redis: environment variable that holds that URL, instead of `cache_url`.",
    )
    cache_bytes: Bytes = Field(
        256 * 1024**2,
        ge=1024**2,
        description="Without `cache_url`: most memory of a gateway for what may be lost, in bytes; "
        "what was used longest ago goes first.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> StoreConfig:
        if self.kind == "redis" and (self.url is None) == (self.url_env is None):
            raise ValueError("exactly one of url, url_env")
        if self.kind == "memory" and (self.url is not None or self.url_env is not None):
            raise ValueError("url and url_env need kind redis")
        if self.kind == "redis" and self.keys_file is not None:
            raise ValueError("keys_file needs kind memory: Redis keeps the keys")
        if self.cache_url is not None and self.cache_url_env is not None:
            raise ValueError("at most one of cache_url, cache_url_env")
        if self.kind == "memory" and (self.cache_url or self.cache_url_env):
            raise ValueError("cache_url and cache_url_env need kind redis")
        for name in ("url", "cache_url"):
            given = getattr(self, name)
            if given is not None and "@" in given.split("?")[0]:
                raise ValueError(f"a URL with a password belongs into {name}_env")
        return self


# Whose keys are that name no tenant, and requests where no key is needed.
DEFAULT_TENANT = "default"


def known_tenant(name: str, tenants: Collection[str]) -> bool:
    """Whether there is such a tenant: any, until the config names some."""
    return not tenants or name == DEFAULT_TENANT or name in tenants
