"""A file is there as a whole or not at all, also where the disk is full."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.batches.file_folder import FileFolder
from service.errors import StorageFullError, StoreUnavailableError

ID = "file-" + "a" * 24
OTHER = "file-" + "b" * 24


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_file_is_written_replaced_and_deleted(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path / "a" / "files")
    assert folder.write(ID, [b"one", b"", b"two"]) == 6
    assert folder.path_of(ID).read_bytes() == b"onetwo"
    assert stat.S_IMODE(folder.path_of(ID).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path_of(ID).parent.stat().st_mode) == 0o700
    assert folder.write(ID, [b"three"]) == 5
    assert folder.path_of(ID).read_bytes() == b"three"
    folder.delete(ID)
    folder.delete(ID)
    assert names(tmp_path / "a" / "files") == []


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, StoreUnavailableError),
        (errno.EROFS, StoreUnavailableError),
    ],
)
def test_failed_write_is_one_typed_error_and_leaves_what_was_there(
    call: str, code: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FileFolder(tmp_path)
    folder.write(ID, [b"before"])

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind):
        folder.write(ID, [b"after"])
    monkeypatch.undo()
    assert names(tmp_path) == [ID]
    assert folder.path_of(ID).read_bytes() == b"before"


def test_write_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"
        raise KeyError

    with pytest.raises(KeyError):
        FileFolder(tmp_path).write(ID, pieces())
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "file-1", ID + "/", ID + "\n", ID.upper()])
def test_other_names_reach_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the id"):
        FileFolder(tmp_path).path_of(name)


def test_unfinished_and_unknown_files_go_after_a_day(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    folder.write(ID, [b"x"])
    folder.write(OTHER, [b"x"])
    partial = folder.begin()
    now_s = os.stat(tmp_path).st_mtime
    assert folder.unfinished(now_s + 3600) == []
    assert len(names(tmp_path)) == 3
    old = folder.unfinished(now_s + 90_000)
    assert sorted(old) == [ID, OTHER]
    assert names(tmp_path) == [ID, OTHER]
    assert folder.delete_orphans(old, {OTHER}) == 1
    assert names(tmp_path) == [OTHER]
    partial.discard()
