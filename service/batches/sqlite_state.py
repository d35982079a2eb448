"""The state of files and batches in an embedded SQLite file, for the gateways of one machine.

Every change is one transaction that is on the disk when the call returns.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import orjson

from service.batches.batch_progress import ModelCounts
from service.batches.batch_records import (
    BatchCounts,
    BatchRecord,
    FileRecord,
    LineResult,
    Status,
    dump_batch,
    dump_file,
    load_batch,
    load_file,
)
from service.batches.batch_state import CANCELLED_LEASE_S, MOST_LEASES, BatchStatistics
from service.store.list_page import Page
from service.store.sqlite_file import SqliteFile

T = TypeVar("T")
Clock = Callable[[], float]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_s INTEGER NOT NULL, expires_s INTEGER NOT NULL, record BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, created_s, id);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, input TEXT NOT NULL, created_s INTEGER NOT NULL,
    version INTEGER NOT NULL, status TEXT NOT NULL, open INTEGER NOT NULL, sealed INTEGER NOT NULL,
    record BLOB NOT NULL, plan BLOB, owner TEXT, leased_until_s REAL NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0,
    cost REAL NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, created_s, id);
CREATE INDEX IF NOT EXISTS open_batches ON batches (open, created_s) WHERE open;
CREATE TABLE IF NOT EXISTS results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, body BLOB NOT NULL,
    settlements BLOB, PRIMARY KEY (batch, line)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (
    batch TEXT NOT NULL, model TEXT NOT NULL, completed INTEGER NOT NULL, failed INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (batch, model)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unsettled ON results (batch, line) WHERE settlements IS NOT NULL;
"""
_COUNTS = (
    "completed, failed, prompt_tokens, completion_tokens, cost, cached_tokens, reasoning_tokens"
)
_OF_MODEL = "completed, failed, prompt_tokens, completion_tokens, cost"
_BATCH = (
    f"record, {_COUNTS}, (SELECT json_group_array(json_array(model, {_OF_MODEL})) FROM progress "
    "WHERE progress.batch = batches.id)"
)
_VERSION = 2


