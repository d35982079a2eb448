"""A SQLite file that another process has locked: how long calls wait, and what they raise."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from service.errors import StoreUnavailableError
from service.store.sqlite_file import SqliteFile

SCHEMA = "CREATE TABLE IF NOT EXISTS t (x);"


class Clock:
    """A clock that the test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_calls_that_queue_up_wait_from_when_they_were_made(tmp_path: Path) -> None:
    clock = Clock()
    file = SqliteFile(tmp_path / "f", SCHEMA, 1, what="tests", clock=clock)
    begun, go_on = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> int:
        begun.set()
        assert go_on.wait(60)
        return busy_ms(db)

    def busy_ms(db: sqlite3.Connection) -> int:
        return int(db.execute("PRAGMA busy_timeout").fetchone()[0])

    holding = asyncio.create_task(file.write(hold))
    assert await asyncio.to_thread(begun.wait, 60)
    early = [asyncio.create_task(call(busy_ms)) for call in (file.write, file.look)]
    await asyncio.sleep(0)  # they are queued
    clock.now_s = 6
    later = asyncio.create_task(file.write(busy_ms))
    await asyncio.sleep(0)
    clock.now_s = 13
    go_on.set()
    # The first one had begun; those after it have waited for 13 s and for 7 s.
    assert await asyncio.gather(holding, *early, later) == [10_000, 0, 0, 3_000]
    assert await file.write(busy_ms) == 10_000
    await file.stop()


async def test_calls_behind_a_locked_file_fail_together_and_it_works_once_it_is_free(
    tmp_path: Path,
) -> None:
    clock = Clock()
    file = SqliteFile(tmp_path / "f", SCHEMA, 1, what="tests", clock=clock)
    await file.write(lambda db: db.execute("INSERT INTO t VALUES (1)").rowcount)
    other = sqlite3.connect(tmp_path / "f", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    go_on = threading.Event()
    waiting = asyncio.create_task(file.look(lambda _: go_on.wait(60)))
    await asyncio.sleep(0)
    calls = [
        asyncio.create_task(file.write(lambda db: db.execute("DELETE FROM t").rowcount))
        for _ in range(20)
    ]
    await asyncio.sleep(0)
    clock.now_s = 20
    go_on.set()
    assert await waiting
    for call in calls:
        with pytest.raises(StoreUnavailableError, match="SQLITE_BUSY"):
            await call
    assert await file.read("SELECT x FROM t") == [(1,)]
    other.execute("ROLLBACK")
    other.close()
    assert await file.write(lambda db: db.execute("DELETE FROM t").rowcount) == 1
    await file.stop()


async def test_file_of_an_older_version_gets_what_it_lacks_and_keeps_its_rows(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.sqlite3"
    older = SqliteFile(path, "CREATE TABLE IF NOT EXISTS a (x INTEGER);", 1, what="things")
    await older.write(lambda db: db.execute("INSERT INTO a VALUES (7)").rowcount)
    await older.stop()
    schema = """
    CREATE TABLE IF NOT EXISTS a (x INTEGER, y TEXT NOT NULL DEFAULT 'none', z REAL);
    CREATE INDEX IF NOT EXISTS a_by_y ON a (y);
    CREATE TABLE IF NOT EXISTS b (x INTEGER);
    """
    for _ in range(2):
        newer = SqliteFile(path, schema, 2, what="things")
        assert await newer.read("SELECT x, y, z FROM a") == [(7, "none", None)]
        assert await newer.read("SELECT * FROM b") == []
        await newer.stop()
