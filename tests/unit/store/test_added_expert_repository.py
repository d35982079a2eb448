"""Added experts in a file and in a store: the same answers, and nothing half-written."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from pathlib import Path

import pytest

from service.config.effective_config import AddedExperts, parse_added_expert
from service.errors import ConfigError, ConflictError, StorageFullError
from service.store.added_expert_repository import (
    AddedExpertRepository,
    FileExpertRepository,
    StoreExpertRepository,
)
from service.store.memory_store import MemoryStore

KINDS = ["file", "store"]


def repository(kind: str, folder: Path) -> AddedExpertRepository:
    if kind == "file":
        return FileExpertRepository(folder / "home" / "experts.json")
    return StoreExpertRepository(MemoryStore())


def with_one(before: AddedExperts, name: str) -> AddedExperts:
    _, one = parse_added_expert({"name": name, "base": "general", "adapter": "/a"}, 1.0)
    return before.including(name, one, 1.0)


@pytest.mark.parametrize("kind", KINDS)
async def test_changes_are_read_back_and_versions_differ(kind: str, tmp_path: Path) -> None:
    book = repository(kind, tmp_path)
    assert await book.version() is None
    assert await book.load() == AddedExperts()
    versions = [None]
    for name in "ab":
        after = await book.change(lambda before, name=name: with_one(before, name))
        assert await book.load() == after
        versions.append(await book.version())
    assert len(set(versions)) == 3
    assert set((await book.load()).experts) == {"a", "b"}


@pytest.mark.parametrize("kind", KINDS)
async def test_refused_change_leaves_everything_as_it_was(kind: str, tmp_path: Path) -> None:
    book = repository(kind, tmp_path)
    await book.change(lambda before: with_one(before, "a"))
    version = await book.version()

    def refuse(_: AddedExperts) -> AddedExperts:
        raise ConflictError("no")

    with pytest.raises(ConflictError):
        await book.change(refuse)
    assert await book.version() == version


@pytest.mark.parametrize("kind", KINDS)
async def test_changes_at_the_same_time_are_all_kept(kind: str, tmp_path: Path) -> None:
    book = repository(kind, tmp_path)
    names = [f"x{i}" for i in range(12)]
    await asyncio.gather(
        *(book.change(lambda before, name=name: with_one(before, name)) for name in names)
    )
    assert set((await book.load()).experts) == set(names)


async def test_file_is_private_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    book = FileExpertRepository(path)
    await book.change(lambda before: with_one(before, "a"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(os.listdir(tmp_path)) == {path.name, "experts.lock"}
    for damage in (b"", b"{", b"[]"):
        path.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"experts\.json: .*damaged"):
            await book.load()
        with pytest.raises(ConfigError):
            await book.change(lambda before: with_one(before, "b"))
        assert path.read_bytes() == damage


async def test_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "experts.json"
    book = FileExpertRepository(path)
    before = await book.change(lambda before: with_one(before, "a"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="is full; nothing was changed"):
            await book.change(lambda before: with_one(before, "b"))
    assert await book.load() == before
    assert set(os.listdir(tmp_path)) == {path.name, "experts.lock"}
