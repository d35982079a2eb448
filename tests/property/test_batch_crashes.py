"""A process that runs a batch may die at any step: each line is in the output and charged once.

Every read and write of a gateway goes through one counter, which kills the gateway before or after
a step, or lets the step fail although it was done. Further gateways then go on with what is there.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.batches import batch_runner
from service.batches.batch_records import BatchRecord, FileRecord, Status
from service.batches.batch_runner import BatchRunner, BatchRunnerParts
from service.batches.batch_state import BatchState
from service.batches.batch_types import AsWritten, BatchTerms, NoPace
from service.batches.file_folder import FileFolder
from service.batches.redis_state import RedisState
from service.batches.sqlite_state import SqliteState
from service.config import BatchesConfig
from service.errors import StoreUnavailableError
from service.http.asgi_helpers import send_response
from service.http.on_behalf import on_behalf
from service.store.limit_windows import DAY
from service.store.memory_store import MemoryStore
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import (
    Account,
    Charge,
    Granted,
    Settlement,
    Store,
    StoreClaim,
    UsageNote,
)
from service.task_cancellation import cancel_and_wait
from service.types import NOBODY, Tenant
from tests.support.redis_server import RedisServer, redis_server

CHAT = "/v1/chat/completions"
BUDGET = Account("budget/all", 10**6, DAY)
LINES = 3
# One of the lines can't run.
BROKEN = 1
_ids = count()


class Killed(BaseException):
    """The process is dead: nothing in it goes on."""


class Blow(StrEnum):
    """What happens to a step."""

    KILL_BEFORE = "kill_before"
    KILL_AFTER = "kill_after"
    FAIL_BEFORE = "fail_before"
    FAIL_AFTER = "fail_after"


@dataclass
class Fate:
    """Counts the steps of one process, and strikes at some of them."""

    blows: dict[int, Blow] = field(default_factory=dict)
    steps: int = 0
    dead: bool = False

    def before(self, *, counted: bool = True) -> Blow | None:
        if self.dead:
            raise Killed
        if not counted:
            return None
        self.steps += 1
        blow = self.blows.get(self.steps)
        if blow is Blow.KILL_BEFORE:
            self.dead = True
            raise Killed
        if blow is Blow.FAIL_BEFORE:
            raise StoreUnavailableError("struck")
        return blow

    def after(self, blow: Blow | None) -> None:
        if blow is Blow.KILL_AFTER:
            self.dead = True
        if self.dead:
            raise Killed
        if blow is Blow.FAIL_AFTER:
            raise StoreUnavailableError("struck")


class Struck:
    """Wraps an object, so that each of its methods named here is a step."""

    def __init__(self, real: Any, fate: Fate, methods: tuple[str, ...]) -> None:
        self._real, self._fate, self._methods = real, fate, methods

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in self._methods:
            return method
        if not asyncio.iscoroutinefunction(method):

            def step(*args: Any, **more: Any) -> Any:
                blow = self._fate.before()
                result = method(*args, **more)
                self._fate.after(blow)
                return Struck(result, self._fate, ("write", "keep")) if name == "begin" else result

            return step

        async def astep(*args: Any, **more: Any) -> Any:
            # How often a lease is renewed depends on time, so that it is no step.
            blow = self._fate.before(counted=name != "renew")
            result = await method(*args, **more)
            self._fate.after(blow)
            return result

        return astep


STATE_STEPS = (
    "batch",
    "replace",
    "plan",
    "lease",
    "renew",
    "release",
    "put_results",
    "mark_settled",
    "unsettled",
    "done",
    "results",
    "add_file",
)
STORE_STEPS = ("reserve", "settle", "settle_once", "close_group")


@dataclass
class World:
    """What outlives processes: the disk, the state and the counts of money."""

    folder: FileFolder
    open_state: Callable[[], BatchState]
    open_store: Callable[[], Any]
    clock: list[float]
    rng: random.Random
    retries: bool = False
    hurry_s: float = 0.1

    async def add_batch(self, batch_id: str) -> BatchRecord:
        lines = []
        for number in range(LINES):
            body = {"model": "m", "number": number}
            given = {"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}
            lines.append(b"{" if number == BROKEN else json.dumps(given).encode())
        file_id = f"file-{secrets.token_hex(12)}"
        size = self.folder.write(file_id, (line + b"\n" for line in lines))
        now_s = int(self.clock[0])
        state = self.open_state()
        await state.add_file(
            FileRecord(file_id, NOBODY.name, "batch", "x", size, now_s, now_s + 10**9), None
        )
        batch = BatchRecord(
            batch_id, NOBODY.name, "", CHAT, file_id, None, BatchTerms(), now_s, now_s + 10**9
        )
        assert await state.add_batch(batch, 10)
        await state.stop()
        return batch

    def answer(self, store: Store) -> Any:
        """An endpoint that reserves, answers, and leaves the settlement to the maker."""

        async def answer(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            behalf = on_behalf(scope)
            assert behalf is not None
            body = json.loads((await receive())["body"])
            cost = body["number"] + 1
            claim = StoreClaim(secrets.token_hex(8), (Charge(BUDGET, 50),))
            granted = await store.reserve(claim)
            assert isinstance(granted, Granted)
            note = UsageNote("usage", {"requests": 1}, 1000)
            behalf.settlements.append(Settlement(granted, (cost,), note))
            behalf.ended.set()
            await asyncio.sleep(0)
            if self.retries and self.rng.random() < 0.3:
                await send_response(send, 503, [(b"retry-after", b"1")], b"{}")
                return
            usage = {"prompt_tokens": cost, "completion_tokens": 1, "coe": {"cost": cost}}
            await send_response(send, 200, [], json.dumps({"usage": usage}).encode())

        return answer

    async def live(self, fate: Fate, batch_id: str) -> bool:
        """Run a gateway until the batch has ended or it is dead. Return whether it died."""
        # Nobody waits for the tasks of a dead process.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        state, store = self.open_state(), self.open_store()
        await store.start()
        await state.start()
        struck_store: Any = Struck(store, fate, STORE_STEPS)
        struck_state: Any = Struck(state, fate, STATE_STEPS)
        struck_folder: Any = Struck(self.folder, fate, ("begin",))

        def identify(tenant: str, key: str) -> Tenant:
            return NOBODY

        runner = BatchRunner(
            secrets.token_hex(8),
            BatchesConfig.model_validate({"lease_s": 1, "max_in_flight": 2}),
            BatchRunnerParts(
                struck_state,
                struck_folder,
                struck_store,
                self.answer(struck_store),
                identify,
                AsWritten(),
                NoPace(),
                lambda result: None,
            ),
            max_line_bytes=10_000,
            clock=lambda: self.clock[0],
            poll_s=0.002,
        )
        runner.start()
        try:
            async with asyncio.timeout(120):
                while not fate.dead:
                    found = await state.batch(batch_id)
                    assert found is not None
                    if found.ended:
                        break
                    await asyncio.sleep(0.001)
                    self.clock[0] += self.hurry_s  # leases that nobody renews end soon
        finally:
            died = fate.dead
            if not died:
                await runner.stop()
            fate.dead = True  # its tasks do nothing more
            if died:
                await self._bury(runner)
            await store.stop()
            await state.stop()
        # Leases of the dead end.
        self.clock[0] += 10_000
        return died

    async def _bury(self, runner: BatchRunner) -> None:
        """End the tasks of a dead process. None of them can read or write."""
        tasks = {runner._looking, *runner._tasks.values()}
        for job in runner._jobs.values():
            tasks |= job.calls | job.background
        # The Redis client may swallow a cancellation.
        await cancel_and_wait(*tasks)

    async def check(self, batch_id: str) -> None:
        """Each line is in the output once, and charged once."""
        state, store = self.open_state(), self.open_store()
        await store.start()
        batch = await state.batch(batch_id)
        assert batch is not None
        assert batch.status is Status.COMPLETED
        written = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            assert file_id is not None
            file = await state.file(file_id)
            assert file is not None
            content = self.folder.path_of(file_id).read_bytes()
            assert len(content) == file.size
            written.append([json.loads(line) for line in content.splitlines()])
        good, bad = written
        runs = [number for number in range(LINES) if number != BROKEN]
        assert [line["custom_id"] for line in good] == [f"c{number}" for number in runs]
        assert [line["error"]["code"] for line in bad] == ["invalid_json_line"]
        spent = sum(number + 1 for number in runs)
        assert batch.counts.cost == spent
        assert (batch.counts.completed, batch.counts.failed) == (LINES - 1, 1)
        (balance,) = await store.balances([BUDGET])
        assert balance.spent == spent
        assert balance.reserved == 0 or isinstance(store, MemoryStore)
        (counts,) = await store.counts(["usage"])
        assert counts == {"requests": len(runs)}
        assert await state.done(batch_id) == set()
        await store.stop()
        await state.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits long for its next try."""
    monkeypatch.setattr(batch_runner, "wait_s", lambda *_: 0.001)
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.002)


