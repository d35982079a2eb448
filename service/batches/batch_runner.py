"""Runs batches: leases them, plans them, runs their lines, and writes their output files.

Any step may be the last one of this process. Another gateway, or this one after a restart, then
goes on with what the state has:

1. A line's result is stored together with what settles its claims. The first result of a line
   counts, and a sealed batch takes none. One with a `max_cost` takes them only from the gateway
   that leases it, so that two never spend the same part of the cost.
2. The claims are settled, as one item of work, which the store charges once. Only then are the
   settlements forgotten. A try whose result did not count only releases its claims.
3. At the end the batch is sealed, its output files are written whole under ids that depend on the
   batch alone, and the batch enters its last state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Any, TypeVar

import orjson

from service.batches.batch_progress import PlannedShare, counted_as, shares_of
from service.batches.batch_records import (
    OUTPUT_PURPOSE,
    BatchRecord,
    FileRecord,
    InputError,
    LineResult,
    Status,
    output_id,
    request_id,
)
from service.batches.batch_replanning import (
    BatchReplanning,
    ReplannedBatch,
    dump_plan,
    load_plan,
)
from service.batches.batch_state import BatchState
from service.batches.batch_types import (
    LineChoice,
    ModelOf,
    PacesBatches,
    PlansBatches,
    as_planned,
)
from service.batches.cost_limit import CostLimit
from service.batches.file_folder import FileFolder, storage_error
from service.batches.input_lines import CheckLine, InputIndex, InputLines, LineFault, read_index
from service.batches.line_call import (
    MOST_FAILURES,
    After,
    Endpoint,
    LineCall,
    LineReply,
    after_reply,
    fault_of,
    has_deadline,
    least_cost,
    result_of,
    wait_s,
    with_used,
)
from service.batches.lines_left import LinesLeft
from service.config import BatchesConfig
from service.errors import (
    CoeError,
    InvalidRequestError,
    StorageFullError,
    StoreUnavailableError,
    UnavailableError,
)
from service.http.on_behalf import OnBehalf
from service.store.store_interface import Settlement, Store, WorkItem
from service.store.stored_settlement import dumps, loads
from service.task_cancellation import cancel_and_wait
from service.types import NOBODY, Tenant

log = logging.getLogger("coe.batches")

_PAGE = 256
_RETRY_S = 0.5
# Time between two looks at what is left, in s.
_RESERVE_S = 0.05
_LAST_RETRY_S = 10.0
# The longest wait for charges when the lines of a batch have stopped.
_DELIVER_S = 3.0
# How long a batch that failed rests, in polls.
_PAUSE_POLLS = 5
# The longest wait for batches when the gateway stops.
_STOP_S = 5.0
# The most lines of a model that wait at once; more of them do not start meanwhile.
_MOST_WAITING = 4
# Time between two looks whether lines still wait, in s.
_LOOK_S = 0.05
_EXPIRED = "the batch's time was over before this line was answered"

T = TypeVar("T")

Identify = Callable[[str, str], Tenant]
"""Returns the tenant of a name and a key's id. Raises UnauthorizedError and ForbiddenError."""


