"""Where the experts that an admin has added are kept: in a file, or in the store of gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import orjson

from service.config.effective_config import AddedExperts
from service.errors import ConfigError, ConflictError
from service.store.locked_file import LockedFile
from service.store.store_interface import Store

# The store's table, with one record.
_TABLE = "experts"
_RECORD = "added"
# The number of attempts of a compare-and-set while others change the record.
_MAX_ATTEMPTS = 20

Change = Callable[[AddedExperts], AddedExperts]


class AddedExpertRepository(Protocol):
    """The storage of added experts."""

    async def version(self) -> bytes | None:
        """Return a value that differs after every change, or None before the first.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """

    async def load(self) -> AddedExperts:
        """Return all added experts.

        Raises:
            StoreUnavailableError: The store can't be reached.
            ConfigError: They are damaged.
        """

    async def change(self, change: Change) -> AddedExperts:
        """Replace them by the result of `change`, atomically.

        `change` may be called more than once, and its errors are raised.

        Raises:
            StoreUnavailableError: The store can't be reached.
            StorageFullError: There is no room for them.
            ConfigError: They are damaged, or can't be written.
        """


class StoreExpertRepository:
    """Added experts in the store that gateways share."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def version(self) -> bytes | None:
        return await self._store.version(_TABLE)

    async def load(self) -> AddedExperts:
        return _loads((await self._store.records(_TABLE)).get(_RECORD))

    async def change(self, change: Change) -> AddedExperts:
        for _ in range(_MAX_ATTEMPTS):
            data = (await self._store.records(_TABLE)).get(_RECORD)
            after = change(_loads(data))
            if await self._store.replace(_TABLE, _RECORD, data, orjson.dumps(after.to_json())):
                return after
        raise ConflictError("others changed the added experts at the same time: try again")


class FileExpertRepository:
    """Added experts in a file with mode 0600, for a store in memory.

    The file is read and written in threads, because another process may hold its lock.
    """

    def __init__(self, path: Path) -> None:
        self._file = LockedFile(path)

    async def version(self) -> bytes | None:
        return self._file.version()

    async def load(self) -> AddedExperts:
        return await asyncio.to_thread(self._read)

    async def change(self, change: Change) -> AddedExperts:
        return await asyncio.to_thread(self._change, change)

    def _read(self) -> AddedExperts:
        data = self._file.read()
        try:
            return _loads(data)
        except ConfigError as error:
            raise ConfigError(f"{self._file.path}: {error.message}") from None

    def _change(self, change: Change) -> AddedExperts:
        with self._file.locked():
            after = change(self._read())
            self._file.replace(orjson.dumps(after.to_json()))
        return after


def _loads(data: bytes | None) -> AddedExperts:
    if data is None:
        return AddedExperts()
    try:
        return AddedExperts.from_json(orjson.loads(data))
    except orjson.JSONDecodeError:
        raise ConfigError("the added experts are damaged, or of another version") from None
