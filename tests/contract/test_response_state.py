"""The contract of the state of stored responses, tested with SQLite and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio

from service.errors import StorageFullError
from service.store.list_page import Page
from service.stored_responses.redis_responses import RedisResponses
from service.stored_responses.response_state import ResponseState, StoredAmount
from service.stored_responses.sqlite_responses import SqliteResponses
from service.stored_responses.stored_records import (
    Added,
    Quota,
    StoredConversation,
    StoredItem,
    StoredResponse,
)
from tests.support.redis_server import RedisServer, redis_server

_ids = count()
MANY = Quota(1000, 10**6)


@dataclass
class Clock:
    """Seconds since 1970, moved by hand."""

    now_s: float = 1_700_000_000.5

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Tried:
    """A state, with its clock."""

    state: ResponseState
    clock: Clock

    async def add(self, response: StoredResponse, quota: Quota = MANY) -> Added:
        """Add a response a second after the one before."""
        self.clock.now_s += 1
        return await self.state.add_response(response, quota)

    async def kept(self, *numbers: int) -> list[int]:
        """The numbers of those responses that are there."""
        return [n for n in numbers if await self.state.response(f"resp_{n}") is not None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture(params=["sqlite", "redis"])
async def tried(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tried]:
    clock = Clock()
    state: ResponseState
    if request.param == "sqlite":
        state = SqliteResponses(tmp_path / "responses.sqlite3", clock)
    else:
        server: RedisServer = request.getfixturevalue("server")
        # Nothing of one test is seen by the next.
        state = RedisResponses(server.url, prefix=f"t{next(_ids)}", timeout_s=5, clock=clock)
    await state.start()
    yield Tried(state, clock)
    await state.stop()


def item(name: str, text: str = "") -> StoredItem:
    # Bodies are any bytes of JSON, with spaces and characters of several bytes.
    return StoredItem(name, f'{{"text": "{text or name} ü"}}'.encode())


def response(
    number: int,
    *,
    previous: int | None = None,
    conversation: str | None = None,
    tenant: str = "acme",
    text: str = "",
    seen: int = 0,
) -> StoredResponse:
    return StoredResponse(
        f"resp_{number}",
        tenant,
        1_700_000_000 + number,
        b'{"status": "completed"}',
        (item(f"msg_{number}", text), item(f"fco_{number}")),
        (item(f"out_{number}"),),
        None if previous is None else f"resp_{previous}",
        conversation,
        seen,
    )


async def names(state: ResponseState, container: str, page: Page | None = None) -> list[str]:
    return [found.id for found in await state.items(container, page or Page(100, ascending=True))]


async def begin(tried: Tried, name: str = "conv_a", tenant: str = "acme") -> None:
    conversation = StoredConversation(name, tenant, 1_700_000_000, {"topic": "x"})
    added = await tried.state.add_conversation(conversation, [item("first")], MANY)
    assert added == Added(True)


async def test_state_before_the_first_write_is_empty(tried: Tried) -> None:
    state = tried.state
    assert await state.response("resp_1") is None
    assert (await state.chain("acme", "resp_1", 10, 1000)).broken == "resp_1"
    assert not await state.remove_response("resp_1")
    assert await state.conversation("conv_a") is None
    assert not await state.remove_conversation("conv_a")
    assert await state.items("conv_a", Page(5)) == []
    assert not await state.remove_item("conv_a", "first")
    assert await state.remove_unused(tried.clock.now_s) == 0
    assert await state.amount() == StoredAmount()


async def test_response_is_stored_as_it_is(tried: Tried) -> None:
    first, second = response(1), response(2, previous=1)
    assert await tried.add(first) == Added(True)
    assert await tried.add(second) == Added(True)
    found = await tried.state.response("resp_2")
    assert found is not None
    assert found.used_s == tried.clock.now_s
    for name in ("id", "tenant", "created_s", "head", "input", "output", "previous", "seen"):
        assert getattr(found, name) == getattr(second, name), name
    assert found.conversation is None
    assert await tried.state.amount() == StoredAmount(2, first.size + second.size)


async def test_chain_is_complete_broken_or_cut(tried: Tried) -> None:
    for number in range(1, 5):
        await tried.add(response(number, previous=number - 1 or None))
    chain = await tried.state.chain("acme", "resp_4", 10, 10**6)
    assert [found.id for found in chain.responses] == ["resp_1", "resp_2", "resp_3", "resp_4"]
    assert (chain.broken, chain.cut) == (None, False)
    size = response(1).size
    for most_responses, most_bytes in ((2, 10**6), (10, 3 * size - 1)):
        assert (await tried.state.chain("acme", "resp_4", most_responses, most_bytes)).cut
    assert not (await tried.state.chain("acme", "resp_4", 4, 4 * size)).cut
    assert (await tried.state.chain("other", "resp_4", 10, 10**6)).broken == "resp_4"
    assert await tried.state.remove_response("resp_2")
    assert not await tried.state.remove_response("resp_2")
    broken = await tried.state.chain("acme", "resp_4", 10, 10**6)
    assert broken.broken == "resp_2"
    assert [found.id for found in broken.responses] == ["resp_3", "resp_4"]


async def test_least_recently_used_entries_of_the_tenant_make_room(tried: Tried) -> None:
    quota = Quota(3, 10**6)
    await tried.add(response(9, tenant="other"), quota)
    for number in (1, 2, 3):
        assert await tried.add(response(number), quota) == Added(True)
    # A response that is gone on from counts as used.
    assert await tried.add(response(4, previous=1), quota) == Added(True, 1)
    assert await tried.kept(1, 2, 3, 4, 9) == [1, 3, 4, 9]
    size = response(1).size
    assert await tried.add(response(5, previous=4), Quota(10, 2 * size)) == Added(True, 2)
    # Of a chain that is used as a whole, the oldest response goes first.
    assert await tried.kept(1, 3, 4, 5, 9) == [4, 5, 9]
    assert await tried.state.amount() == StoredAmount(3, 3 * size)


async def test_response_that_is_too_large_is_not_stored_and_removes_nothing(tried: Tried) -> None:
    await tried.add(response(1))
    assert await tried.add(response(2), Quota(10, response(2).size - 1)) == Added(False)
    assert await tried.kept(1, 2) == [1]
    assert await tried.state.amount() == StoredAmount(1, response(1).size)


async def test_unused_entries_are_removed(tried: Tried) -> None:
    await tried.add(response(1))
    await tried.add(response(2))
    await tried.add(response(3, previous=1))
    assert await tried.state.remove_unused(tried.clock.now_s - 0.5) == 1
    assert await tried.kept(1, 2, 3) == [1, 3]
    assert await tried.state.remove_unused(tried.clock.now_s + 1) == 2
    assert await tried.state.amount() == StoredAmount()


async def test_turns_of_a_conversation_are_appended_as_wholes(tried: Tried) -> None:
    await begin(tried)
    turn = response(1, conversation="conv_a", seen=1)
    assert await tried.add(turn) == Added(True)
    assert await tried.add(response(2, conversation="conv_a", seen=1)) == Added(True)
    order = ["first", "msg_1", "fco_1", "out_1", "msg_2", "fco_2", "out_2"]
    assert await names(tried.state, "conv_a") == order
    assert await names(tried.state, "conv_a", Page(2)) == ["out_2", "fco_2"]
    assert await names(tried.state, "conv_a", Page(2, "fco_2")) == ["msg_2", "out_1"]
    assert await names(tried.state, "conv_a", Page(2, "fco_1", True)) == ["out_1", "msg_2"]
    assert await names(tried.state, "conv_a", Page(2, "nothing", True)) == []
    found = await tried.state.conversation("conv_a")
    assert found is not None
    assert (found.newest, found.metadata, found.tenant) == (7, {"topic": "x"}, "acme")
    until = await tried.state.items_until("conv_a", 4, 10**6)
    assert [entry.id for entry in until] == order[:4]
    assert len(await tried.state.items_until("conv_a", 7, 1)) == 1
    assert await tried.state.item("conv_a", "out_1") == item("out_1")
    made = await tried.state.response("resp_1")
    assert made is not None
    assert (made.items, made.conversation, made.seen) == (turn.items, "conv_a", 1)
    assert (await tried.state.amount()).entries == 2


async def test_conversation_of_another_tenant_takes_no_turn(tried: Tried) -> None:
    await begin(tried)
    assert await tried.add(response(1, conversation="conv_a", tenant="other")) == Added(False)
    assert await tried.add(response(1, conversation="conv_b")) == Added(False)
    assert await names(tried.state, "conv_a") == ["first"]


async def test_deleted_item_is_gone_from_its_response_too(tried: Tried) -> None:
    await begin(tried)
    before = await tried.state.amount()
    await tried.add(response(1, conversation="conv_a"))
    assert await tried.state.remove_item("conv_a", "fco_1")
    assert not await tried.state.remove_item("conv_a", "fco_1")
    assert await names(tried.state, "conv_a") == ["first", "msg_1", "out_1"]
    made = await tried.state.response("resp_1")
    assert made is not None
    assert [entry.id for entry in made.items] == ["msg_1", "out_1"]
    # A response's items are gone from its conversation with it.
    assert await tried.state.remove_response("resp_1")
    assert await names(tried.state, "conv_a") == ["first"]
    assert await tried.state.amount() == before


async def test_deleted_conversation_takes_its_responses_with_it(tried: Tried) -> None:
    await begin(tried)
    await tried.add(response(1, conversation="conv_a"))
    await tried.add(response(2))
    assert await tried.state.remove_conversation("conv_a")
    assert await tried.kept(1, 2) == [2]
    assert await names(tried.state, "conv_a") == []
    added = await tried.state.add_items("conv_a", [item("late")], MANY)
    assert added == Added(False)
    assert await tried.add(response(3, conversation="conv_a")) == Added(False)
    assert await tried.state.amount() == StoredAmount(1, response(2).size)


async def test_conversation_gets_items_and_other_metadata(tried: Tried) -> None:
    await begin(tried)
    added = await tried.state.add_items("conv_a", [item("second"), item("third")], MANY)
    assert added == Added(True, ids=("second", "third"))
    assert await tried.state.item("conv_a", "second") == item("second")
    found = await tried.state.conversation("conv_a")
    assert found is not None
    assert await tried.state.replace_metadata(found.with_metadata({"topic": "other"}))
    assert not await tried.state.replace_metadata(StoredConversation("conv_b", "acme", 0))
    changed = await tried.state.conversation("conv_a")
    assert changed is not None
    assert changed.metadata == {"topic": "other"}
    size = (await tried.state.amount()).size
    assert size == len(b'{"topic":"other"}') + sum(
        item(name).size for name in ("first", "second", "third")
    )
    assert await tried.state.add_items("conv_a", [item("fourth")], Quota(9, size)) == Added(False)
    assert await tried.state.remove_item("conv_a", "second")
    assert await names(tried.state, "conv_a") == ["first", "third"]


async def test_item_whose_id_another_one_has_gets_its_own(tried: Tried) -> None:
    await begin(tried)
    before = (await tried.state.amount()).size
    # Writers that do not see each other, one that repeats an id, and a turn beside them.
    texts = [f"t{i}" for i in range(6)]
    several = [tried.state.add_items("conv_a", [item("same", text)], MANY) for text in texts[:4]]
    both = [item("same", text) for text in texts[4:]]
    added = await asyncio.gather(*several, tried.state.add_items("conv_a", both, MANY))
    turn = response(1, conversation="conv_a")
    await tried.add(replace(turn, input=(item("same", "of a turn"),)))
    every = await tried.state.items("conv_a", Page(100, ascending=True))
    ids = [entry.id for entry in every]
    assert len({*ids}) == len(ids) == 9
    assert {"same", *(name for one in added for name in one.ids)} < {*ids}
    made = await tried.state.response("resp_1")
    assert made is not None
    assert made.input[0].id in ids
    assert made.input[0].body == item("same", "of a turn").body
    assert (await tried.state.amount()).size - before == sum(
        entry.size for entry in every if entry.id != "first"
    ) + len(turn.head)
    # Pages end, and an item is deleted alone.
    for ascending in (True, False):
        seen: list[str] = []
        while page := await tried.state.items(
            "conv_a", Page(1, seen[-1] if seen else None, ascending)
        ):
            seen.append(page[0].id)
        assert seen == (ids if ascending else ids[::-1])
    assert not await tried.state.remove_item("conv_a", 'same {"text":')
    assert await tried.state.remove_item("conv_a", "same")
    assert len(await names(tried.state, "conv_a")) == 8


@pytest.mark.parametrize("removal", ["response", "item", "conversation", "eviction", "expiry"])
async def test_removed_text_is_nowhere_in_the_folder(tmp_path: Path, removal: str) -> None:
    clock = Clock()
    state = SqliteResponses(tmp_path / "responses.sqlite3", clock)
    tried = Tried(state, clock)
    secret = "confidential " * 500
    await begin(tried)
    conversation = None if removal in ("response", "eviction") else "conv_a"
    await tried.add(response(1, text=secret, conversation=conversation))
    await tried.add(response(2))

    def found() -> bool:
        files = list(tmp_path.iterdir())
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
        return any(b"confidential" in path.read_bytes() for path in files)

    assert found()
    match removal:
        case "response":
            await state.remove_response("resp_1")
        case "item":
            await state.remove_item("conv_a", "msg_1")
        case "conversation":
            await state.remove_conversation("conv_a")
        case "eviction":
            await tried.add(response(3), Quota(2, 10**6))
        case "expiry":
            await state.remove_unused(clock.now_s - 0.5)
    assert not found()
    await state.stop()


async def test_full_disk_raises_and_keeps_nothing_of_a_change(tmp_path: Path) -> None:
    clock = Clock()
    state = SqliteResponses(tmp_path / "responses.sqlite3", clock)
    tried = Tried(state, clock)
    await begin(tried)
    await tried.add(response(1))
    before = await state.amount()
    connection = state._file._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages + 1}")
    large = "x" * 50_000
    with pytest.raises(StorageFullError):
        await tried.add(response(2, text=large, previous=1))
    with pytest.raises(StorageFullError):
        await tried.add(response(3, text=large, conversation="conv_a"))
    with pytest.raises(StorageFullError):
        await state.add_items("conv_a", [item("second"), item("third", large)], MANY)
    assert await tried.kept(1, 2, 3) == [1]
    assert await names(state, "conv_a") == ["first"]
    assert await state.amount() == before
    connection.execute("PRAGMA max_page_count=1000000")
    assert (await tried.add(response(2, text=large, previous=1))).kept
    await state.stop()
