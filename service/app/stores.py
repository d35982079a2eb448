"""Where a config has limits counted and keys kept; and the keys, with no service running."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from service.api.keyring import any_key
from service.config import Config
from service.errors import ConfigError
from service.link.secret import keys_path
from service.store.keys import FileBook, KeyBook, Keys, StoreBook
from service.store.memory import MemoryStore
from service.store.protocol import Store


def open_store(config: Config, owner: str) -> Store:
    """The store of a config. `owner`: whose reservations they are. Raises ConfigError."""
    given = config.store
    if given.kind == "memory":
        return MemoryStore()
    # Imported here: only who uses Redis needs its client.
    from service.store.redis import RedisClient
    from service.store.shared import SharedStore

    url = given.url
    if given.url_env is not None:
        url = os.environ.get(given.url_env)
        if not url:
            raise ConfigError(
                f"store.url_env: the environment variable {given.url_env} that should hold "
                "the store's URL is not set"
            )
    assert url is not None
    client = RedisClient(
        url,
        owner,
        prefix=given.prefix,
        timeout_s=given.timeout_ms / 1000,
        lease_s=given.lease_s,
    )
    return SharedStore(client, share=given.slice, lease_s=given.lease_s)


def key_book(config: Config, store: Store) -> KeyBook:
    """Where API keys made by people are kept."""
    if config.store.kind == "memory":
        given = config.store.keys_file
        return FileBook(Path(given) if given is not None else keys_path())
    return StoreBook(store)


async def has_keys(config: Config) -> bool:
    """Whether there is or was an API key. Raises ConfigError, StoreGone."""
    store = open_store(config, "starting")
    await store.start()
    try:
        return await any_key(config, key_book(config, store))
    finally:
        await store.stop()


async def with_keys(config: Config, act: Callable[[Keys], Awaitable[Any]]) -> Any:
    """Do something with the keys where they are kept, no service running. Raises StoreGone."""
    store = open_store(config, f"keys-{os.getpid()}")
    await store.start()
    try:
        return await act(Keys(key_book(config, store)))
    finally:
        await store.stop()
