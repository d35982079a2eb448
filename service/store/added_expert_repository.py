"""Where the experts that an admin has added are kept: in a file, or in the store of gateways."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import orjson

from service.config.effective_config import AddedExperts
from service.errors import ConfigError, ConflictError, StorageFullError
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
        self._path = path

    async def version(self) -> bytes | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return f"{found.st_mtime_ns}.{found.st_ino}.{found.st_size}".encode()

    async def load(self) -> AddedExperts:
        return await asyncio.to_thread(self._read)

    async def change(self, change: Change) -> AddedExperts:
        return await asyncio.to_thread(self._change, change)

    def _read(self) -> AddedExperts:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return AddedExperts()
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        try:
            return _loads(data)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error.message}") from None

    def _change(self, change: Change) -> AddedExperts:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                after = change(self._read())
                self._write(orjson.dumps(after.to_json()))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(
                    f"the disk of {self._path} is full; nothing was changed"
                ) from None
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        return after

    def _write(self, data: bytes) -> None:
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock, against this process and others."""
        lock = os.open(self._path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _loads(data: bytes | None) -> AddedExperts:
    if data is None:
        return AddedExperts()
    try:
        return AddedExperts.from_json(orjson.loads(data))
    except orjson.JSONDecodeError:
        raise ConfigError("the added experts are damaged, or of another version") from None