def world(kind: str, server: RedisServer | None, folder: Path, seed: int = 0) -> World:
    number = next(_ids)
    clock = [1_700_000_000.0]
    files = FileFolder(folder / f"files-{number}")
    rng = random.Random(seed)
    if kind == "sqlite":
        store = MemoryStore(lambda: 1_700_000_000.0)
        path = folder / f"state-{number}.sqlite3"
        return World(files, lambda: SqliteState(path, lambda: clock[0]), lambda: store, clock, rng)
    assert server is not None
    url = server.url

    def open_store() -> RedisStore:
        client = RedisClient(
            url,
            secrets.token_hex(8),
            prefix=f"c{number}",
            timeout_s=5,
            lease_s=100,
            # The window of the budget stays the same, although leases end.
            clock=lambda: 1_700_000_000.0,
        )
        return RedisStore(client, share=0, lease_s=100, heartbeat_s=5)

    def open_state() -> RedisState:
        return RedisState(url, prefix=f"c{number}", timeout_s=5, clock=lambda: clock[0])

    return World(files, open_state, open_store, clock, rng)


async def _one_blow(made: World, step: int, blow: Blow) -> int:
    """Strike once, and go on; return the steps of the first gateway."""
    batch = await made.add_batch("batch_1")
    first = Fate({step: blow})
    if await made.live(first, batch.id):
        await made.live(Fate(), batch.id)
    await made.check(batch.id)
    return first.steps


