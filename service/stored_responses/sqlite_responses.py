"""Stored responses and conversations in an embedded SQLite file, for the gateways of one machine.

Deleted content is overwritten in the file, and cut from its log.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from service.store.list_page import Page
from service.store.sqlite_file import SqliteFile
from service.stored_responses.response_state import Chain, StoredAmount
from service.stored_responses.stored_records import (
    Added,
    Quota,
    StoredConversation,
    StoredItem,
    StoredResponse,
    renewed,
)

Clock = Callable[[], float]

# `entries` counts a container's responses, and at least one; `newest` is its last item's number.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS containers (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_s INTEGER NOT NULL, used_s REAL NOT NULL,
    bytes INTEGER NOT NULL, entries INTEGER NOT NULL, newest INTEGER NOT NULL, metadata BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS containers_of_tenant ON containers (tenant, used_s, bytes, entries);
CREATE INDEX IF NOT EXISTS containers_by_use ON containers (used_s);
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, container TEXT NOT NULL, tenant TEXT NOT NULL, created_s INTEGER NOT NULL,
    previous TEXT, seen INTEGER NOT NULL, first INTEGER NOT NULL, inputs INTEGER NOT NULL,
    outputs INTEGER NOT NULL, head BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_of_container ON responses (container);
CREATE TABLE IF NOT EXISTS items (
    container TEXT NOT NULL, number INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    UNIQUE (container, number)
);
CREATE INDEX IF NOT EXISTS items_by_id ON items (container, id);
"""
_VERSION = 1
_RESPONSE = (
    "SELECT r.id, r.tenant, r.created_s, r.head, r.previous, r.seen, r.container, r.first, "
    "r.inputs, r.outputs, c.used_s FROM responses AS r JOIN containers AS c ON c.id = r.container "
)
_ITEMS = "SELECT id, body FROM items WHERE container = ? "
_SWEPT = 500