class Ending(StrEnum):
    """Why the lines of a batch stop."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LOST = "lost"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class BatchRunnerParts:
    """What a runner works with.

    Attributes:
        state: The state of batches.
        folder: The contents of files.
        store: Settles the claims of lines.
        answer: Answers a line's request.
        identify: Finds the tenant of a batch.
        planner: Plans batches.
        pace: Lets lines start.
        counted: Called with each result that was stored, and why it ended: for metrics.
        model_of: Returns the model that a line is sent to.
    """

    state: BatchState
    folder: FileFolder
    store: Store
    answer: Endpoint
    identify: Identify
    planner: PlansBatches
    pace: PacesBatches
    counted: Callable[[str], None]
    model_of: ModelOf = as_planned


@dataclass(slots=True)
class _Job:
    """A batch that this gateway runs.

    Attributes:
        batch: The batch, as it was last seen.
        ending: Set when its lines have to stop.
        why: Why they stop.
        cost: What is left of its `max_cost`.
        calls: The lines that run now.
        background: Charges that are being delivered.
        places: One for each line that may run at once.
        left: Its lines that have not started.
        replanning: Plans these again; None where its terms have no `max_cost`.
        basis: What the planner expects of its lines; None before it is planned here.
        returning: By model, lets one line at a time ask for its next turn.
        waiting: By model, lines that wait for their next try or their part of the cost.
    """

    batch: BatchRecord
    places: asyncio.Semaphore
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    why: Ending = Ending.FINISHED
    cost: CostLimit = field(default_factory=lambda: CostLimit(None))
    calls: set[asyncio.Task[None]] = field(default_factory=set)
    background: set[asyncio.Task[None]] = field(default_factory=set)
    left: LinesLeft = field(default_factory=lambda: LinesLeft(()))
    replanning: BatchReplanning | None = None
    basis: object | None = None
    returning: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    waiting: Counter[str] = field(default_factory=Counter)

    def end(self, why: Ending) -> None:
        """Stop its lines; the first reason counts."""
        if not self.ending.is_set():
            self.why = why
            self.ending.set()


@dataclass(slots=True)
class _Turn:
    """A line's turn, with its place among the batch's lines under way.

    While the line waits, for its next try or its part of the cost, others have its places.

    Attributes:
        job: The line's batch.
        pace: Gives turns.
        model: The expert or recipe of the line.
        held: Whether the line has its turn now.
    """

    job: _Job
    pace: PacesBatches
    model: str
    held: bool = True

    def end(self) -> None:
        """Give the places back, if they are held."""
        if self.held:
            self.held = False
            self.job.places.release()
            self.pace.ended(self.model)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Give the places back while the body runs, and wait for the next turn then."""
        self.end()
        self.job.waiting[self.model] += 1
        try:
            yield
            await self.job.places.acquire()
            try:
                async with self.job.returning[self.model]:
                    await self.pace.turn((self.model,))
            except BaseException:
                self.job.places.release()
                raise
            self.held = True
        finally:
            self.job.waiting[self.model] -= 1


