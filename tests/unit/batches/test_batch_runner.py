"""The runner with an endpoint that does as it is told: limits of cost, faults, and keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.batches import batch_runner
from service.batches.batch_records import BatchRecord, FileRecord, LineResult, Status
from service.batches.batch_replanning import load_plan
from service.batches.batch_runner import BatchRunner, BatchRunnerParts
from service.batches.batch_types import (
    AsWritten,
    BatchLine,
    BatchPlan,
    BatchTerms,
    LineChoice,
    NoPace,
    PacesBatches,
)
from service.batches.file_folder import FileFolder
from service.batches.input_lines import InputLines
from service.batches.sqlite_state import SqliteState
from service.config import BatchesConfig
from service.errors import (
    CoeError,
    StorageFullError,
    StoreUnavailableError,
    UnauthorizedError,
)
from service.http.asgi_helpers import send_response
from service.store.memory_store import MemoryStore
from service.types import NOBODY, Tenant
from tests.support.polling import until

URL = "/v1/completions"
INPUT = "file-" + "0" * 24
Reply = Callable[[int, int], tuple[int, bytes]]


def answers(cost: float = 1.0) -> Reply:
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2, "coe": {"cost": cost}}}
    return lambda number, tries: (200, json.dumps(usage).encode())


class Bench:
    """A runner over a folder, with an endpoint that answers by `reply(line, tries)`."""

    def __init__(
        self,
        folder: Path,
        reply: Reply,
        *,
        lines: int,
        in_flight: int = 4,
        pace: PacesBatches | None = None,
        models: Sequence[str] = ("auto",),
    ) -> None:
        self.files = FileFolder(folder / "files")
        self.state = SqliteState(folder / "state.sqlite3")
        self.tries: dict[int, int] = {}
        self.most = 0
        self.counted: list[str] = []
        self.refusal: CoeError | None = None
        self.lines = lines
        self.models = models
        running = 0

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            nonlocal running
            running += 1
            self.most = max(self.most, running)
            number = json.loads((await receive())["body"])["number"]
            self.tries[number] = self.tries.get(number, 0) + 1
            await asyncio.sleep(0.005)
            status, body = reply(number, self.tries[number])
            running -= 1
            if status == 0:
                raise ConnectionResetError
            await send_response(send, status, [(b"retry-after", b"1")], body)

        def identify(tenant: str, key: str) -> Tenant:
            if self.refusal is not None:
                raise self.refusal
            return NOBODY

        self.runner = BatchRunner(
            "me",
            BatchesConfig.model_validate({"max_in_flight": in_flight}),
            BatchRunnerParts(
                self.state,
                self.files,
                MemoryStore(),
                answer,
                identify,
                AsWritten(),
                pace or NoPace(),
                self.counted.append,
            ),
            max_line_bytes=10_000,
            poll_s=0.01,
        )

    def body(self, number: int) -> dict[str, Any]:
        """The body of a line."""
        return {"number": number, "model": self.models[number % len(self.models)]}

    def content(self) -> bytes:
        """The input file."""
        lines = [
            {"custom_id": f"c{i}", "method": "POST", "url": URL, "body": self.body(i)}
            for i in range(self.lines)
        ]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    async def run(self, terms: BatchTerms | None = None) -> BatchRecord:
        """Run a batch to its end."""
        size = await asyncio.to_thread(self.files.write, INPUT, [self.content()])
        await self.state.add_file(
            FileRecord(INPUT, NOBODY.name, "batch", "x", size, 0, 2**40), None
        )
        batch = BatchRecord(
            "batch_1", NOBODY.name, "", URL, INPUT, None, terms or BatchTerms(), 0, 2**40
        )
        await self.state.add_batch(batch, 9)
        self.runner.start()

        async def over() -> bool:
            found = await self.state.batch(batch.id)
            return found is not None and found.ended

        await until(over, "the batch ends")
        await self.runner.stop()
        found = await self.state.batch(batch.id)
        assert found is not None
        await self.state.stop()
        return found

    def read(self, file_id: str | None) -> list[Any]:
        """The lines of an output file."""
        if file_id is None:
            return []
        return [json.loads(line) for line in self.files.path_of(file_id).read_text().splitlines()]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "wait_s", lambda *_: 0.001)
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.005)


async def test_runner_stops_at_the_batch_s_cost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, answers(2.0), lines=10, in_flight=1)
    batch = await bench.run(BatchTerms(max_cost=5.0))
    assert batch.status is Status.COMPLETED
    # Nothing is known of a line's cost before it ran: the third one passes the bound.
    assert (batch.counts.completed, batch.counts.failed) == (3, 7)
    left = bench.read(batch.error_file_id)
    assert {line["error"]["code"] for line in left} == {"max_cost_reached"}


async def test_runner_that_has_used_the_cost_ends_the_batch_whatever_its_lines_cost(
    tmp_path: Path,
) -> None:
    def reply(number: int, tried: int) -> tuple[int, bytes]:
        # Sums of such numbers depend on their order.
        return answers(0.1 + number / 7)(number, tried)

    bench = Bench(tmp_path, reply, lines=24, in_flight=4)
    batch = await bench.run(BatchTerms(max_cost=3.0))
    assert batch.status is Status.COMPLETED
    assert batch.counts.completed + batch.counts.failed == 24
    assert batch.counts.failed >= 10


async def test_runner_counts_the_cost_of_a_result_whose_storing_seemed_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, answers(2.0), lines=10, in_flight=1)
    put = bench.state.put_results

    async def unheard(*args: Any) -> set[int]:
        await put(*args)
        monkeypatch.setattr(bench.state, "put_results", put)
        raise StoreUnavailableError("the reply was lost")

    monkeypatch.setattr(bench.state, "put_results", unheard)
    batch = await bench.run(BatchTerms(max_cost=5.0))
    assert (batch.counts.completed, batch.counts.failed) == (3, 7)
    assert bench.counted.count("completed") == 3


@pytest.mark.parametrize(
    ("floor", "most", "completed", "code"),
    [(0.4, 10.0, 10, None), (0.4, 1.0, 8, "max_cost_reached"), (2.0, 1.0, 0, "max_cost_reached")],
)
async def test_runner_gives_lines_the_bound_that_they_need_while_there_is_cost_left(
    tmp_path: Path, floor: float, most: float, completed: int, code: str | None
) -> None:
    """A request is refused for a bound below its floor, and costs far less in the end."""
    good = answers(0.08)
    bounds: list[float] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        number = json.loads((await receive())["body"])["number"]
        bound = float(dict(scope["headers"])[b"x-coe-max-cost"])
        if bound < floor:
            error = {"code": "infeasible_bounds", "nearest": {"max_cost": floor}}
            await send_response(send, 400, [], json.dumps({"error": error}).encode())
            return
        bounds.append(bound)
        await send_response(send, 200, [], good(number, 1)[1])

    bench = Bench(tmp_path, good, lines=10, in_flight=4)
    bench.runner._parts = replace(bench.runner._parts, answer=answer)
    batch = await bench.run(BatchTerms(max_cost=most))
    assert batch.counts.completed == completed
    assert batch.counts.cost <= most
    assert {line["error"]["code"] for line in bench.read(batch.error_file_id)} == (
        {code} if code else set()
    )
    assert all(bound >= floor for bound in bounds)


async def test_runner_that_has_lost_its_lease_spends_no_cost_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, answers(2.0), lines=3, in_flight=1)
    put, lease = bench.state.put_results, bench.state.lease
    refused: list[set[int]] = []

    async def no_lease(*_: Any) -> None:
        return None

    async def take_over(batch_id: str, results: Sequence[LineResult], owner: str) -> set[int]:
        # The answer comes when another gateway has the batch, and spends most of what is left.
        monkeypatch.setattr(bench.state, "put_results", put)
        monkeypatch.setattr(bench.state, "lease", no_lease)
        while await lease("other", 15) is None:
            await bench.state.release("me", batch_id)
        refused.append(await put(batch_id, results, owner))
        assert await put(batch_id, [LineResult(2, False, b"{}", cost=4.0)], "other") == {2}
        await bench.state.release("other", batch_id)
        monkeypatch.setattr(bench.state, "lease", lease)
        return refused[0]

    async def late(*given: Any) -> set[int]:
        # The runner may notice it meanwhile, and end the line.
        return await asyncio.shield(asyncio.create_task(take_over(*given)))

    monkeypatch.setattr(bench.state, "put_results", late)
    batch = await bench.run(BatchTerms(max_cost=6.0))
    assert refused == [set()]
    assert batch.status is Status.COMPLETED
    assert batch.counts.cost == 6.0
    assert (batch.counts.completed, batch.counts.failed) == (2, 1)
    assert bench.tries == {0: 2}
    (left,) = bench.read(batch.error_file_id)
    assert left["error"]["code"] == "max_cost_reached"


async def test_runner_has_no_more_lines_under_way_than_allowed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, answers(), lines=30, in_flight=3)
    batch = await bench.run()
    assert batch.counts.completed == 30
    assert bench.most == 3
    assert (batch.counts.prompt_tokens, batch.counts.completion_tokens) == (30, 60)


@pytest.mark.parametrize(
    ("status", "passes_at", "tries", "failed"),
    [(503, 9, 9, False), (429, 9, 9, False), (500, 3, 3, False), (500, 4, 3, True), (0, 9, 3, True),
     (400, 2, 1, True)],
)  # fmt: skip
async def test_runner_tries_again_where_that_may_help(
    tmp_path: Path, status: int, passes_at: int, tries: int, failed: bool
) -> None:
    good = answers()

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        return good(number, tried) if tried >= passes_at else (status, b'{"error":{}}')

    bench = Bench(tmp_path, reply, lines=2)
    batch = await bench.run()
    assert bench.tries == {0: tries, 1: tries}
    assert batch.counts.failed == (2 if failed else 0)
    assert bench.counted.count("retried") == 2 * (tries - 1)


async def test_runner_without_its_key_fails_the_batch(tmp_path: Path) -> None:
    bench = Bench(tmp_path, answers(), lines=2)
    bench.refusal = UnauthorizedError("the key is gone")
    batch = await bench.run()
    assert batch.status is Status.FAILED
    assert batch.errors[0].code == "invalid_api_key"
    assert bench.tries == {}


async def test_runner_with_a_full_disk_waits_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, answers(), lines=3)
    put, refused = bench.state.put_results, [0]

    async def full(*args: Any) -> set[int]:
        refused[0] += 1
        if refused[0] <= 4:
            raise StorageFullError("full")
        return await put(*args)

    monkeypatch.setattr(bench.state, "put_results", full)
    batch = await bench.run()
    assert batch.status is Status.COMPLETED
    assert batch.counts.completed == 3
    # A result that could not be stored is kept, and its line does not run again.
    assert bench.tries == {0: 1, 1: 1, 2: 1}


class OnePlace:
    """A pace that lets one line run at a time."""

    def __init__(self) -> None:
        self.place = asyncio.Semaphore(1)

    async def turn(self, models: Sequence[str]) -> str:
        await self.place.acquire()
        return models[0]

    def ended(self, model: str) -> None:
        self.place.release()


async def test_runner_gives_the_place_of_a_line_that_waits_to_others(tmp_path: Path) -> None:
    good = answers()
    answered: list[int] = []

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        if number == 0 and not answered:
            return 429, b"{}"
        answered.append(number)
        return good(number, tried)

    pace = OnePlace()
    bench = Bench(tmp_path, reply, lines=2, pace=pace)
    batch = await bench.run()
    assert answered == [1, 0]
    assert batch.counts.completed == 2
    assert pace.place._value == 1, "each turn was given back once"


async def test_runner_runs_a_tenant_s_first_batch_beside_long_ones_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = answers()
    others: list[str] = []

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        # The first tenant's limit is reached for as long as the other one waits.
        return good(number, tried) if others else (429, b"{}")

    bench = Bench(tmp_path, reply, lines=1)
    most = BatchesConfig().max_running
    for number in range(most + 2):
        waiting = BatchRecord(
            f"batch_0{number}", "first", "", URL, INPUT, None, BatchTerms(), 0, 2**40
        )
        await bench.state.add_batch(waiting, 99)
    identify = bench.runner._parts.identify
    seen: list[str] = []

    def noted(tenant: str, key: str) -> Tenant:
        seen.append(tenant)
        if tenant == NOBODY.name:
            others.append(tenant)
        return identify(tenant, key)

    bench.runner._parts = replace(bench.runner._parts, identify=noted)
    await asyncio.to_thread(bench.files.write, INPUT, [bench.content()])
    bench.runner.start()
    await until(lambda: bench.tries.get(0, 0) > most, "the first tenant's batches run")
    assert len(bench.runner._jobs) == most
    monkeypatch.setattr(bench.runner, "start", lambda: None)
    batch = await bench.run()
    assert batch.status is Status.COMPLETED
    assert set(seen) == {"first", NOBODY.name}


async def test_runner_sends_a_line_to_what_its_plan_is_worth_now(tmp_path: Path) -> None:
    bench, models = Bench(tmp_path, answers(), lines=2), []
    answer = bench.runner._parts.answer

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        models.append(json.loads(message["body"])["model"])

        async def again() -> Any:
            return message

        await answer(scope, again, send)

    bench.runner._parts = replace(
        bench.runner._parts,
        answer=noted,
        model_of=lambda named, planned, tenant: f"{named} not {planned} of {tenant.name}",
    )
    await bench.run()
    assert models == [f"auto not auto of {NOBODY.name}"] * 2


async def test_runner_gives_the_place_of_a_line_that_waits_for_cost_to_others(
    tmp_path: Path,
) -> None:
    good = answers(1.0)
    answered: list[int] = []

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        # The first line has all that is left of the cost, and waits until another batch has run.
        if number == 0 and pace.place.locked() and tried < 20:
            return 429, b"{}"
        answered.append(number)
        return good(number, tried)

    pace = OnePlace()
    bench = Bench(tmp_path, reply, lines=2, pace=pace)
    planned = BatchPlan(
        tuple(LineChoice(n, "auto", 0.0, 9.0, 0.0) for n in range(2)), 0.0, 18.0, 0.0
    )

    class Planned(AsWritten):
        async def plan(self, *_: Any) -> BatchPlan:
            return planned

    bench.runner._parts = replace(bench.runner._parts, planner=Planned())
    running = asyncio.create_task(bench.run(BatchTerms(max_cost=10.0)))
    await until(lambda: bench.tries.get(0, 0) > 3, "the first line comes again")
    # It could not where the second line, which waits for its cost, had the only place.
    await running
    assert answered[0] == 0


@pytest.mark.parametrize("in_flight", [1, 2, 8])
async def test_runner_lets_lines_of_other_models_run_while_those_of_one_wait(
    tmp_path: Path, in_flight: int
) -> None:
    good = answers()
    answered: list[int] = []

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        # The first model can't answer before all lines of the other one have their answers.
        if number % 2 == 0 and len(answered) < 20:
            return 503, b"{}"
        answered.append(number)
        return good(number, tried)

    bench = Bench(tmp_path, reply, lines=40, in_flight=in_flight, models=("down", "up"))
    batch = await bench.run()
    assert batch.counts.completed == 40
    assert [number % 2 for number in answered] == [1] * 20 + [0] * 20
    assert bench.most <= in_flight


async def test_runner_begins_anew_where_a_line_can_t_be_read_while_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = answers()
    answered: list[int] = []

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        if number == 0 and not answered:
            return 429, b"{}"
        answered.append(number)
        return good(number, tried)

    numbered = InputLines.numbered
    failed: list[int] = []

    def faulty(lines: InputLines, number: int) -> BatchLine:
        if number == 1 and len(failed) < 2:
            failed.append(number)
            raise OSError("the disk is away")
        return numbered(lines, number)

    monkeypatch.setattr(InputLines, "numbered", faulty)
    batch = await Bench(tmp_path, reply, lines=2).run()
    assert batch.counts.completed == 2
    assert failed == [1, 1]


async def test_runner_follows_a_new_plan_of_the_lines_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = answers(1.0)
    plans: list[bytes] = []
    sent: dict[int, str] = {}

    def reply(number: int, tried: int) -> tuple[int, bytes]:
        # The second half is not answered before there is a new plan.
        return good(number, tried) if number < 20 or len(plans) > 1 else (429, b"{}")

    class Again(AsWritten):
        async def plan(self, *_: Any) -> BatchPlan:
            lines = tuple(LineChoice(n, "first", 0.5, 1.0, 0.0) for n in range(40))
            return BatchPlan(lines, 0.5, 40.0, 0.0, "basis")

        async def replan(self, basis: object, terms: BatchTerms, left: Any, _: Any) -> BatchPlan:
            assert basis == "basis"
            assert terms.max_cost is not None
            assert terms.max_cost < 100
            lines = [choice.line for each in left for choice in each]
            choices = tuple(LineChoice(n, "second", 0.5, 1.0, 0.0) for n in lines)
            return BatchPlan(choices, 0.5, 1.0, 0.0)

    def model_of(_: object, planned: str, __: Tenant) -> str:
        return planned

    bench = Bench(tmp_path, reply, lines=40, in_flight=2)
    answer, put = bench.runner._parts.answer, bench.state.replace

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = json.loads(message["body"])
        sent[body["number"]] = body["model"]

        async def again() -> Any:
            return message

        await answer(scope, again, send)

    async def replace_noted(batch: BatchRecord, plan: bytes | None = None) -> bool:
        done = await put(batch, plan)
        if done and plan is not None:
            plans.append(plan)
        return done

    monkeypatch.setattr(bench.state, "replace", replace_noted)
    bench.runner._parts = replace(
        bench.runner._parts, answer=noted, planner=Again(), model_of=model_of
    )
    batch = await bench.run(BatchTerms(max_cost=100.0))
    assert (batch.counts.completed, batch.counts.failed) == (40, 0)
    assert sorted(sent) == list(range(40))
    assert sent[0] == "first"
    assert sent[39] == "second"
    # The new plan is there for whoever goes on after a restart.
    stored = {choice.line: choice.model for choice in load_plan(plans[-1])}
    assert sorted(stored) == list(range(40))
    assert stored[39] == "second"