# A kill before a step is a kill after the step before.
@pytest.mark.parametrize("blow", [blow for blow in Blow if blow is not Blow.KILL_BEFORE])
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_one_blow_at_every_step_loses_and_doubles_nothing(
    kind: str, blow: Blow, server: RedisServer, tmp_path: Path
) -> None:
    steps = await _one_blow(world(kind, server, tmp_path), 0, blow)
    assert steps > 20, "there are as many steps as the run has reads and writes"
    # The steps are the same with both; every second one is enough for the slower.
    for step in range(1, steps + 1, 1 if kind == "sqlite" else 2):
        await _one_blow(world(kind, server, tmp_path), step, blow)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lives=st.lists(
        st.dictionaries(st.integers(1, 40), st.sampled_from(Blow), max_size=4), max_size=4
    ),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_many_blows_lose_and_double_nothing(
    kind: str,
    lives: list[dict[int, Blow]],
    seed: int,
    server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async def run() -> None:
        made = world(kind, server, tmp_path_factory.mktemp("w"), seed)
        made.retries = True
        batch = await made.add_batch("batch_1")
        for blows in lives:
            if not await made.live(Fate(dict(blows)), batch.id):
                break
        else:
            await made.live(Fate(), batch.id)
        await made.check(batch.id)

    asyncio.run(run())


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    blows=st.dictionaries(st.integers(1, 40), st.sampled_from(Blow), max_size=3),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_two_gateways_that_lose_their_leases_double_nothing(
    kind: str,
    blows: dict[int, Blow],
    seed: int,
    server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async def run() -> None:
        made = world(kind, server, tmp_path_factory.mktemp("w"), seed)
        made.retries = True
        # Each lease ends before it can be renewed, so that both run the same lines.
        made.hurry_s = 0.4
        batch = await made.add_batch("batch_1")
        await asyncio.gather(made.live(Fate(dict(blows)), batch.id), made.live(Fate(), batch.id))
        await made.check(batch.id)

    asyncio.run(run())
