"""Opens the stores of a config, and gives access to its API keys without a running service."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.config import Config, StoreConfig
from service.errors import ConfigError
from service.gateway.auth import any_key
from service.rpc.local_paths import added_experts_path, admin_key_path, keys_path
from service.store.added_expert_repository import (
    AddedExpertRepository,
    FileExpertRepository,
    StoreExpertRepository,
)
from service.store.api_keys import FileKeyRepository, KeyRepository, KeyService, StoreKeyRepository
from service.store.memory_store import MemoryStore
from service.store.store_interface import Store
from service.store.volatile_store import MemoryVolatileStore, VolatileStore

log = logging.getLogger("coe.app")


def open_store(config: Config, owner: str) -> Store:
    """Open the store of a config, which counts limits and budgets.

    Args:
        config: The config.
        owner: The id of the process under which the store keeps reservations.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
    """
    given = config.store
    if given.kind == "memory":
        return MemoryStore()
    # This import is local, because it is slow, and only a service with Redis needs the client.
    from service.store.redis_commands import RedisClient
    from service.store.redis_store import RedisStore

    client = RedisClient(
        store_url(given),
        owner,
        prefix=given.prefix,
        timeout_s=given.timeout_ms / 1000,
        lease_s=given.lease_s,
    )
    return RedisStore(client, share=given.slice, lease_s=given.lease_s)


def store_url(given: StoreConfig) -> str:
    """The URL of a store in Redis.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
    """
    url = _url(given.url, given.url_env, "url_env")
    assert url is not None
    return url


def open_volatile(config: Config) -> VolatileStore:
    """Open the store of a config for values that may be lost.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
    """
    given = config.store
    url = _url(given.cache_url, given.cache_url_env, "cache_url_env")
    if url is None:
        gateways = config.server.gateways.most_replicas
        if gateways > 1 and config.feedback.enabled:
            log.warning(
                "without store.cache_url a vote on a reply has to reach the gateway that gave it, "
                "one of %d; others answer 404",
                gateways,
            )
        if gateways > 1 and config.router.sessions.enabled:
            log.warning(
                "without store.cache_url a tool's result has to reach the gateway that sent the "
                "call, one of %d; another one does not know the expert",
                gateways,
            )
        return MemoryVolatileStore(given.cache_bytes)
    from service.store.volatile_redis_store import RedisVolatileStore

    return RedisVolatileStore(url, prefix=given.prefix, timeout_s=given.timeout_ms / 1000)


def _url(url: str | None, variable: str | None, field: str) -> str | None:
    if variable is None:
        return url
    found = os.environ.get(variable)
    if not found:
        raise ConfigError(
            f"store.{field}: the environment variable {variable} that should hold the URL of "
            "a Redis is not set"
        )
    return found


def key_book(config: Config, store: Store) -> KeyRepository:
    """Open the repository of the API keys that an operator creates at run time."""
    if config.store.kind == "memory":
        given = config.store.keys_file
        return FileKeyRepository(Path(given) if given is not None else keys_path())
    return StoreKeyRepository(store)


def expert_book(config: Config, store: Store) -> AddedExpertRepository:
    """Open the repository of the experts that an admin adds at run time."""
    if config.store.kind != "memory":
        return StoreExpertRepository(store)
    given = config.added_experts.file
    return FileExpertRepository(Path(given) if given else added_experts_path(config.server.port))


def keys_marker(config: Config) -> Path:
    """The marker file on this machine. It exists once the repository of a config has had keys."""
    given = config.store
    if given.kind == "memory":
        kept = Path(given.keys_file) if given.keys_file is not None else keys_path()
        return kept.with_suffix(".needed")
    # Host, port, path and prefix identify the store. User and password may change.
    url = urlsplit(_url(given.url, given.url_env, "url_env") or "")
    where = repr((url.hostname, url.port, url.path, given.prefix))
    digest = hashlib.blake2b(where.encode(), digest_size=8).hexdigest()
    return admin_key_path().with_name(f"keys-{digest}.needed")


async def has_keys(config: Config) -> bool:
    """Whether requests need an API key, because there is a key or was one before.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
        StoreUnavailableError: The store can't be reached.
    """
    store = open_store(config, "starting")
    await store.start()
    try:
        return await any_key(config, key_book(config, store), keys_marker(config))
    finally:
        await store.stop()


async def with_keys(config: Config, act: Callable[[KeyService], Awaitable[Any]]) -> Any:
    """Call `act` with a config's API keys, without a running service.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
        StoreUnavailableError: The store can't be reached.
    """
    store = open_store(config, f"keys-{os.getpid()}")
    await store.start()
    try:
        return await act(KeyService(key_book(config, store)))
    finally:
        await store.stop()
