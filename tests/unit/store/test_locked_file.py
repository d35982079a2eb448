"""A file that is replaced as a whole: who may read it, and what a disk's errors leave."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import CoeError, ConfigError, StorageFullError
from service.store.locked_file import LockedFile


def test_file_is_private_and_its_versions_differ(tmp_path: Path) -> None:
    file = LockedFile(tmp_path / "deep" / "keys.jsonl")
    assert file.version() is None
    assert file.read() is None
    versions = set()
    for data in (b"a", b"b", b""):
        with file.locked():
            file.replace(data)
        assert file.read() == data
        versions.add(file.version())
    assert len(versions) == 3
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert set(os.listdir(file.path.parent)) == {"keys.jsonl", "keys.lock"}


def test_changes_under_the_lock_come_one_after_another(tmp_path: Path) -> None:
    file = LockedFile(tmp_path / "count")

    def count() -> None:
        for _ in range(20):
            with LockedFile(file.path).locked():
                file.replace(b"%d" % (int(file.read() or b"0") + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read() == b"80"


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENOSPC, StorageFullError, "is full; nothing was changed"),
        (errno.EDQUOT, StorageFullError, "is full; nothing was changed"),
        (errno.EIO, ConfigError, "keys: Input/output error"),
        (errno.EROFS, ConfigError, "keys: Read-only file system"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_error_of_the_disk_is_named_and_leaves_the_file_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[CoeError],
    words: str,
    call: str,
) -> None:
    file = LockedFile(tmp_path / "keys")
    file.replace(b"before")
    version = file.version()

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error, match=words):
            file.replace(b"after")
    assert (file.read(), file.version()) == (b"before", version)
    assert os.listdir(tmp_path) == ["keys"]


@pytest.mark.parametrize(
    "act", [LockedFile.read, LockedFile.version, lambda f: f.locked().__enter__()]
)
def test_folder_that_is_a_file_is_named(
    tmp_path: Path, act: Callable[[LockedFile], object]
) -> None:
    (tmp_path / "home").write_bytes(b"")
    with pytest.raises(ConfigError, match="home/keys: "):
        act(LockedFile(tmp_path / "home" / "keys"))
