"""The state of files and batches in Redis, for several gateways.

Every change is one script, which Redis runs atomically. The contents of files are in a folder that
all gateways see. Keys, all below `{prefix}:b:`

- `files` hash: id → record; `files-expire` sorted set: id → when it expires; `files-of:TENANT`
  sorted set: id → when it was made; `file-bytes` hash: tenant → bytes
- `B:ID` hash: a batch's record, version, counts, plan and lease; `open`, `ended` and
  `batches-of:TENANT` sorted sets: id → when it was made; `open-of:TENANT` set
- `models:ID` hash: counts by model of the plan, as `COUNT MODEL` → number
- `bodies:ID` hash: line → result; `lines:ID:0` and `lines:ID:1` sorted sets: lines for the output
  and the error file; `settle:ID` hash: line → settlements that may not have been delivered
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

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
from service.errors import StoreUnavailableError
from service.store.list_page import Page
from service.store.scripted_redis import ScriptedRedis

log = logging.getLogger("coe.batches")

_FOLDER = Path(__file__).with_name("scripts")
_NAMES = (
    "add_file",
    "remove_file",
    "expired_files",
    "uses",
    "add_batch",
    "replace_batch",
    "load_batches",
    "remove_batches",
    "statistics",
    "lease",
    "renew",
    "release",
    "put_results",
)
_PURPOSE_PAGE = 500
_NOT_DURABLE = (
    "Redis may lose the last results of batches when it dies, and lines would run and be charged "
    "again: set `appendonly yes` and `appendfsync always`"
)


class RedisState:
    """A `BatchState` in Redis.

    Args:
        url: The URL of the Redis.
        prefix: The prefix of its keys.
        timeout_s: The longest wait for a reply, in s.
        clock: Returns seconds since 1970 in place of the server, in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        timeout_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._scripted = ScriptedRedis(
            url, _FOLDER, _NAMES, prefix=prefix, timeout_s=timeout_s, clock=clock
        )
        self._redis = self._scripted.redis
        self._checked = False

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self._scripted.close()

    async def _check_durability(self) -> None:
        """Warn once where Redis would lose what it has confirmed."""
        self._checked = True
        try:
            found = await self._scripted.call(
                lambda: self._redis.config_get("appendonly", "appendfsync")
            )
        except StoreUnavailableError:
            log.warning("can't see how Redis writes to its disk; check it: %s", _NOT_DURABLE)
            return
        texts = {_text(name): _text(value) for name, value in found.items()}
        if texts.get("appendonly") != "yes" or texts.get("appendfsync") != "always":
            log.warning("%s", _NOT_DURABLE)

    # --- files

    async def add_file(self, file: FileRecord, most_bytes: int | None) -> bool:
        added = await self._run(
            "add_file",
            dump_file(file),
            id=file.id,
            tenant=file.tenant,
            size=file.size,
            created=file.created_s,
            expires=file.expires_s,
            most=most_bytes,
        )
        return bool(added)

    async def file(self, file_id: str) -> FileRecord | None:
        found = await self._call(lambda: self._redis.hget(self._key("files"), file_id))
        return load_file(found) if found is not None else None

    async def files(self, tenant: str, purpose: str | None, page: Page) -> list[FileRecord]:
        found: list[FileRecord] = []
        after = page.after
        while len(found) < page.limit:
            part = Page(_PURPOSE_PAGE if purpose else page.limit, after, page.ascending)
            ids = await self._ids(f"files-of:{tenant}", part)
            if not ids:
                break
            records = await self._call(
                lambda ids=ids: self._redis.hmget(self._key("files"), ids)  # type: ignore[misc]
            )
            files = [load_file(record) for record in records if record is not None]
            found += [file for file in files if purpose is None or file.purpose == purpose]
            after = ids[-1]
        return found[: page.limit]

    async def file_bytes(self, tenant: str) -> int:
        found = await self._call(lambda: self._redis.hget(self._key("file-bytes"), tenant))
        return int(found or 0)

    async def remove_file(self, file_id: str) -> bool:
        return bool(await self._run("remove_file", id=file_id))

    async def expired_files(self, now_s: float) -> list[FileRecord]:
        return [load_file(record) for record in await self._run("expired_files", at=now_s)]

    # --- batches

    async def add_batch(self, batch: BatchRecord, most_open: int) -> bool:
        if not self._checked:
            await self._check_durability()
        added = await self._run(
            "add_batch",
            dump_batch(batch),
            id=batch.id,
            tenant=batch.tenant,
            input=batch.input_file_id,
            created=batch.created_s,
            version=batch.version,
            status=batch.status.value,
            most=most_open,
        )
        return bool(added)

    async def batch(self, batch_id: str) -> BatchRecord | None:
        (found,) = await self._run("load_batches", ids=[batch_id]) or [None]
        return _batch(found)

    async def batches(self, tenant: str, page: Page) -> list[BatchRecord]:
        ids = await self._ids(f"batches-of:{tenant}", page)
        if not ids:
            return []
        found = [_batch(entry) for entry in await self._run("load_batches", ids=ids)]
        return [batch for batch in found if batch is not None]

    async def uses(self, file_id: str) -> str | None:
        found = await self._run("uses", id=file_id)
        return _text(found) if found else None

    async def replace(self, batch: BatchRecord, plan: bytes | None = None) -> bool:
        replaced = await self._run(
            "replace_batch",
            dump_batch(batch),
            zlib.compress(plan or b"", 1),
            id=batch.id,
            version=batch.version,
            status=batch.status.value,
            sealed=batch.sealed,
            ended=batch.ended,
            planned=plan is not None,
            lease=CANCELLED_LEASE_S if batch.status is Status.CANCELLING else None,
        )
        return bool(replaced)

    async def plan(self, batch_id: str) -> bytes | None:
        found = await self._call(lambda: self._redis.hget(self._key(f"B:{batch_id}"), "plan"))
        return zlib.decompress(found) if found is not None else None

    async def remove_batches(self, before_s: float) -> int:
        return int(await self._run("remove_batches", before=before_s))

    async def statistics(self) -> BatchStatistics:
        statuses, oldest, lines = await self._run("statistics")
        return BatchStatistics(
            Counter(map(_text, statuses)), float(oldest) if oldest else None, int(lines)
        )

    # --- leases

    async def lease(
        self, owner: str, lease_s: float, without: Collection[str] = ()
    ) -> BatchRecord | None:
        return _batch(
            await self._run(
                "lease",
                owner=owner,
                lease=lease_s,
                most=MOST_LEASES * lease_s,
                without=dict.fromkeys(without, 1),
            )
        )

    async def renew(self, owner: str, batch_id: str, lease_s: float) -> BatchRecord | None:
        return _batch(await self._run("renew", id=batch_id, owner=owner, lease=lease_s))

    async def release(self, owner: str, batch_id: str) -> None:
        await self._run("release", id=batch_id, owner=owner)

    # --- results

    async def put_results(
        self, batch_id: str, results: Sequence[LineResult], owner: str | None = None
    ) -> set[int]:
        values: list[bytes] = []
        for result in results:
            values += [zlib.compress(result.body, 1), result.settlements or b""]
        added = await self._run(
            "put_results",
            *values,
            id=batch_id,
            owner=owner,
            results=[
                {
                    "line": result.line,
                    "failed": result.failed,
                    "prompt_tokens": result.prompt_tokens,
                    "completion_tokens": result.completion_tokens,
                    "cached_tokens": result.cached_tokens,
                    "reasoning_tokens": result.reasoning_tokens,
                    "cost": result.cost,
                    "settles": result.settlements is not None,
                    # In Lua's JSON a null counts as true.
                    "model": result.model or "",
                }
                for result in results
            ],
        )
        return set(map(int, added))

    async def mark_settled(self, batch_id: str, line: int) -> None:
        await self._call(lambda: self._redis.hdel(self._key(f"settle:{batch_id}"), str(line)))

    async def unsettled(self, batch_id: str) -> list[tuple[int, bytes]]:
        found = await self._call(lambda: self._redis.hgetall(self._key(f"settle:{batch_id}")))
        return sorted((int(line), stored) for line, stored in found.items())

    async def done(self, batch_id: str) -> set[int]:
        found = await self._call(lambda: self._redis.hkeys(self._key(f"bodies:{batch_id}")))
        return set(map(int, found))

    async def results(
        self, batch_id: str, *, failed: bool, after: int, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        lines = await self._call(
            lambda: self._redis.zrangebyscore(
                self._key(f"lines:{batch_id}:{int(failed)}"), f"({after}", "+inf", 0, limit
            )
        )
        if not lines:
            return []
        bodies = await self._call(lambda: self._redis.hmget(self._key(f"bodies:{batch_id}"), lines))
        return [
            (int(line), zlib.decompress(body))
            for line, body in zip(lines, bodies, strict=True)
            if body is not None
        ]

    # --- the connection

    async def _ids(self, name: str, page: Page) -> list[str]:
        """A part of a sorted set's members, by score and name."""
        key = self._key(name)
        rank = self._redis.zrank if page.ascending else self._redis.zrevrank
        start = 0
        if page.after is not None:
            at = await self._call(lambda: rank(key, str(page.after)))
            if at is None:
                return []
            start = int(at) + 1
        found = await self._call(
            lambda: self._redis.zrange(key, start, start + page.limit - 1, desc=not page.ascending)
        )
        return [_text(member) for member in found]

    async def _call(self, command: Callable[[], Any]) -> Any:
        return await self._scripted.call(command)

    async def _run(self, script: str, *values: bytes, **arguments: Any) -> Any:
        return await self._scripted.run(script, *values, **arguments)

    def _key(self, name: str) -> str:
        return f"{self._scripted.prefix}:b:{name}"


def _batch(found: list[Any] | None) -> BatchRecord | None:
    if not found:
        return None
    record, completed, failed, prompt, completion, cost, cached, reasoning, models = found
    counts = BatchCounts(
        int(completed),
        int(failed),
        int(prompt),
        int(completion),
        float(cost),
        int(cached),
        int(reasoning),
        _by_model(models),
    )
    return load_batch(record, counts)


def _by_model(flat: list[bytes]) -> dict[str, ModelCounts]:
    """Read the counts of a batch's models from the fields and values of their hash."""
    counted: dict[str, dict[str, bytes]] = {}
    for field, value in zip(flat[::2], flat[1::2], strict=True):
        name, _, model = _text(field).partition(" ")
        counted.setdefault(model, {})[name] = value
    return {
        model: ModelCounts(
            int(found.get("completed", 0)),
            int(found.get("failed", 0)),
            int(found.get("prompt_tokens", 0)),
            int(found.get("completion_tokens", 0)),
            float(found.get("cost", 0)),
        )
        for model, found in counted.items()
    }


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