class SqliteResponses:
    """A `ResponseState` in a SQLite file.

    Args:
        path: The file. It is made, for its owner only, when something is first written.
        clock: Returns seconds since 1970.
    """

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        self._file = SqliteFile(path, _SCHEMA, _VERSION, what="stored responses", erases=True)
        self._clock = clock

    async def start(self) -> None:
        await self._file.start()

    async def stop(self) -> None:
        await self._file.stop()

    # --- responses

    async def add_response(self, response: StoredResponse, quota: Quota) -> Added:
        now_s = self._clock()

        def add(db: sqlite3.Connection) -> Added:
            if response.conversation is None:
                _insert_container(db, response.id, response.tenant, response.created_s, now_s)
            elif not _is_there(db, response.conversation, response.tenant):
                return Added(False)
            first, _ = _append(db, response.container, response.items, now_s)
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    response.id,
                    response.container,
                    response.tenant,
                    response.created_s,
                    response.previous,
                    response.seen,
                    first,
                    len(response.input),
                    len(response.output),
                    response.head,
                ),
            )
            _count(db, response.container, len(response.head))
            _use_chain(db, response.previous, now_s)
            return _make_room(db, response.tenant, response.container, quota)

        return await self._add(add)

    async def response(self, response_id: str) -> StoredResponse | None:
        def read(db: sqlite3.Connection) -> StoredResponse | None:
            row = db.execute(f"{_RESPONSE} WHERE r.id = ?", (response_id,)).fetchone()
            return _response(db, row) if row else None

        return await self._file.look(read)

    async def chain(
        self, tenant: str, response_id: str, most_responses: int, most_bytes: int
    ) -> Chain:
        def read(db: sqlite3.Connection) -> Chain:
            found: list[StoredResponse] = []
            size, at = 0, response_id
            while True:
                row = db.execute(
                    f"{_RESPONSE} WHERE r.id = ? AND r.tenant = ?", (at, tenant)
                ).fetchone()
                if row is None:
                    return Chain(found[::-1], broken=at)
                found.append(response := _response(db, row))
                size += response.size
                if size > most_bytes or len(found) > most_responses:
                    return Chain(found[::-1], cut=True)
                if response.previous is None:
                    return Chain(found[::-1])
                at = response.previous

        return await self._file.look(read) or Chain((), broken=response_id)

    async def remove_response(self, response_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            row = db.execute(
                "SELECT container, first, inputs + outputs, length(head) FROM responses "
                "WHERE id = ?",
                (response_id,),
            ).fetchone()
            if row is None:
                return False
            container, first, count, head_size = row
            if container == response_id:
                _remove_container(db, container)
                return True
            _remove_items(db, container, "number >= ? AND number < ?", first, first + count)
            db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            db.execute(
                "UPDATE containers SET bytes = bytes - ?, entries = max(1, entries - 1) "
                "WHERE id = ?",
                (head_size, container),
            )
            return True

        return bool(await self._remove(remove))

    # --- conversations

    async def add_conversation(
        self, conversation: StoredConversation, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        now_s = self._clock()

        def add(db: sqlite3.Connection) -> Added:
            _insert_container(
                db, conversation.id, conversation.tenant, conversation.created_s, now_s
            )
            _put_metadata(db, conversation)
            _append(db, conversation.id, items, now_s)
            return _make_room(db, conversation.tenant, conversation.id, quota)

        return await self._add(add)

    async def conversation(self, conversation_id: str) -> StoredConversation | None:
        rows = await self._file.read(
            "SELECT id, tenant, created_s, metadata, used_s, newest FROM containers "
            "WHERE id = ? AND metadata IS NOT NULL",
            conversation_id,
        )
        if not rows:
            return None
        found, tenant, created_s, metadata, used_s, newest = rows[0]
        return StoredConversation(found, tenant, created_s, orjson.loads(metadata), used_s, newest)

    async def replace_metadata(self, conversation: StoredConversation) -> bool:
        def change(db: sqlite3.Connection) -> bool:
            return _put_metadata(db, conversation)

        return bool(await self._remove(change))

    async def remove_conversation(self, conversation_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            return _remove_container(db, conversation_id) > 0

        return bool(await self._remove(remove))

    async def add_items(
        self, conversation_id: str, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        now_s = self._clock()

        def add(db: sqlite3.Connection) -> Added:
            row = db.execute(
                "SELECT tenant FROM containers WHERE id = ?", (conversation_id,)
            ).fetchone()
            if row is None:
                return Added(False)
            _, ids = _append(db, conversation_id, items, now_s)
            return replace(_make_room(db, row[0], conversation_id, quota), ids=ids)

        return await self._add(add)

    async def items(self, container: str, page: Page) -> list[StoredItem]:
        order, than = ("ASC", ">") if page.ascending else ("DESC", "<")
        where = ""
        start: tuple[str, ...] = ()
        if page.after is not None:
            where = (
                f"AND number {than} (SELECT max(number) FROM items WHERE container = ? AND id = ?)"
            )
            start = (container, page.after)
        rows = await self._file.read(
            f"{_ITEMS} {where} ORDER BY number {order} LIMIT ?", container, *start, page.limit
        )
        return [StoredItem(*row) for row in rows]

    async def items_until(self, container: str, number: int, most_bytes: int) -> list[StoredItem]:
        def read(db: sqlite3.Connection) -> list[StoredItem]:
            found, size = [], 0
            query = f"{_ITEMS} AND number <= ? ORDER BY number"
            for row in db.execute(query, (container, number)):
                found.append(item := StoredItem(*row))
                size += len(item.body)
                if size > most_bytes:
                    break
            return found

        return await self._file.look(read) or []

    async def item(self, container: str, item_id: str) -> StoredItem | None:
        rows = await self._file.read(
            f"{_ITEMS} AND id = ? ORDER BY number DESC LIMIT 1", container, item_id
        )
        return StoredItem(*rows[0]) if rows else None

    async def remove_item(self, container: str, item_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            return _remove_items(db, container, "id = ?", item_id) > 0

        return bool(await self._remove(remove))

    # --- retention

    async def remove_unused(self, before_s: float) -> int:
        def remove(db: sqlite3.Connection) -> int:
            rows = db.execute(
                "SELECT id FROM containers WHERE used_s < ? ORDER BY used_s LIMIT ?",
                (before_s, _SWEPT),
            ).fetchall()
            return sum(_remove_container(db, container) for (container,) in rows)

        return await self._remove(remove)

    async def amount(self) -> StoredAmount:
        rows = await self._file.read(
            "SELECT coalesce(sum(entries), 0), coalesce(sum(bytes), 0) FROM containers"
        )
        return StoredAmount(*rows[0]) if rows else StoredAmount()

    async def _add(self, add: Callable[[sqlite3.Connection], Added]) -> Added:
        try:
            return await self._file.write(add, removed=lambda added: added.evicted > 0)
        except _TooLargeError:
            return Added(False)

    async def _remove(self, remove: Callable[[sqlite3.Connection], int]) -> int:
        """Run a change that removes content; return how much it removed."""
        if not await self._file.exists():
            return 0
        return await self._file.write(remove, removed=lambda count: count > 0)


class _TooLargeError(Exception):
    """One entry has more bytes than the tenant may keep; it rolls the transaction back."""


def _insert_container(
    db: sqlite3.Connection, container: str, tenant: str, created_s: int, now_s: float
) -> None:
    db.execute(
        "INSERT INTO containers VALUES (?, ?, ?, ?, 0, 0, 0, NULL)",
        (container, tenant, created_s, now_s),
    )


def _is_there(db: sqlite3.Connection, container: str, tenant: str) -> bool:
    query = "SELECT 1 FROM containers WHERE id = ? AND tenant = ?"
    return db.execute(query, (container, tenant)).fetchone() is not None


def _append(
    db: sqlite3.Connection, container: str, items: Sequence[StoredItem], now_s: float
) -> tuple[int, tuple[str, ...]]:
    """Add items to a container; return the first one's number, and their ids."""
    (newest,) = db.execute("SELECT newest FROM containers WHERE id = ?", (container,)).fetchone()
    query = "SELECT 1 FROM items WHERE container = ? AND id = ?"
    taken: set[str] = set()
    kept = []
    for item in items:
        if item.id in taken or (newest and db.execute(query, (container, item.id)).fetchone()):
            item = renewed(item)
        taken.add(item.id)
        kept.append(item)
    db.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?)",
        [
            (container, number, item.id, item.body)
            for number, item in enumerate(kept, start=newest + 1)
        ],
    )
    db.execute(
        "UPDATE containers SET newest = ?, bytes = bytes + ?, used_s = ?, entries = max(1, entries)"
        " WHERE id = ?",
        (newest + len(kept), sum(item.size for item in kept), now_s, container),
    )
    return int(newest) + 1, tuple(item.id for item in kept)


def _count(db: sqlite3.Connection, container: str, head_size: int) -> None:
    """Count a response in its container: the first one takes the container's own place."""
    db.execute(
        "UPDATE containers SET bytes = bytes + ?, entries = max(1, (SELECT count(*) FROM responses "
        "WHERE container = ?)) WHERE id = ?",
        (head_size, container, container),
    )


def _put_metadata(db: sqlite3.Connection, conversation: StoredConversation) -> bool:
    metadata = orjson.dumps(dict(conversation.metadata))
    changed = db.execute(
        "UPDATE containers SET bytes = bytes + ? - coalesce(length(metadata), 0), metadata = ? "
        "WHERE id = ?",
        (len(metadata), metadata, conversation.id),
    )
    return changed.rowcount == 1


def _use_chain(db: sqlite3.Connection, previous: str | None, now_s: float) -> None:
    """Count the responses before a new one as used now, so that they are kept as long as it is.

    Of these the oldest makes room first.
    """
    if previous is None:
        return
    # Ids are new, so that there is no loop. The depth is bounded even so.
    db.execute(
        "WITH RECURSIVE chain(id, depth) AS (SELECT ?, 1 UNION ALL SELECT r.previous, depth + 1 "
        "FROM responses AS r JOIN chain ON r.id = chain.id "
        "WHERE r.previous IS NOT NULL AND depth < 100000) "
        "UPDATE containers SET used_s = ? - chain.depth * 1e-5 "
        "FROM responses AS r JOIN chain ON r.id = chain.id WHERE containers.id = r.container",
        (previous, now_s),
    )


def _make_room(db: sqlite3.Connection, tenant: str, kept: str, quota: Quota) -> Added:
    """Remove a tenant's containers that were not used for longest, but for one, until all fits."""
    evicted = 0
    entries, size = db.execute(
        "SELECT sum(entries), sum(bytes) FROM containers WHERE tenant = ?", (tenant,)
    ).fetchone()
    while entries > quota.most_entries or size > quota.most_bytes:
        row = db.execute(
            "SELECT id, entries, bytes FROM containers WHERE tenant = ? AND id != ? "
            "ORDER BY used_s, created_s, id LIMIT 1",
            (tenant, kept),
        ).fetchone()
        if row is None:
            raise _TooLargeError
        _remove_container(db, row[0])
        entries, size, evicted = entries - row[1], size - row[2], evicted + row[1]
    return Added(True, evicted)


def _remove_container(db: sqlite3.Connection, container: str) -> int:
    """Remove a container with all that is in it; return how many entries it counted as."""
    row = db.execute("SELECT entries FROM containers WHERE id = ?", (container,)).fetchone()
    if row is None:
        return 0
    db.execute("DELETE FROM items WHERE container = ?", (container,))
    db.execute("DELETE FROM responses WHERE container = ?", (container,))
    db.execute("DELETE FROM containers WHERE id = ?", (container,))
    return int(row[0])


def _remove_items(db: sqlite3.Connection, container: str, where: str, *values: object) -> int:
    """Remove items of a container; return how many."""
    (size, count) = db.execute(
        "SELECT coalesce(sum(length(id) + length(body)), 0), count(*) FROM items "
        f"WHERE container = ? AND {where}",
        (container, *values),
    ).fetchone()
    db.execute(f"DELETE FROM items WHERE container = ? AND {where}", (container, *values))
    db.execute("UPDATE containers SET bytes = bytes - ? WHERE id = ?", (size, container))
    return int(count)


def _response(db: sqlite3.Connection, row: tuple[Any, ...]) -> StoredResponse:
    found, tenant, created_s, head, previous, seen, container, first, inputs, outputs, used_s = row
    query = f"{_ITEMS} AND number >= ? AND number < ? ORDER BY number"
    start = first + inputs
    return StoredResponse(
        found,
        tenant,
        created_s,
        head,
        tuple(StoredItem(*item) for item in db.execute(query, (container, first, start))),
        tuple(StoredItem(*item) for item in db.execute(query, (container, start, start + outputs))),
        previous,
        None if container == found else container,
        seen,
        used_s,
    )