class BatchRunner:
    """Runs the batches of one gateway.

    Args:
        owner: The gateway's id, which is new for each process.
        config: The section `batches`.
        parts: What it works with.
        max_line_bytes: The longest line of an input file.
        check_line: Checks each line of an input file before it is parsed.
        clock: Returns seconds since 1970.
        poll_s: How often it looks for batches, in s.
    """

    def __init__(
        self,
        owner: str,
        config: BatchesConfig,
        parts: BatchRunnerParts,
        *,
        max_line_bytes: int,
        check_line: CheckLine | None = None,
        clock: Callable[[], float] = time.time,
        poll_s: float = 1.0,
    ) -> None:
        self._owner = owner
        self._config = config
        self._parts = parts
        self._state = parts.state
        self._max_line_bytes = max_line_bytes
        self._check_line = check_line
        self._clock = clock
        self._poll_s = poll_s
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._jobs: dict[str, _Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    # --- for the service

    def start(self) -> None:
        """Start to look for batches."""
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Stop; lines under way are given up, and run again elsewhere or after the next start."""
        await cancel_and_wait(self._looking)
        for job in self._jobs.values():
            job.end(Ending.STOPPED)
        if self._tasks:
            _, late = await asyncio.wait([*self._tasks.values()], timeout=_STOP_S)
            # They wait for a store that is away. What they have written down is enough to go on.
            await cancel_and_wait(*late)

    def wake(self) -> None:
        """Look for batches at once."""
        self._wake.set()

    def cancel(self, batch_id: str) -> None:
        """Stop the lines of a batch that was cancelled, if this gateway runs it."""
        if (job := self._jobs.get(batch_id)) is not None:
            job.end(Ending.CANCELLED)

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            self._wake.clear()
            try:
                while (batch := await self._lease()) is not None and batch.id not in self._jobs:
                    self._begin(batch)
            except CoeError as error:
                log.warning("looking for batches failed: %s", error.code)
            except Exception as error:
                log.error("looking for batches failed: %s", type(error).__name__)

    async def _lease(self) -> BatchRecord | None:
        """Lease the next batch.

        A batch may take days, so that those of one tenant must not keep others waiting for their
        end: the first batch of each tenant runs beside any number.
        """
        running: set[str] = set()
        if len(self._jobs) >= self._config.max_running:
            running = {job.batch.tenant for job in self._jobs.values()}
        return await self._state.lease(self._owner, self._config.lease_s, running)

    def _begin(self, batch: BatchRecord) -> None:
        job = self._jobs[batch.id] = _Job(batch, asyncio.Semaphore(self._config.max_in_flight))
        task = self._tasks[batch.id] = asyncio.create_task(self._run(job))

        def ended(_: asyncio.Task[None]) -> None:
            del self._jobs[batch.id], self._tasks[batch.id]
            self._wake.set()

        task.add_done_callback(ended)

    # --- one batch

    async def _run(self, job: _Job) -> None:
        renewing = asyncio.create_task(self._renew(job))
        try:
            await self._advance(job)
        except _LostError:
            log.info("batch %s is run by another gateway now", job.batch.id)
        except CoeError as error:
            log.warning("batch %s stopped: %s", job.batch.id, error.code)
            await self._pause(job)
        except Exception as error:
            # The text of an error might quote a prompt.
            log.error("batch %s stopped: %s", job.batch.id, _place(error))
            await self._pause(job)
        finally:
            await cancel_and_wait(renewing)
            with contextlib.suppress(CoeError):
                if job.why is not Ending.LOST:
                    await self._state.release(self._owner, job.batch.id)

    async def _pause(self, job: _Job) -> None:
        """Keep a batch that failed for a while, so that it is not tried all the time."""
        if job.why is Ending.STOPPED:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_POLLS * self._poll_s):
                await asyncio.Event().wait()

    async def _renew(self, job: _Job) -> None:
        """Keep the lease, and notice that the batch was cancelled or has expired."""
        while True:
            left_s = job.batch.expires_s - self._clock()
            if left_s <= 0:
                job.end(Ending.EXPIRED)
            pause_s = min(self._config.lease_s / 4, self._poll_s)
            await asyncio.sleep(min(pause_s, left_s) if left_s > 0 else pause_s)
            try:
                batch = await self._state.renew(self._owner, job.batch.id, self._config.lease_s)
            except CoeError:
                continue  # nothing is lost by running on: each line's first result counts
            if batch is None:
                job.end(Ending.LOST)
            elif batch.status is Status.CANCELLING:
                job.end(Ending.CANCELLED)

    async def _advance(self, job: _Job) -> None:
        """Take a batch from the state that it is in to its end."""
        if job.batch.runs:
            index = await self._index(job)
            if job.batch.ended:
                return
            if index.errors:
                # The file was readable when the batch began.
                errors = tuple(index.errors)
                await self._change(job, lambda batch: batch.changed(errors=errors))
            else:
                path = self._parts.folder.path_of(job.batch.input_file_id)
                lines = InputLines(path, job.batch.endpoint, index)
                try:
                    await self._plan_and_run(job, index, lines)
                finally:
                    lines.close()
            if job.why is Ending.LOST:
                raise _LostError
            if job.batch.ended or job.why is Ending.STOPPED:
                return
        await self._finish(job)

    async def _index(self, job: _Job) -> InputIndex:
        """Read the input file; a new batch whose file is not usable fails."""
        batch = job.batch
        path = self._parts.folder.path_of(batch.input_file_id)
        try:
            index = await asyncio.to_thread(
                read_index,
                path,
                batch.endpoint,
                max_lines=self._config.max_lines,
                max_line_bytes=self._max_line_bytes,
                check=self._check_line,
            )
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise StoreUnavailableError("the folder of files is not there") from None
            index = InputIndex()
            index.errors.append(InputError("file_not_found", "the input file was deleted"))
        except OSError as error:
            raise storage_error(error) from None
        if index.errors and batch.status is Status.VALIDATING:
            await self._fail(job, index.errors)
        return index

    async def _fail(self, job: _Job, errors: list[InputError]) -> None:
        await self._change(
            job,
            lambda batch: batch.enter(Status.FAILED, self._clock(), errors=tuple(errors)),
        )

    async def _plan_and_run(self, job: _Job, index: InputIndex, lines: InputLines) -> None:
        if job.batch.status is Status.IN_PROGRESS or await self._plan(job, index, lines):
            await self._run_lines(job, index, lines)
        if job.why is Ending.EXPIRED and not job.batch.ended:
            done = await self._state.done(job.batch.id)
            await self._put_faults(job, index.faults, done)
            stored = await self._state.plan(job.batch.id)
            models = {} if stored is None else await asyncio.to_thread(_models_of, stored)
            left = (number for number in index.numbers if number not in done)
            for group in _groups(left, _PAGE):
                # The lines are read again for their names, and may be large.
                overdue = await asyncio.to_thread(_overdue, lines, group)
                await self._put_faults(job, overdue, done, models)

    async def _run_lines(self, job: _Job, index: InputIndex, lines: InputLines) -> None:
        """Run the lines that have no result yet, until all have one or the batch has to stop."""
        stored = await self._state.plan(job.batch.id)
        if stored is None:
            raise _LostError  # another gateway has ended it meanwhile
        await self._settle_earlier(job)
        done = await self._state.done(job.batch.id)
        job.cost = CostLimit(job.batch.terms.max_cost, job.batch.counts.cost)
        await self._put_faults(job, index.faults, done)
        choices = await asyncio.to_thread(load_plan, stored)
        job.left = await asyncio.to_thread(LinesLeft, choices, done)
        replanning = self._replan(job, lines, choices)
        try:
            await self._unless_ending(job, self._launch(job, lines))
        finally:
            await cancel_and_wait(replanning, *job.calls)
            # What is not delivered by then is settled by whoever goes on.
            if job.background:
                _, late = await asyncio.wait(job.background, timeout=_DELIVER_S)
                await cancel_and_wait(*late)

    def _replan(
        self, job: _Job, lines: InputLines, choices: Sequence[LineChoice]
    ) -> asyncio.Task[None] | None:
        """Begin to plan the rest of a batch again while it runs, where its cost is bounded."""
        batch = job.batch
        # A part of the best quality is reached at the least cost by the first plan alone.
        if batch.terms.max_cost is None or batch.terms.quality is not None:
            return None

        async def store(plan: bytes) -> None:
            with contextlib.suppress(_LostError):
                await self._change(
                    job,
                    lambda batch: batch if batch.sealed or batch.ended else batch.changed(),
                    plan,
                )

        job.replanning = BatchReplanning(
            ReplannedBatch(
                batch.id,
                batch.endpoint,
                batch.terms,
                lines,
                lambda: self._parts.identify(batch.tenant, batch.key),
                lambda: job.cost.spent,
                lambda: batch.expires_s - self._clock(),
                store,
            ),
            self._parts.planner,
            self._state,
            job.left,
            choices,
            job.basis,
        )
        return asyncio.create_task(job.replanning.run())

    async def _plan(self, job: _Job, index: InputIndex, lines: InputLines) -> bool:
        """Plan a batch; return whether its lines can run."""
        tenant = await self._tenant(job)
        if tenant is None:
            return False
        try:
            plan = await self._unless_ending(
                job,
                self._parts.planner.plan(job.batch.endpoint, lines, job.batch.terms, tenant),
            )
        except InvalidRequestError as error:
            await self._fail(job, [InputError(error.code, error.message, param=error.param)])
            return False
        if plan is None:
            if job.why is Ending.EXPIRED:
                await self._change(job, lambda batch: batch.changed(total=index.total))
            return False
        job.basis = plan.basis
        planned = (plan.quality, plan.cost, plan.seconds)
        await self._change(
            job,
            lambda batch: batch.enter(
                Status.IN_PROGRESS, self._clock(), total=index.total, planned=planned
            ),
            await asyncio.to_thread(dump_plan, plan.choices),
        )
        return job.batch.status is Status.IN_PROGRESS

    async def _unless_ending(self, job: _Job, work: Coroutine[Any, Any, T]) -> T | None:
        """Do work until the batch has to stop; then return None."""
        working = asyncio.create_task(work)
        ending = asyncio.create_task(job.ending.wait())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            await cancel_and_wait(working, ending)

    async def _tenant(self, job: _Job) -> Tenant | None:
        """The tenant of a batch; None where it has to stop, or failed because its key is gone."""
        while not job.ending.is_set():
            try:
                return self._parts.identify(job.batch.tenant, job.batch.key)
            except UnavailableError:
                await asyncio.sleep(_RETRY_S)
            except CoeError as error:
                await self._fail(job, [InputError(error.code, error.message)])
                return None
        return None

    async def _put_faults(
        self,
        job: _Job,
        faults: Iterable[LineFault],
        done: set[int],
        models: Mapping[int, str] | None = None,
    ) -> None:
        """Store the errors of lines that are not run.

        Args:
            job: The batch.
            faults: The errors.
            done: The lines that have a result.
            models: By line, the expert or recipe of its plan; None where the lines have none.
        """
        batch_id, shares = job.batch.id, job.batch.shares
        planned = models or {}
        results = (
            replace(
                fault_of(
                    fault.number,
                    fault.custom_id,
                    request_id(batch_id, fault.number),
                    fault.code,
                    fault.message,
                ),
                model=counted_as(planned[fault.number], shares)
                if fault.number in planned
                else None,
            )
            for fault in faults
            if fault.number not in done
        )
        for group in _groups(results, _PAGE):
            for _ in await self._state.put_results(batch_id, group):
                self._parts.counted("failed")

    async def _launch(self, job: _Job, lines: InputLines) -> None:
        """Start line after line, and wait for the last.

        The lines of one model start in the plan's order. Those of a later model may start before,
        where the pace finds its expert resident and the earlier one's busy.

        Args:
            job: The batch.
            lines: Its lines.
        """
        failures: list[BaseException] = []
        while (left := job.left.models) and not failures:
            # An expert that can't be asked now must not hold up the lines of others.
            models = [model for model in left if job.waiting[model] < _MOST_WAITING]
            if not models:
                await asyncio.sleep(_LOOK_S)
                continue
            await job.places.acquire()
            model = await self._parts.pace.turn(models)
            turn = _Turn(job, self._parts.pace, model)
            if failures:
                turn.end()
                break
            choice = job.left.take(model)
            if choice is None:  # the plan has changed meanwhile
                turn.end()
                continue

            def ended(
                task: asyncio.Task[None], turn: _Turn = turn, choice: LineChoice = choice
            ) -> None:
                job.calls.discard(task)
                job.left.ended(choice)
                turn.end()
                if not task.cancelled() and (error := task.exception()) is not None:
                    failures.append(error)

            task = asyncio.create_task(self._line(job, lines, choice, turn))
            job.calls.add(task)
            task.add_done_callback(ended)
        # Other lines may wait for hours.
        while job.calls and not failures:
            await asyncio.wait(set(job.calls), return_when=asyncio.FIRST_COMPLETED)
        if failures:
            raise failures[0]

    async def _line(self, job: _Job, lines: InputLines, choice: LineChoice, turn: _Turn) -> None:
        """Try a line until it has a result."""
        batch = job.batch
        name = request_id(batch.id, choice.line)
        model = counted_as(choice.model, batch.shares)
        # A line may have megabytes.
        line = await asyncio.to_thread(lines.numbered, choice.line)
        try:
            tries = failures = raised = 0
            may_cost = await self._reserve(job, choice, turn)
            while True:
                if may_cost is None:
                    message = f"the batch has used its `max_cost` of {batch.terms.max_cost:g}"
                    fault = fault_of(line.number, line.custom_id, name, "max_cost_reached", message)
                    await self._put(job, replace(fault, model=model), [])
                    return
                tries += 1
                reply, behalf = await self._try(job, choice, line.body, name, may_cost)
                settlements = behalf.settlements
                least = least_cost(reply) if raised < MOST_FAILURES else None
                if least is not None and least > may_cost:
                    # The plan did not know it, as where the line is routed anew.
                    raised += 1
                    self._later(job, self._release(settlements))
                    job.cost.give_back(choice.line)
                    may_cost = await self._reserve(job, choice, turn, least)
                    continue
                after = after_reply(
                    reply.status,
                    waits=reply.retry_after_s is not None,
                    failures=failures,
                    own_deadline=has_deadline(line.body),
                    answered=behalf.used.completion_tokens > 0,
                )
                if after is After.FINISHED:
                    break
                failures += after is After.TRY_AGAIN
                self._later(job, self._release(settlements))
                self._parts.counted("retried")
                # Its tenant's limit may be reached for hours, and other tenants' is not.
                async with turn.paused():
                    await asyncio.sleep(wait_s(tries, reply.retry_after_s, random.random()))
            stored = dumps(settlements) if settlements else None
            result = result_of(line.number, line.custom_id, name, reply, stored)
            result = with_used(result, behalf.used)
            await self._put(job, replace(result, model=model), settlements)
            if job.replanning is not None and not result.failed:
                job.replanning.finished(choice, result.cost)
        finally:
            job.cost.give_back(choice.line)

    @staticmethod
    async def _reserve(
        job: _Job, choice: LineChoice, turn: _Turn, least: float = 0.0
    ) -> float | None:
        """Reserve a part of the batch's `max_cost` for a line, no less than `least`.

        Returns:
            The most that the line may cost, infinite without `max_cost`; None where too little is
            left for what is expected of it.
        """
        least = max(least, choice.least)
        while (may_cost := job.cost.reserve(choice.line, choice.cost, least)) is None:
            if job.cost.is_final:
                return None
            # Lines under way give back what they don't use of theirs, perhaps in hours.
            async with turn.paused():
                await asyncio.sleep(_RESERVE_S)
        return may_cost

    async def _try(
        self, job: _Job, choice: LineChoice, body: dict[str, Any], name: str, may_cost: float
    ) -> tuple[LineReply, OnBehalf[Settlement]]:
        """Make a line's request once, in a place of this gateway, for `may_cost` at most.

        Returns:
            The reply, and what settles its claims.
        """
        batch, reply = job.batch, LineReply()
        async with self._slots:
            try:
                tenant = self._parts.identify(batch.tenant, batch.key)
            except CoeError as error:
                reply.refuse(error)
                return reply, OnBehalf(NOBODY)
            named = body.get("model", "auto")
            behalf = OnBehalf[Settlement](tenant, named if isinstance(named, str) else None)
            model = self._parts.model_of(named, choice.model, tenant)
            # The batch's own end stops its lines, so that it bounds no choice of an expert.
            call = LineCall(
                batch.endpoint,
                {**body, "model": model},
                name,
                self._config.line_timeout_s,
                may_cost,
            )
            try:
                await call.run(self._parts.answer, behalf, reply.send)
            except asyncio.CancelledError:
                # What was generated is paid for only where the line never runs again.
                pays = job.why in (Ending.CANCELLED, Ending.EXPIRED)
                self._later(job, self._settle_cancelled(behalf, pays=pays))
                raise
            except orjson.JSONEncodeError:
                reply.refuse(InvalidRequestError("the body is nested too deep"))
            except Exception as error:
                log.error("a line of batch %s failed: %s", batch.id, _place(error))
                reply.status = 0
        return reply, behalf

    async def _settle_cancelled(self, behalf: OnBehalf[Settlement], *, pays: bool) -> None:
        """Settle a request that was cancelled, once its tokens are counted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DELIVER_S):
                await behalf.ended.wait()
        for settlement in behalf.settlements:
            await _deliver(self._parts.store, settlement if pays else settlement.free())

    # --- results and charges

    async def _put(self, job: _Job, result: LineResult, settlements: list[Settlement]) -> None:
        """Store a line's result, and charge it where it counts.

        Raises:
            _LostError: Another gateway runs or ends the batch now.
        """
        # Whoever runs a batch after this gateway goes by what had been spent then.
        owner = None if job.batch.terms.max_cost is None else self._owner
        while True:
            try:
                added = await self._state.put_results(job.batch.id, [result], owner)
                kept = result.body if added else await self._kept(job.batch.id, result.line)
                break
            except (StoreUnavailableError, StorageFullError) as error:
                log.warning("a result of batch %s can't be stored: %s", job.batch.id, error.code)
                await asyncio.sleep(_RETRY_S)
        # An earlier try to store it may have worked, although it raised.
        if kept != result.body:
            self._later(job, self._release(settlements))
            if kept is None:
                raise _LostError
            return
        job.cost.spent += result.cost
        self._parts.counted("failed" if result.failed else "completed")
        if settlements:
            self._later(job, self._charge(job.batch.id, result.line, settlements))

    async def _kept(self, batch_id: str, line: int) -> bytes | None:
        """The result that the state has of a line."""
        for failed in (False, True):
            for number, body in await self._state.results(
                batch_id, failed=failed, after=line - 1, limit=1
            ):
                if number == line:
                    return body
        return None

    async def _charge(self, batch_id: str, line: int, settlements: list[Settlement]) -> None:
        """Charge a line's result once, and forget its settlements then."""

        async def charge() -> None:
            for number, settlement in enumerate(settlements):
                item = WorkItem(batch_id, f"{line}.{number}")
                await self._parts.store.settle_once(item, settlement)
            await self._state.mark_settled(batch_id, line)

        await _until_done(charge)

    async def _settle_earlier(self, job: _Job) -> None:
        """Charge results that were stored before, by a process that ended meanwhile."""
        for line, stored in await self._state.unsettled(job.batch.id):
            await self._charge(job.batch.id, line, loads(stored))

    async def _release(self, settlements: list[Settlement]) -> None:
        for settlement in settlements:
            await _deliver(self._parts.store, settlement.free())

    def _later(self, job: _Job, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        job.background.add(task)
        task.add_done_callback(job.background.discard)

    # --- the end

    async def _finish(self, job: _Job) -> None:
        """Seal a batch, write its output files, and enter its last state."""

        def seal(batch: BatchRecord) -> BatchRecord:
            if batch.sealed or batch.ended:
                return batch
            if batch.status is Status.CANCELLING:
                return batch.changed(sealed=True)
            return batch.enter(
                Status.FINALIZING, self._clock(), sealed=True, expired=job.why is Ending.EXPIRED
            )

        await self._change(job, seal)
        if job.batch.ended:
            return
        await self._settle_earlier(job)
        files = {}
        for failed, attribute in ((False, "output_file_id"), (True, "error_file_id")):
            if file_id := await self._write_output(job.batch, failed=failed):
                files[attribute] = file_id
        await _until_done(lambda: self._parts.store.close_group(job.batch.id))

        def end(batch: BatchRecord) -> BatchRecord:
            if batch.ended:
                return batch
            status = Status.EXPIRED if batch.expired else Status.COMPLETED
            if batch.status is Status.CANCELLING:
                status = Status.CANCELLED
            return batch.enter(status, self._clock(), **files)

        await self._change(job, end)

    async def _write_output(self, batch: BatchRecord, *, failed: bool) -> str | None:
        partial = await asyncio.to_thread(self._parts.folder.begin)
        try:
            after = -1
            while rows := await self._state.results(
                batch.id, failed=failed, after=after, limit=_PAGE
            ):
                await asyncio.to_thread(partial.write, b"".join(body + b"\n" for _, body in rows))
                after = rows[-1][0]
            if not partial.size:
                return None
            file_id = output_id(batch.id, failed=failed)
            await asyncio.to_thread(partial.keep, file_id)
        finally:
            await asyncio.to_thread(partial.discard)
        now_s = int(self._clock())
        lives_s = batch.output_lives_s or int(self._config.retention_days * 86_400)
        name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
        await self._state.add_file(
            FileRecord(
                file_id, batch.tenant, OUTPUT_PURPOSE, name, partial.size, now_s, now_s + lives_s
            ),
            None,
        )
        return file_id

    async def _change(
        self,
        job: _Job,
        change: Callable[[BatchRecord], BatchRecord],
        plan: bytes | None = None,
    ) -> None:
        """Change a batch, again where others change it at the same time.

        A change that its state does not allow any more, because it was cancelled, is left out. With
        a plan the batch gets the plan's shares.

        Raises:
            _LostError: The batch is gone.
        """
        shares = None if plan is None else await asyncio.to_thread(_shares_of, plan)
        while True:
            current = await self._state.batch(job.batch.id)
            if current is None:
                raise _LostError
            job.batch = current
            try:
                changed = change(current)
            except ValueError:
                return
            if changed is current:
                return
            if shares is not None:
                changed = replace(changed, shares=shares)
            if await self._state.replace(changed, plan):
                job.batch = changed
                return


class _LostError(Exception):
    """Another gateway has the batch now, or it is gone."""


async def _until_done(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Repeat work that may be repeated, until the stores take it."""
    pause_s = _RETRY_S
    while True:
        try:
            return await work()
        except (UnavailableError, StorageFullError) as error:
            log.warning("a charge can't be delivered yet: %s", error.code)
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_RETRY_S, 2 * pause_s)


async def _deliver(store: Store, settlement: Settlement) -> None:
    try:
        await store.settle(settlement.granted, settlement.used, settlement.note)
    except CoeError as error:
        log.error("settlement of a line failed: %s", error.code)


def _overdue(lines: InputLines, numbers: Sequence[int]) -> list[LineFault]:
    return [
        LineFault(number, lines.numbered(number).custom_id, "batch_expired", _EXPIRED)
        for number in numbers
    ]


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _models_of(plan: bytes) -> dict[int, str]:
    """By line, the expert or recipe of a stored plan."""
    return {line: model for line, model, *_ in orjson.loads(plan)}


def _shares_of(plan: bytes) -> dict[str, PlannedShare]:
    """Each model's share of a stored plan."""
    return shares_of(LineChoice(*given) for given in orjson.loads(plan))


def _place(error: BaseException) -> str:
    """An error's class and where it was raised, without its text, which might quote a prompt."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return type(error).__name__
    code = traceback.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_qualname}, line {traceback.tb_lineno}"
