"""A SQLite file whose every change is on the disk when the call returns, for one machine.

It uses a write-ahead log with `synchronous=FULL`. The connection has a thread of its own, and
several processes may use one file.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from service.errors import StorageFullError, StoreUnavailableError

log = logging.getLogger("coe.store")

T = TypeVar("T")

# The longest wait for other processes, from the call on: those that queue up behind a file that
# another process has locked do not wait one after another.
_BUSY_S = 10.0


class SqliteFile:
    """One SQLite file.

    Args:
        path: The file. It is made, for its owner only, when something is first written.
        schema: The statements that make its tables.
        version: The version of the schema. A file of a later version is left alone, and one of an
            earlier version gets the tables and columns that it lacks.
        what: What is in it, for errors, such as "batches".
        erases: Whether deleted bytes are overwritten in the file.
        clock: Returns a time in s, for waits.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        *,
        what: str,
        erases: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._schema = schema
        self._version = version
        self._what = what
        self._erases = erases
        self._clock = clock
        # How long the work that runs now may wait for other processes.
        self._busy_s = _BUSY_S
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sqlite-{what.split()[0]}")
        self._connection: sqlite3.Connection | None = None
        self._stopped = False

    async def start(self) -> None:
        """Open the file if it is there."""
        await self._run(self._existing)

    async def stop(self) -> None:
        """Close it."""

        def end() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        if not self._stopped:
            self._stopped = True
            await self._run(end)
            self._thread.shutdown(wait=False)

    async def exists(self) -> bool:
        """Whether anything was written, by this process or another one."""
        return await self._run(self._existing) is not None

    async def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query; none where nothing was written yet.

        Raises:
            StoreUnavailableError: The file can't be read.
        """

        def rows(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
            return db.execute(query, values).fetchall()

        return await self.look(rows) or []

    async def look(self, reads: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run several queries on one state of the file; None where nothing was written yet.

        Raises:
            StoreUnavailableError: The file can't be read.
        """

        def look() -> T | None:
            db = self._existing()
            if db is None:
                return None
            with _transaction(db, "DEFERRED"):
                return reads(db)

        return await self._run(look)

    async def write(
        self,
        change: Callable[[sqlite3.Connection], T],
        *,
        removed: Callable[[T], bool] | None = None,
    ) -> T:
        """Make a change, all of it or nothing.

        Args:
            change: Makes it.
            removed: Returns from its result whether it deleted content. In a file that erases,
                the log is then emptied as well, unless another process reads it meanwhile.

        Raises:
            StorageFullError: The disk is full; nothing was written.
            StoreUnavailableError: The file can't be written.
        """

        def write() -> T:
            db = self._connection or self._open()
            with _transaction(db, "IMMEDIATE"):
                changed = change(db)
            if self._erases and removed is not None and removed(changed):
                _empty_log(db)
            return changed

        return await self._run(write)

    async def _run(self, work: Callable[[], T]) -> T:
        """Run work in the connection's thread; it ends also where the caller is cancelled."""
        loop = asyncio.get_running_loop()
        until_s = self._clock() + _BUSY_S
        try:
            return await loop.run_in_executor(self._thread, self._translated, work, until_s)
        except RuntimeError as error:
            # The thread was shut down.
            raise StoreUnavailableError(f"the state of {self._what} is closed") from error

    def _existing(self) -> sqlite3.Connection | None:
        """The connection; None where nothing was written yet, by this process or another one."""
        if self._connection is None and self._path.exists():
            self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
        except OSError as error:
            raise StoreUnavailableError(
                f"the folder of {self._what} can't be written: {error.strerror}"
            ) from None
        db = sqlite3.connect(
            self._path, timeout=self._busy_s, isolation_level=None, check_same_thread=False
        )
        try:
            _use_log(db, self._busy_s)
            db.execute("PRAGMA synchronous=FULL")
            if self._erases:
                db.execute("PRAGMA secure_delete=ON")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > self._version:
                raise StoreUnavailableError(
                    f"the state of {self._what} is from a newer version of this service"
                )
            if version < self._version:
                # An index may be on a column that an older file lacks.
                with _transaction(db, "IMMEDIATE"):
                    for statement in _missing_columns(db, self._schema):
                        db.execute(statement)
                db.executescript(
                    f"BEGIN IMMEDIATE; {self._schema} PRAGMA user_version={self._version}; COMMIT;"
                )
        except BaseException:
            db.close()
            raise
        self._connection = db
        return db

    def _translated(self, work: Callable[[], T], until_s: float) -> T:
        """Do work, and raise SQLite's errors as this service's."""
        self._busy_s = max(0.0, until_s - self._clock())
        try:
            if self._connection is not None:
                _wait_up_to(self._connection, self._busy_s)
            return work()
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            if name == "SQLITE_FULL":
                raise StorageFullError(f"the disk of {self._what} is full") from None
            # The text may quote a value.
            log.error("the state of %s failed: %s", self._what, name)
            raise StoreUnavailableError(f"the state of {self._what} failed ({name})") from None


def _missing_columns(db: sqlite3.Connection, schema: str) -> list[str]:
    """Return the statements that add what the tables of an older file lack of a schema."""
    statements = []
    with closing(sqlite3.connect(":memory:")) as whole:
        whole.executescript(schema)
        tables = whole.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            known = {name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")}
            for _, name, kind, required, default, _ in whole.execute(f"PRAGMA table_info({table})"):
                if known and name not in known:
                    bound = " NOT NULL" if required else ""
                    given = "" if default is None else f" DEFAULT {default}"
                    statements.append(f"ALTER TABLE {table} ADD COLUMN {name} {kind}{bound}{given}")
    return statements


def _wait_up_to(db: sqlite3.Connection, busy_s: float) -> None:
    db.execute(f"PRAGMA busy_timeout={int(busy_s * 1000)}")


def _use_log(db: sqlite3.Connection, busy_s: float) -> None:
    """Switch to the write-ahead log. SQLite does not wait here while another process does so."""
    end_s = time.monotonic() + busy_s
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > end_s:
                raise
        time.sleep(0.01)


def _empty_log(db: sqlite3.Connection) -> None:
    """Write the log into the file, and cut it to nothing: it holds pages as they were before."""
    _wait_up_to(db, 0.2)
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.OperationalError as error:
        # The change is made. The next removal empties the log.
        log.warning("the log of removed content can't be emptied yet: %s", error.sqlite_errorname)


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
