"""The contract of the state of batches, tested with SQLite and Redis."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio

from service.batches.batch_progress import ModelCounts, PlannedShare
from service.batches.batch_records import (
    BatchCounts,
    BatchRecord,
    FileRecord,
    InputError,
    LineResult,
    Status,
)
from service.batches.batch_state import CANCELLED_LEASE_S, BatchState
from service.batches.batch_types import BatchTerms
from service.batches.redis_state import RedisState
from service.batches.sqlite_state import SqliteState
from service.errors import StoreUnavailableError
from service.store.list_page import Page
from tests.support.redis_server import RedisServer, redis_server

_ids = count()


@dataclass
class Clock:
    """Seconds since 1970, moved by hand."""

    now_s: float = 1_700_000_000.5

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Tried:
    """A state, with its clock."""

    state: BatchState
    clock: Clock


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture(params=["sqlite", "redis"])
async def tried(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tried]:
    clock = Clock()
    state: BatchState
    if request.param == "sqlite":
        state = SqliteState(tmp_path / "state.sqlite3", clock)
    else:
        server: RedisServer = request.getfixturevalue("server")
        # Nothing of one test is seen by the next.
        state = RedisState(server.url, prefix=f"t{next(_ids)}", timeout_s=5, clock=clock)
    await state.start()
    yield Tried(state, clock)
    await state.stop()


def file(number: int, tenant: str = "acme", **more: object) -> FileRecord:
    made = FileRecord(
        f"file-{number:024x}", tenant, "batch", "in.jsonl", 100, 1_700_000_000, 1_700_001_000
    )
    return replace(made, **more)  # type: ignore[arg-type]


def batch(number: int, tenant: str = "acme", created_s: int = 1_700_000_000) -> BatchRecord:
    return BatchRecord(
        f"batch_{number}",
        tenant,
        "key",
        "/v1/embeddings",
        f"file-{number:024x}",
        {"a": "b"},
        BatchTerms(5.0, 60.0, 0.9),
        created_s,
        created_s + 60,
    )


def running(made: BatchRecord, now_s: float = 1_700_000_001) -> BatchRecord:
    return made.enter(
        Status.IN_PROGRESS,
        now_s,
        total=3,
        planned=(0.5, 1.0, 2.0),
        shares={"math": PlannedShare(2, 80.0), "a recipe": PlannedShare(1, 10.5)},
    )


async def test_state_before_the_first_write_is_empty(tried: Tried) -> None:
    state = tried.state
    assert await state.file("file-1") is None
    assert await state.files("acme", None, Page(10)) == []
    assert await state.file_bytes("acme") == 0
    assert await state.batch("batch_1") is None
    assert await state.batches("acme", Page(10)) == []
    assert await state.lease("me", 10) is None
    assert (await state.statistics()).by_status == {}
    assert (await state.statistics()).oldest_s is None
    assert await state.remove_batches(2e9) == 0
    assert await state.expired_files(2e9) == []


async def test_files_are_kept_listed_and_removed(tried: Tried) -> None:
    state = tried.state
    files = [file(i, created_s=1_700_000_000 + i // 2) for i in range(5)]
    for each in files:
        assert await state.add_file(each, 500)
    assert await state.add_file(file(9, "other"), 100)
    assert await state.file(files[2].id) == files[2]
    newest = [*reversed(files)]
    assert await state.files("acme", None, Page(10)) == newest
    assert await state.files("acme", None, Page(2)) == newest[:2]
    assert await state.files("acme", None, Page(2, newest[1].id)) == newest[2:4]
    assert await state.files("acme", None, Page(9, files[1].id, ascending=True)) == files[2:]
    assert await state.files("acme", "batch_output", Page(10)) == []
    assert await state.files("acme", "batch", Page(1, newest[3].id)) == newest[4:]
    assert await state.file_bytes("acme") == 500
    # The same file again takes no further room; a larger one does.
    assert await state.add_file(files[0], 500)
    assert not await state.add_file(replace(files[0], size=101), 500)
    assert not await state.add_file(file(10, size=1), 500)
    assert await state.add_file(file(10, size=1), None)
    assert await state.remove_file(files[0].id)
    assert not await state.remove_file(files[0].id)
    assert await state.file(files[0].id) is None
    assert await state.file_bytes("acme") == 401


async def test_expired_files_leave_out_those_that_a_batch_reads(tried: Tried) -> None:
    state = tried.state
    for number in (1, 2, 3):
        await state.add_file(file(number, expires_s=1_700_000_000 + number), None)
    await state.add_batch(batch(1), 10)
    assert await state.uses(file(1).id) == "batch_1"
    assert await state.uses(file(2).id) is None
    found = await state.expired_files(1_700_000_002)
    assert [each.id for each in found] == [file(2).id]


async def test_batch_is_stored_as_it_is(tried: Tried) -> None:
    state, made = tried.state, batch(1)
    assert await state.add_batch(made, 2)
    assert await state.add_batch(batch(2), 2)
    assert not await state.add_batch(batch(3), 2)
    assert await state.add_batch(batch(4, "other"), 2)
    assert await state.batch("batch_1") == made
    assert await state.batches("acme", Page(5)) == [batch(2), made]
    assert await state.batches("acme", Page(5, "batch_2")) == [made]
    statistics = await state.statistics()
    assert dict(statistics.by_status) == {"validating": 3}
    assert statistics.oldest_s == 1_700_000_000
    failed = made.enter(Status.FAILED, 1.0, errors=(InputError("empty_file", "no lines", 1),))
    assert await state.replace(failed)
    assert await state.batch("batch_1") == failed
    assert await state.add_batch(batch(3), 2)
    assert await state.remove_batches(1_700_000_000) == 0
    assert await state.remove_batches(1_700_000_001) == 1
    assert await state.batch("batch_1") is None
    assert [each.id for each in await state.batches("acme", Page(5))] == ["batch_3", "batch_2"]


async def test_replace_of_a_changed_batch_writes_nothing(tried: Tried) -> None:
    state, made = tried.state, batch(1)
    await state.add_batch(made, 2)
    mine, theirs = running(made), made.enter(Status.CANCELLING, 5.0)
    assert await state.replace(mine, b"a plan")
    assert not await state.replace(theirs, b"another")
    assert not await state.replace(mine)
    assert not await state.replace(replace(batch(7), version=1))
    assert await state.batch("batch_1") == mine
    assert await state.plan("batch_1") == b"a plan"
    # A change without a plan keeps it.
    assert await state.replace(mine.enter(Status.CANCELLING, 6.0))
    assert await state.plan("batch_1") == b"a plan"


async def test_first_result_of_a_line_counts_until_the_batch_is_sealed(tried: Tried) -> None:
    state, made = tried.state, running(batch(1))
    await state.add_batch(batch(1), 2)
    await state.replace(made, b"p")
    first = LineResult(2, False, b'{"a":1}', b"[1]", 3, 4, 0.25, 2, 1)
    assert await state.put_results("batch_1", [first, LineResult(0, True, b"{}")]) == {0, 2}
    assert await state.put_results("batch_1", [replace(first, body=b"x")]) == set()
    more = [replace(first, line=1, settlements=None), first]
    assert await state.put_results("batch_1", more) == {1}
    assert await state.put_results("batch_9", [first]) == set()
    assert await state.done("batch_1") == {0, 1, 2}
    found = await state.batch("batch_1")
    assert found is not None
    assert found.counts == BatchCounts(2, 1, 6, 8, 0.5, 4, 2)
    assert await state.unsettled("batch_1") == [(2, b"[1]")]
    await state.mark_settled("batch_1", 2)
    await state.mark_settled("batch_1", 2)
    assert await state.unsettled("batch_1") == []
    all_good = [(1, b'{"a":1}'), (2, b'{"a":1}')]
    assert [*await state.results("batch_1", failed=False, after=-1, limit=9)] == all_good
    assert [*await state.results("batch_1", failed=False, after=1, limit=9)] == all_good[1:]
    assert [*await state.results("batch_1", failed=False, after=-1, limit=1)] == all_good[:1]
    assert [*await state.results("batch_1", failed=True, after=-1, limit=9)] == [(0, b"{}")]
    sealed = found.enter(Status.FINALIZING, 7.0, sealed=True)
    assert await state.replace(sealed)
    assert await state.put_results("batch_1", [replace(first, line=3)]) == set()
    assert await state.replace(sealed.enter(Status.COMPLETED, 8.0, output_file_id="file-1"))
    assert await state.done("batch_1") == set()
    assert await state.plan("batch_1") is None
    ended = await state.batch("batch_1")
    assert ended is not None
    assert ended.counts == found.counts


async def test_results_are_counted_by_model_once(tried: Tried) -> None:
    state = tried.state
    for number in (1, 2):
        await state.add_batch(batch(number), 2)
        await state.replace(running(batch(number)), b"p")
    first = LineResult(0, False, b"{}", None, 3, 4, 0.25, model="math")
    recipe = replace(first, line=1, model="a recipe", cost=1.5)
    assert await state.put_results("batch_1", [first, recipe]) == {0, 1}
    # The first result of a line counts, under its model alone.
    assert await state.put_results("batch_1", [replace(first, model="a recipe")]) == set()
    assert await state.put_results("batch_1", [LineResult(2, True, b"{}", model="math")]) == {2}
    assert await state.put_results("batch_2", [replace(first, model=None)]) == {0}
    expected = {"math": ModelCounts(1, 1, 3, 4, 0.25), "a recipe": ModelCounts(1, 0, 3, 4, 1.5)}
    assert (await state.statistics()).lines == 4
    found = await state.batch("batch_1")
    assert found is not None
    assert found.counts.models == expected
    assert found.shares == running(batch(1)).shares
    by_id = {one.id: one.counts.models for one in await state.batches("acme", Page(5))}
    assert by_id == {"batch_1": expected, "batch_2": {}}
    leased = await state.lease("me", 10)
    assert leased is not None
    assert leased.counts.models == expected
    renewed = await state.renew("me", "batch_1", 10)
    assert renewed == leased
    # They stay when the results are gone, as long as the batch does.
    ended = found.enter(Status.FINALIZING, 7.0, sealed=True)
    assert await state.replace(ended)
    assert await state.replace(ended.enter(Status.COMPLETED, 8.0))
    kept = await state.batch("batch_1")
    assert kept is not None
    assert kept.counts.models == expected
    assert (await state.statistics()).lines == 1
    assert await state.remove_batches(2e9) == 1
    await state.add_batch(batch(1), 9)
    anew = await state.batch("batch_1")
    assert anew is not None
    assert anew.counts.models == {}


async def test_lease_leaves_tenants_out(tried: Tried) -> None:
    state = tried.state
    for number, tenant in enumerate(("a", "a", "b", 'it\'s "c"')):
        await state.add_batch(batch(number, tenant), 9)
    leased = [
        found and found.tenant
        for without in (["a", "b"], ["a", "b", 'it\'s "c"'], {"a"}, {"a"}, (), (), ())
        for found in [await state.lease("me", 10, without)]
    ]
    assert leased == ['it\'s "c"', None, "b", None, "a", "a", None]


async def test_lease_is_one_owner_s_until_it_ends(tried: Tried) -> None:
    state = tried.state
    await state.add_batch(batch(1), 9)
    await state.add_batch(batch(2, created_s=1_700_000_005), 9)
    await state.add_batch(batch(3, "other", created_s=1_700_000_009), 9)

    async def lease(owner: str) -> str | None:
        found = await state.lease(owner, 10)
        return None if found is None else found.id

    assert await lease("a") == "batch_1"
    # The other tenant comes before the second batch of the first one.
    assert await lease("b") == "batch_3"
    assert await lease("b") == "batch_2"
    assert await lease("c") is None
    assert await state.renew("c", "batch_1", 10) is None
    tried.clock.now_s += 6
    assert await state.renew("a", "batch_1", 10) == batch(1)
    tried.clock.now_s += 6
    # The leases of b have ended.
    assert await lease("c") == "batch_3"
    await state.release("b", "batch_3")
    assert await state.renew("b", "batch_3", 10) is None
    await state.release("c", "batch_3")
    assert await lease("d") == "batch_3"
    assert await state.replace(batch(1).enter(Status.FAILED, 1.0))
    assert await state.renew("a", "batch_1", 10) is None


async def test_results_of_who_has_lost_the_lease_are_refused_where_the_owner_matters(
    tried: Tried,
) -> None:
    state = tried.state
    await state.add_batch(batch(1), 9)

    async def put(line: int, owner: str | None) -> set[int]:
        return await state.put_results("batch_1", [LineResult(line, False, b"{}", cost=1.0)], owner)

    assert await put(0, "a") == set()
    assert await state.lease("a", 10) is not None
    assert await put(0, "a") == {0}
    tried.clock.now_s += 11
    # Nobody else has it yet.
    assert await put(1, "a") == {1}
    leased = await state.lease("b", 10)
    assert leased is not None
    assert leased.counts.cost == 2.0
    assert await put(2, "a") == set()
    assert await put(2, "b") == {2}
    assert await put(3, None) == {3}
    await state.release("b", "batch_1")
    assert await put(4, "b") == set()


@pytest.mark.parametrize("jump_s", [-1e6, -3600.0, -1.0, 0.0, 9.0, 11.0, 1e6])
async def test_lease_of_a_gateway_that_died_ends_soon_whatever_the_clock_does(
    tried: Tried, jump_s: float
) -> None:
    state = tried.state
    await state.add_batch(batch(1), 9)
    assert await state.lease("a", 10) is not None
    tried.clock.now_s += jump_s
    found = await state.lease("b", 10)
    # A lease from before a jump back may hold for a few of its times, and no longer.
    assert (found is None) == (-30 <= jump_s < 10)
    tried.clock.now_s += 40
    assert await state.lease("c", 10) is not None


async def test_lease_of_a_cancelled_batch_ends_soon_unless_it_is_renewed(tried: Tried) -> None:
    state = tried.state
    for number, renews in ((1, False), (2, True)):
        await state.add_batch(batch(number), 9)
        assert await state.lease("a", 15) is not None
        cancelled = batch(number).enter(Status.CANCELLING, 1.0)
        assert await state.replace(cancelled)
        tried.clock.now_s += CANCELLED_LEASE_S - 0.1
        assert await state.lease("b", 10) is None
        if renews:
            assert await state.renew("a", cancelled.id, 15) == cancelled
        tried.clock.now_s += 0.2
        found = await state.lease("b", 10)
        assert found == (None if renews else cancelled)
        if found is not None:
            # A change of a batch that was cancelled keeps the lease of who ends it.
            sealed = cancelled.changed(sealed=True)
            assert await state.replace(sealed)
            assert await state.renew("b", sealed.id, 10) == sealed
            assert await state.replace(sealed.enter(Status.CANCELLED, 2.0))


async def test_cancelled_batch_that_nobody_has_can_be_leased(tried: Tried) -> None:
    state, cancelled = tried.state, batch(1).enter(Status.CANCELLING, 1.0)
    await state.add_batch(batch(1), 9)
    assert await state.replace(cancelled)
    assert await state.lease("a", 10) == cancelled


async def test_sqlite_state_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    state = SqliteState(path)
    await state.add_file(file(1), None)
    await state.stop()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    newer = SqliteState(path)
    with pytest.raises(StoreUnavailableError, match="newer version"):
        await newer.start()
    await newer.stop()


async def test_sqlite_state_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    state = SqliteState(path)
    await state.add_batch(batch(1), 9)
    await state.stop()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE progress")
        db.execute("ALTER TABLE batches DROP COLUMN cached_tokens")
        db.execute("ALTER TABLE batches DROP COLUMN reasoning_tokens")
        db.execute("PRAGMA user_version=1")
        record = json.loads(db.execute("SELECT record FROM batches").fetchone()[0])
        del record["shares"]
        db.execute("UPDATE batches SET record = ?", (json.dumps(record).encode(),))
    db.close()
    newer = SqliteState(path)
    await newer.start()
    assert await newer.batch("batch_1") == batch(1)
    assert await newer.put_results("batch_1", [LineResult(0, False, b"{}", model="m")]) == {0}
    found = await newer.batch("batch_1")
    assert found is not None
    assert found.counts.models == {"m": ModelCounts(1)}
    await newer.stop()


async def test_redis_state_warns_where_redis_may_lose_results(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    for fsync, warned in (("everysec", True), ("always", False)):
        caplog.clear()
        state = RedisState(server.url, prefix=f"t{next(_ids)}", timeout_s=5)
        await state._redis.config_set("appendfsync", fsync)
        await state.add_batch(batch(1), 1)
        await state.stop()
        assert ("appendfsync always" in caplog.text) == warned
