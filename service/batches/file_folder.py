"""The folder with the contents of files: each file is there as a whole, or not at all.

A file is written under a temporary name, flushed to the disk and renamed. All methods block; call
them in a thread. The folder is readable by its owner only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import CoeError, StorageFullError, StoreUnavailableError

_ID = re.compile(r"file-[0-9a-f]{24}")
_PARTIAL = ".partial-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Files that nothing knows are deleted after this time. An upload is known a moment after it is
# complete.
_ORPHAN_S = 86_400.0


class PartialFile:
    """A file that is being written, and that is deleted unless it is kept.

    Attributes:
        size: The bytes that were written so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        self.size = 0
        with _errors():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._handle: int | None = os.open(self._path, flags, 0o600)

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            StorageFullError: The disk is full.
            StoreUnavailableError: The folder can't be written.
        """
        assert self._handle is not None
        view = memoryview(data)
        with _errors():
            while view:
                view = view[os.write(self._handle, view) :]
        self.size += len(data)

    def keep(self, file_id: str) -> None:
        """Flush it to the disk, and give it its name.

        Raises:
            StorageFullError: The disk is full.
            StoreUnavailableError: The folder can't be written.
        """
        assert self._handle is not None
        with _errors():
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None
            os.replace(self._path, self._folder / _checked(file_id))
            _sync_folder(self._folder)

    def discard(self) -> None:
        """Delete it, where it was not kept."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


class FileFolder:
    """The contents of files, by id.

    Args:
        path: The folder. It is made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> PartialFile:
        """Begin to write a file.

        Raises:
            StorageFullError: The disk is full.
            StoreUnavailableError: The folder can't be written.
        """
        return PartialFile(self._path)

    def write(self, file_id: str, pieces: Iterable[bytes]) -> int:
        """Write a whole file, or replace it, and return its size in bytes.

        Raises:
            StorageFullError: The disk is full.
            StoreUnavailableError: The folder can't be written.
        """
        partial = self.begin()
        try:
            for piece in pieces:
                partial.write(piece)
            partial.keep(file_id)
        finally:
            partial.discard()
        return partial.size

    def path_of(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._path / _checked(file_id)

    def delete(self, file_id: str) -> None:
        """Delete a file's content, if it is there.

        Raises:
            StoreUnavailableError: It can't be deleted.
        """
        with _errors():
            self.path_of(file_id).unlink(missing_ok=True)

    def unfinished(self, now_s: float | None = None) -> list[str]:
        """Delete what was never finished, and return the ids of files that are older than a day.

        Args:
            now_s: Seconds since 1970; None for now.
        """
        oldest_s = (time.time() if now_s is None else now_s) - _ORPHAN_S
        old = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat().st_mtime >= oldest_s:
                        continue
                    if entry.name.startswith(_PARTIAL):
                        Path(entry.path).unlink(missing_ok=True)
                    elif _ID.fullmatch(entry.name):
                        old.append(entry.name)
        return old

    def delete_orphans(self, old: Collection[str], known: Collection[str]) -> int:
        """Delete those of `old` that are not `known`, and return how many."""
        orphans = [file_id for file_id in old if file_id not in known]
        for file_id in orphans:
            self.delete(file_id)
        return len(orphans)


def _checked(file_id: str) -> str:
    """An id as the name of a file.

    Raises:
        ValueError: It is no id that this service makes.
    """
    if not _ID.fullmatch(file_id):
        raise ValueError("not the id of a file")
    return file_id


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _errors() -> Iterator[None]:
    """Raise the errors of the file system as this service's."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from None


def storage_error(error: OSError) -> CoeError:
    """This service's error for one of the file system."""
    if error.errno in _FULL:
        return StorageFullError("the disk of files and batches is full")
    return StoreUnavailableError(f"the folder of files can't be used: {error.strerror}")
