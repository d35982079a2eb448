"""A large batch on a simulated engine with people beside it, on a virtual clock.

The decisions are the service's own: the batch's order, its pacing, the pool's queue and the swap
planner. The engine is a model: a step takes `step_s` and a little for each running request, and
gives each of them a token; a swap takes `swap_s`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.lib.median_intervals import percentile
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.mixed.traffic_trace import Ask, trace
from service.batches.batch_pacing import BatchPacer
from service.batches.batch_planner import run_order
from service.broker.pool_state import PoolView
from service.pool.request_queue import FairQueue, Ticket
from service.pool.swap_planner import SlotView, Stay, SwapPolicy, UnitView, next_step
from service.rpc.snapshot import COALESCE_S, ExpertState, Queue, Snapshot
from service.types import BATCH, Residency, Tenant

_PEOPLE = Tenant("people")
_BATCH = Tenant("batch", priority=BATCH)
_CAPACITY = 16
_STEP_S, _EACH_S, _READ_S = 0.020, 0.0005, 0.0001
_SWAP_S = 0.05
_LOOK_S = 0.02
_TIMES, _BUSY = 1.2, 0.95
_EXPERTS = 16
_PER_S = 1.0


@dataclass(eq=False, slots=True)
class _Run:
    ticket: Ticket
    ask: Ask
    left: int


class BatchBesidePeople:
    """One slot, its traffic, and a batch. `run` plays it to the end."""

    def __init__(self, experts: Sequence[str], people: Sequence[Ask], lines: Sequence[Ask]) -> None:
        self._experts = experts
        self._people = deque(people)
        self._left: dict[str, deque[Ask]] = {}
        for line in lines:
            self._left.setdefault(line.expert, deque()).append(line)
        self._queue = FairQueue(experts, capacity=_CAPACITY, max_waiting=10**9)
        self._asks: dict[Ticket, Ask] = {}
        self._running: list[_Run] = []
        self._now_s = 0.0
        self._resident = experts[0]
        self._since_s = 0.0
        self._people_s: dict[str, float] = {}
        self._closing = False
        self._policy = SwapPolicy()
        self._view: list[PoolView] = []
        self._seen_s = -1.0
        self._pacer = BatchPacer(self._views, dict, 10**6, lambda: self._now_s)
        # By arrival, the time to the whole answer.
        self.took: list[tuple[float, float]] = []
        self.busy_s = self.batch_end_s = self.batch_busy_s = 0.0
        self.swaps = self.lines_done = 0
        self.total = sum(map(len, self._left.values()))

    def _views(self) -> list[PoolView]:
        """What gateways know: snapshots come some time after the changes."""
        if self._now_s - self._seen_s >= COALESCE_S:
            self._seen_s = self._now_s
            queues = {}
            for name in self._experts:
                waiting, running = self._queue.counts(name)
                if waiting or running:
                    queues[name] = Queue(
                        waiting, running, waiting + running, 0, *self._queue.batch_counts(name)
                    )
            states = {
                name: ExpertState(
                    Residency.DEVICE if name == self._resident else Residency.HOST, swap_s=_SWAP_S
                )
                for name in self._experts
            }
            capacity = dict.fromkeys(self._experts, _CAPACITY)
            snapshot = Snapshot("b", "cpu", experts=states, queues=queues, capacity=capacity)
            self._view = [PoolView("b", snapshot, 0.0, {})]
        return self._view

    def run(self, until_s: float) -> None:
        """Play until everybody has been answered, or until a time with the batch's lines left."""
        looks_s = 0.0
        while self._people or self._left or self._running or self._queue.total:
            if self._now_s > until_s:
                return
            while self._people and self._people[0].at_s <= self._now_s:
                self._offer(self._people.popleft(), _PEOPLE)
            if self._left and self._now_s >= looks_s:
                looks_s = self._now_s + _LOOK_S
                while self._left and (model := self._pacer.next_model(tuple(self._left))):
                    self._pacer._own[model] += 1
                    self._offer(self._left[model].popleft(), _BATCH)
                    if not self._left[model]:
                        del self._left[model]
            if self._swapped():
                continue
            self._step()

    def _offer(self, ask: Ask, tenant: Tenant) -> None:
        ticket = Ticket(ask.expert, self._now_s, ask.prompt_tokens, tenant)
        ready = ask.expert == self._resident and not self._closing
        self._queue.offer(ticket, ready=ready)
        self._asks[ticket] = ask
        if tenant is _PEOPLE:
            self._people_s[ask.expert] = self._now_s
        if ticket.running:
            self._running.append(_Run(ticket, ask, ask.tokens))

    def _swapped(self) -> bool:
        """Let the planner decide; whether it has swapped."""
        resident = self._resident
        views = []
        for name in self._experts:
            waiting = self._queue.waiting_for(name)
            if not waiting and name != resident:
                continue
            views.append(
                UnitView(
                    name,
                    Residency.DEVICE if name == resident else Residency.HOST,
                    len(waiting),
                    sum(t.tokens for t in waiting),
                    max((self._now_s - t.arrived_s for t in waiting), default=0.0),
                    1.0,
                    1,
                    1.0,
                    0.0 if name == resident else _SWAP_S,
                    False,
                    batch_waiting=sum(t.of_batch for t in waiting),
                )
            )
        own, running = self._queue.counts(resident)
        batch_waiting, batch_running = self._queue.batch_counts(resident)
        slot = SlotView(
            resident,
            self._now_s - self._since_s,
            running,
            own,
            0.3,
            self._closing,
            batch_running,
            batch_waiting,
            self._now_s - self._people_s.get(resident, -1e9),
        )
        step = next_step(slot, views, self._policy)
        if isinstance(step, Stay):
            self._closing = False
        elif running:
            self._closing = True
        else:
            self._now_s += _SWAP_S
            self.busy_s += _SWAP_S
            self._resident, self._since_s, self._closing = step.unit, self._now_s, False
            self.swaps += 1
            return True
        return False

    def _step(self) -> None:
        read = 0
        for ticket in [] if self._closing else self._queue.grant({self._resident}):
            ask = self._asks[ticket]
            self._running.append(_Run(ticket, ask, ask.tokens))
            read += ask.prompt_tokens
        if not self._running:
            soon = [self._now_s + _LOOK_S] if self._left or self._queue.total else []
            soon += [self._people[0].at_s] if self._people else []
            self._now_s = max(self._now_s + 1e-6, min(soon, default=self._now_s + _LOOK_S))
            return
        took_s = _STEP_S + _EACH_S * len(self._running) + _READ_S * read
        self._now_s += took_s
        self.busy_s += took_s
        going = []
        for one in self._running:
            one.left -= 1
            if one.left:
                going.append(one)
                continue
            self._queue.close(one.ticket, self._now_s)
            del self._asks[one.ticket]
            if one.ticket.of_batch:
                self.lines_done += 1
                self._pacer.ended(one.ask.expert)
                if self.lines_done == self.total:
                    self.batch_end_s, self.batch_busy_s = self._now_s, self.busy_s
            else:
                self.took.append((one.ask.at_s, self._now_s - one.ask.at_s))
        self._running = going


