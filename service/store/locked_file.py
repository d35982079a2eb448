"""A file with mode 0600 that processes read, and replace one after another."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from service.errors import ConfigError, StorageFullError


class LockedFile:
    """A file that is replaced as a whole, under a lock beside it.

    Its methods block: another process may hold the lock.

    Args:
        path: Where it is. Its folder is made by the first `locked`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def version(self) -> bytes | None:
        """Return a value that differs after every replacement, or None without a file.

        Raises:
            ConfigError: The file can't be reached.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from None
        return f"{found.st_mtime_ns}.{found.st_ino}.{found.st_size}".encode()

    def read(self) -> bytes | None:
        """Return its content, or None without a file.

        Raises:
            ConfigError: The file can't be read.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold its lock, against this process and others.

        Raises:
            StorageFullError: The disk is full.
            ConfigError: The lock can't be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._error(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def replace(self, data: bytes) -> None:
        """Replace its content; it is on the disk when this returns.

        Raises:
            StorageFullError: The disk is full; the file is as before.
            ConfigError: The file can't be written; it is as before.
        """
        partial = self.path.with_suffix(f".{os.getpid()}")
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            raise self._error(error) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _error(self, error: OSError) -> StorageFullError | ConfigError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageFullError(f"the disk of {self.path} is full; nothing was changed")
        return ConfigError(f"{self.path}: {error.strerror}")