class SqliteState:
    """A `BatchState` in a SQLite file.

    Args:
        path: The file. It is made, for its owner only, when something is first written.
        clock: Returns seconds since 1970.
    """

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        self._file = SqliteFile(path, _SCHEMA, _VERSION, what="files and batches")
        self._clock = clock

    async def start(self) -> None:
        await self._file.start()

    async def stop(self) -> None:
        await self._file.stop()

    # --- files

    async def add_file(self, file: FileRecord, most_bytes: int | None) -> bool:
        def add(db: sqlite3.Connection) -> bool:
            if most_bytes is not None:
                (others,) = db.execute(
                    "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ? AND id != ?",
                    (file.tenant, file.id),
                ).fetchone()
                if others + file.size > most_bytes:
                    return False
            db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    file.id,
                    file.tenant,
                    file.purpose,
                    file.size,
                    file.created_s,
                    file.expires_s,
                    dump_file(file),
                ),
            )
            return True

        return await self._write(add)

    async def file(self, file_id: str) -> FileRecord | None:
        rows = await self._read("SELECT record FROM files WHERE id = ?", file_id)
        return load_file(rows[0][0]) if rows else None

    async def files(self, tenant: str, purpose: str | None, page: Page) -> list[FileRecord]:
        also = "" if purpose is None else "AND purpose = ?"
        more = () if purpose is None else (purpose,)
        rows = await self._page("files", "record", tenant, also, more, page)
        return [load_file(row[0]) for row in rows]

    async def file_bytes(self, tenant: str) -> int:
        rows = await self._read(
            "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ?", tenant
        )
        return int(rows[0][0]) if rows else 0

    async def remove_file(self, file_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount == 1

        return await self._write(remove)

    async def expired_files(self, now_s: float) -> list[FileRecord]:
        rows = await self._read(
            "SELECT record FROM files WHERE expires_s <= ? AND id NOT IN "
            "(SELECT input FROM batches WHERE open)",
            now_s,
        )
        return [load_file(row[0]) for row in rows]

    # --- batches

    async def add_batch(self, batch: BatchRecord, most_open: int) -> bool:
        def add(db: sqlite3.Connection) -> bool:
            (count,) = db.execute(
                "SELECT count(*) FROM batches WHERE open AND tenant = ?", (batch.tenant,)
            ).fetchone()
            if count >= most_open:
                return False
            db.execute(
                "INSERT OR IGNORE INTO batches (id, tenant, input, created_s, version, status, "
                "open, sealed, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    batch.id,
                    batch.tenant,
                    batch.input_file_id,
                    batch.created_s,
                    batch.version,
                    batch.status.value,
                    not batch.ended,
                    batch.sealed,
                    dump_batch(batch),
                ),
            )
            return True

        return await self._write(add)

    async def batch(self, batch_id: str) -> BatchRecord | None:
        rows = await self._read(f"SELECT {_BATCH} FROM batches WHERE id = ?", batch_id)
        return _batch(rows[0]) if rows else None

    async def batches(self, tenant: str, page: Page) -> list[BatchRecord]:
        rows = await self._page("batches", _BATCH, tenant, "", (), page)
        return [_batch(row) for row in rows]

    async def uses(self, file_id: str) -> str | None:
        rows = await self._read("SELECT id FROM batches WHERE open AND input = ? LIMIT 1", file_id)
        return rows[0][0] if rows else None

    async def replace(self, batch: BatchRecord, plan: bytes | None = None) -> bool:
        soon_s = self._clock() + CANCELLED_LEASE_S
        most_s = soon_s if batch.status is Status.CANCELLING else math.inf

        def change(db: sqlite3.Connection) -> bool:
            changed = db.execute(
                "UPDATE batches SET version = ?, status = ?, open = ?, sealed = ?, record = ?, "
                "plan = coalesce(?, plan), leased_until_s = min(leased_until_s, ?) "
                "WHERE id = ? AND version = ?",
                (
                    batch.version,
                    batch.status.value,
                    not batch.ended,
                    batch.sealed,
                    dump_batch(batch),
                    plan,
                    most_s,
                    batch.id,
                    batch.version - 1,
                ),
            ).rowcount
            if changed and batch.ended:
                db.execute("UPDATE batches SET plan = NULL WHERE id = ?", (batch.id,))
                db.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
            return changed == 1

        return await self._write(change)

    async def plan(self, batch_id: str) -> bytes | None:
        rows = await self._read("SELECT plan FROM batches WHERE id = ?", batch_id)
        return rows[0][0] if rows else None

    async def remove_batches(self, before_s: float) -> int:
        def remove(db: sqlite3.Connection) -> int:
            old = "FROM batches WHERE NOT open AND created_s < ?"
            db.execute(f"DELETE FROM progress WHERE batch IN (SELECT id {old})", (before_s,))
            return db.execute(f"DELETE {old}", (before_s,)).rowcount

        return await self._write(remove) if await self._file.exists() else 0

    async def statistics(self) -> BatchStatistics:
        rows = await self._read(
            "SELECT status, count(*), sum(completed + failed), min(created_s) FROM batches "
            "WHERE open GROUP BY status"
        )
        return BatchStatistics(
            {status: count for status, count, *_ in rows},
            min((oldest for *_, oldest in rows), default=None),
            sum(lines for _, _, lines, _ in rows),
        )

    # --- leases

    async def lease(
        self, owner: str, lease_s: float, without: Collection[str] = ()
    ) -> BatchRecord | None:
        now_s = self._clock()
        # When leases that hold end. A clock that was set back has left later ones.
        held = math.nextafter(now_s, math.inf), now_s + MOST_LEASES * lease_s

        def take(db: sqlite3.Connection) -> BatchRecord | None:
            row = db.execute(
                f"SELECT id, {_BATCH} FROM batches WHERE open "
                "AND (owner IS NULL OR leased_until_s NOT BETWEEN ? AND ?) "
                "AND tenant NOT IN (SELECT value FROM json_each(?)) ORDER BY ("
                "  SELECT count(*) FROM batches AS o WHERE o.open AND o.tenant = batches.tenant "
                "  AND o.owner IS NOT NULL AND o.leased_until_s BETWEEN ? AND ?"
                "), created_s, id LIMIT 1",
                (*held, orjson.dumps([*without]).decode(), *held),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE batches SET owner = ?, leased_until_s = ? WHERE id = ?",
                (owner, now_s + lease_s, row[0]),
            )
            return _batch(row[1:])

        return await self._write(take) if await self._file.exists() else None

    async def renew(self, owner: str, batch_id: str, lease_s: float) -> BatchRecord | None:
        until_s = self._clock() + lease_s

        def renewed(db: sqlite3.Connection) -> BatchRecord | None:
            changed = db.execute(
                "UPDATE batches SET leased_until_s = ? WHERE id = ? AND owner = ? AND open",
                (until_s, batch_id, owner),
            ).rowcount
            if not changed:
                return None
            row = db.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (batch_id,)).fetchone()
            return _batch(row)

        return await self._write(renewed)

    async def release(self, owner: str, batch_id: str) -> None:
        def give_back(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE batches SET owner = NULL, leased_until_s = 0 WHERE id = ? AND owner = ?",
                (batch_id, owner),
            )

        await self._write(give_back)

    # --- results

    async def put_results(
        self, batch_id: str, results: Sequence[LineResult], owner: str | None = None
    ) -> set[int]:
        def put(db: sqlite3.Connection) -> set[int]:
            takes = db.execute(
                "SELECT 1 FROM batches WHERE id = ? AND open AND NOT sealed "
                "AND owner IS coalesce(?, owner)",
                (batch_id, owner),
            ).fetchone()
            added = []
            for result in results if takes else ():
                row = batch_id, result.line, result.failed, result.body, result.settlements
                if db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?)", row).rowcount:
                    added.append(result)
                    _count_model(db, batch_id, result)
            failed = sum(result.failed for result in added)
            db.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ?, "
                "prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ?, "
                "cost = cost + ?, cached_tokens = cached_tokens + ?, "
                "reasoning_tokens = reasoning_tokens + ? WHERE id = ?",
                (
                    len(added) - failed,
                    failed,
                    sum(result.prompt_tokens for result in added),
                    sum(result.completion_tokens for result in added),
                    sum(result.cost for result in added),
                    sum(result.cached_tokens for result in added),
                    sum(result.reasoning_tokens for result in added),
                    batch_id,
                ),
            )
            return {result.line for result in added}

        return await self._write(put)

    async def mark_settled(self, batch_id: str, line: int) -> None:
        def mark(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE results SET settlements = NULL WHERE batch = ? AND line = ?",
                (batch_id, line),
            )

        await self._write(mark)

    async def unsettled(self, batch_id: str) -> list[tuple[int, bytes]]:
        return await self._read(
            "SELECT line, settlements FROM results WHERE batch = ? AND settlements IS NOT NULL",
            batch_id,
        )

    async def done(self, batch_id: str) -> set[int]:
        rows = await self._read("SELECT line FROM results WHERE batch = ?", batch_id)
        return {line for (line,) in rows}

    async def results(
        self, batch_id: str, *, failed: bool, after: int, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        return await self._read(
            "SELECT line, body FROM results WHERE batch = ? AND failed = ? AND line > ? "
            "ORDER BY line LIMIT ?",
            batch_id,
            failed,
            after,
            limit,
        )

    # --- the connection

    async def _page(
        self,
        table: str,
        columns: str,
        tenant: str,
        also: str,
        more: tuple[Any, ...],
        page: Page,
    ) -> list[tuple[Any, ...]]:
        order, than = ("ASC", ">") if page.ascending else ("DESC", "<")
        start: tuple[Any, ...] = ()
        where = ""
        if page.after is not None:
            where = f"AND (created_s, id) {than} (SELECT created_s, id FROM {table} WHERE id = ?)"
            start = (page.after,)
        return await self._read(
            f"SELECT {columns} FROM {table} WHERE tenant = ? {also} {where} "
            f"ORDER BY created_s {order}, id {order} LIMIT ?",
            tenant,
            *more,
            *start,
            page.limit,
        )

    async def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return await self._file.read(query, *values)

    async def _write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        return await self._file.write(change)


def _count_model(db: sqlite3.Connection, batch_id: str, result: LineResult) -> None:
    """Count a result under its model."""
    if result.model is None:
        return
    db.execute(
        f"INSERT INTO progress (batch, model, {_OF_MODEL}) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (batch, model) DO UPDATE SET completed = completed + excluded.completed, "
        "failed = failed + excluded.failed, "
        "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
        "completion_tokens = completion_tokens + excluded.completion_tokens, "
        "cost = cost + excluded.cost",
        (
            batch_id,
            result.model,
            not result.failed,
            result.failed,
            result.prompt_tokens,
            result.completion_tokens,
            result.cost,
        ),
    )


def _batch(row: tuple[Any, ...]) -> BatchRecord:
    record, *counts, models = row
    by_model = {name: ModelCounts(*counted) for name, *counted in orjson.loads(models)}
    return load_batch(record, replace(BatchCounts(*counts), models=by_model))
