"""Plans the rest of a batch again while it runs, by what its lines have cost so far.

A plan within `max_cost` expects what each line costs. Answers come out longer or shorter. A plan
that is kept to its end then leaves money over, or spends it before its last lines. So the lines
that have not started are planned again: with what is left of `max_cost`, and with the costs that
the finished lines teach. The planner works in a thread, and rests after each plan for many times as
long as that took.

The new plan is stored. Who goes on with the batch after a restart estimates its lines anew, and
reads from their results what they cost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from service.batches.batch_state import BatchState
from service.batches.batch_types import (
    BatchLine,
    BatchPlan,
    BatchTerms,
    FinishedLine,
    LineChoice,
    PlansBatches,
)
from service.batches.lines_left import LinesLeft, by_model
from service.errors import CoeError
from service.types import Tenant

log = logging.getLogger("coe.batches")

# The next plan is due when this part of the lines that are left has results, and so many at least.
_PART, _FEWEST = 16, 4
# The rest after a plan, in times of what it took.
_REST = 20.0
# Finished lines whose costs are remembered, the newest ones.
_REMEMBERED = 4096
_PAGE = 256


@dataclass(frozen=True, slots=True)
class ReplannedBatch:
    """A batch as its replanning sees it.

    Attributes:
        id: Its id.
        endpoint: The endpoint of its lines.
        terms: Its terms, with a `max_cost`.
        lines: Its lines.
        tenant: Returns the tenant whose batch it is. Raises CoeError.
        spent: Returns the units of cost of its results so far.
        left_s: Returns the seconds until it expires.
        store: Stores a new plan.
    """

    id: str
    endpoint: str
    terms: BatchTerms
    lines: Sequence[BatchLine]
    tenant: Callable[[], Tenant]
    spent: Callable[[], float]
    left_s: Callable[[], float]
    store: Callable[[bytes], Awaitable[None]]


class BatchReplanning:
    """Plans the rest of one batch again and again.

    Args:
        batch: The batch.
        planner: Plans it.
        state: Has its results.
        left: Its lines that have not started.
        choices: Its plan so far, with all lines.
        basis: What the planner expects of its lines; None after a restart.
    """

    def __init__(
        self,
        batch: ReplannedBatch,
        planner: PlansBatches,
        state: BatchState,
        left: LinesLeft,
        choices: Sequence[LineChoice],
        basis: object | None,
    ) -> None:
        self._batch = batch
        self._planner = planner
        self._state = state
        self._left = left
        self._choices = {choice.line: choice for choice in choices}
        self._basis = basis
        self._finished: deque[FinishedLine] = deque(maxlen=_REMEMBERED)
        self._new = 0
        self._next = lines_until_next(len(self._choices))
        self._due = asyncio.Event()

    def finished(self, choice: LineChoice, cost: float) -> None:
        """Learn what a line's answer has cost, in units of cost."""
        self._finished.append(FinishedLine(choice.line, choice.model, cost))
        self._new += 1
        if self._new >= self._next:
            self._due.set()

    async def run(self) -> None:
        """Plan again whenever enough lines have finished, until it is cancelled."""
        while True:
            await self._due.wait()
            began_s = time.monotonic()
            try:
                if not await self._again():
                    return
            except CoeError as error:
                log.info("batch %s keeps its plan: %s", self._batch.id, error.code)
            except Exception as error:
                # The text of an error might quote a prompt.
                log.error("batch %s keeps its plan: %s", self._batch.id, type(error).__name__)
            self._due.clear()
            self._new = 0
            await asyncio.sleep(_REST * (time.monotonic() - began_s))

    async def _again(self) -> bool:
        """Plan once more. Return whether there is anything left to plan."""
        batch = self._batch
        assert batch.terms.max_cost is not None
        if self._basis is None:
            self._basis = await self._planner.basis(batch.endpoint, batch.lines, batch.tenant())
            if self._basis is None:
                return False
            await self._read_results()
        before = self._left.snapshot()
        if not before:
            return False
        max_cost = batch.terms.max_cost - batch.spent() - self._left.under_way_cost
        if max_cost <= 0:
            return True
        terms = replace(batch.terms, max_cost=max_cost, deadline_s=max(1.0, batch.left_s()))
        plan = await self._planner.replan(self._basis, terms, before, tuple(self._finished))
        if plan is None:
            return True
        left = await asyncio.to_thread(_left_by, plan, before)
        planned = [list(lines) for lines in left.values()]
        started = self._left.exchange(left)
        self._choices = await asyncio.to_thread(_merged, self._choices, planned, started)
        self._next = lines_until_next(sum(len(lines) for lines in before))
        await batch.store(await asyncio.to_thread(dump_plan, self._choices.values()))
        return True

    async def _read_results(self) -> None:
        """Learn from the newest results of whoever has run the batch before."""
        after = -1
        earlier: deque[FinishedLine] = deque(maxlen=_REMEMBERED)
        while rows := await self._state.results(
            self._batch.id, failed=False, after=after, limit=_PAGE
        ):
            costs = await asyncio.to_thread(_costs, rows)
            for line, cost in costs:
                if line in self._choices:
                    earlier.append(FinishedLine(line, self._choices[line].model, cost))
            after = rows[-1][0]
        known = {found.line for found in self._finished}
        before = [found for found in earlier if found.line not in known]
        self._finished = deque([*before, *self._finished], maxlen=_REMEMBERED)


def _left_by(plan: BatchPlan, before: list[list[LineChoice]]) -> dict[str, deque[LineChoice]]:
    """By model the lines of a snapshot, with the choices of a new plan.

    Models keep their order, so that an expert that is being served goes on. Those that are new come
    last, in the order of the new plan.
    """
    planned = by_model(plan.choices)
    covered = {choice.line for choice in plan.choices}
    left: dict[str, deque[LineChoice]] = {}
    for lines in before:
        model = lines[0].model
        kept = deque(choice for choice in lines if choice.line not in covered)
        if joined := kept + planned.pop(model, deque()):
            left[model] = joined
    left.update(planned)
    return left


def _merged(
    choices: dict[int, LineChoice], planned: list[list[LineChoice]], started: set[int]
) -> dict[int, LineChoice]:
    """All choices, in the order in which lines have run and will run."""
    new = {c.line: c for lines in planned for c in lines if c.line not in started}
    return {line: choice for line, choice in choices.items() if line not in new} | new


def dump_plan(choices: Iterable[LineChoice]) -> bytes:
    """Serialize a plan."""
    return orjson.dumps([[c.line, c.model, c.quality, c.cost, c.tokens, c.least] for c in choices])


def load_plan(plan: bytes) -> tuple[LineChoice, ...]:
    """Parse what `dump_plan` wrote."""
    return tuple(LineChoice(*given) for given in orjson.loads(plan))


def lines_until_next(lines: int) -> int:
    """How many lines finish before the next plan, where so many are left."""
    return max(_FEWEST, lines // _PART)


def _costs(rows: Sequence[tuple[int, bytes]]) -> list[tuple[int, float]]:
    """Lines and what their results say that they cost."""
    found = []
    for line, body in rows:
        cost: Any = orjson.loads(body)
        for key in ("response", "body", "usage", "coe", "cost"):
            cost = cost.get(key) if isinstance(cost, dict) else None
        if isinstance(cost, (int, float)):
            found.append((line, float(cost)))
    return found