def _lines(experts: Sequence[str], count: int) -> list[Ask]:
    """A batch's lines in the planner's order."""
    chance = random.Random(5)
    lines = [
        Ask(0.0, chance.choice(experts), chance.randint(32, 128), chance.randint(16, 96))
        for _ in range(count)
    ]
    first = np.array([experts.index(line.expert) for line in lines])
    load_s = np.full((1, len(experts)), _SWAP_S)
    load_s[0, 0] = 0.0
    work_s = np.array([line.tokens * _STEP_S / _CAPACITY for line in lines])
    prompts = [f"{i % 97}" for i in range(count)]
    order = run_order(first, work_s, prompts, load_s, np.arange(len(experts)))
    return [lines[i] for i in order.tolist()]


def measure(report: Report, *, lines: int) -> None:
    """Play people alone and beside a batch."""
    experts = [f"e{i}" for i in range(_EXPERTS)]
    batch = _lines(experts, lines)
    for_s = lines * 56 * (_STEP_S + _EACH_S * _CAPACITY) / _CAPACITY * 3
    asks = trace(experts[:4], per_s=_PER_S, for_s=for_s, seed=3, tokens=(32, 128))
    alone = BatchBesidePeople(experts, asks, [])
    alone.run(for_s)
    beside = BatchBesidePeople(experts, asks, batch)
    beside.run(10 * for_s)
    ended_s = beside.batch_end_s
    # Only people who came while the batch ran count, in both runs.
    before = [took for at_s, took in alone.took if at_s < ended_s]
    after = [took for at_s, took in beside.took if at_s < ended_s]
    p95 = percentile(before, 95), percentile(after, 95)
    busy = beside.batch_busy_s / max(ended_s, 1e-9)
    times = p95[1] / p95[0]
    table = Table(
        f"{lines} lines for {_EXPERTS} experts on one engine, {_PER_S:g} requests/s of people for "
        "four of them",
        ("", "p50 of people, s", "p95, s", "swaps", "engine busy", "batch took, s"),
    )
    table.rows += [
        (
            "people alone",
            f"{percentile(before, 50):.2f}",
            f"{p95[0]:.2f}",
            str(alone.swaps),
            "",
            "",
        ),
        (
            "beside the batch",
            f"{percentile(after, 50):.2f}",
            f"{p95[1]:.2f}",
            str(beside.swaps),
            f"{100 * busy:.1f} %",
            f"{ended_s:.0f}",
        ),
    ]
    report.tables.append(table)
    report.reach += [
        TargetCheck("times the p95 of people, at most", _TIMES, round(times, 3), times <= _TIMES),
        TargetCheck(
            "engine steps or swaps while lines are left, share, at least",
            _BUSY,
            round(busy, 4),
            busy >= _BUSY,
        ),
        TargetCheck("lines answered once", lines, beside.lines_done, beside.lines_done == lines),
    ]
    report.facts |= {"times_p95": times, "busy": busy, "batch_s": ended_s}
