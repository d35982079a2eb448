"""Section `store`: where limits, budgets, API keys and usage are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.section_base import ENV_VARIABLE_PATTERN, Bytes, Section


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
        pattern=ENV_VARIABLE_PATTERN,
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
        pattern=ENV_VARIABLE_PATTERN,
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
