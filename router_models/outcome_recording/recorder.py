"""Asks every expert every prompt, scores the answers, and keeps the rows."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from router_models.outcome_reader import OutcomeError
from router_models.outcome_recording import judge_prompts as judging
from router_models.outcome_recording.answer_check_kinds import JudgeCheck, UnitTestsCheck
from router_models.outcome_recording.answer_scoring import Score, ScoringError, score_text, stated
from router_models.outcome_recording.cost_bound import (
    CostBound,
    CostBoundReachedError,
    WorstCase,
)
from router_models.outcome_recording.endpoint_client import CallError, Endpoint, Reply, backoff
from router_models.outcome_recording.outcome_file import OutcomeFile, Row
from router_models.outcome_recording.sandboxed_unit_tests import score_code
from router_models.outcome_recording.task_reader import Task
from service.broker.token_prices import Price, cost

# Prompts that one expert is asked before the next expert's turn. Experts that share memory are
# swapped once in so many prompts, and a recording that stops early has rows of all experts.
_BLOCK = 32
_SANDBOXES = 2
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RecorderSettings:
    """How experts are asked.

    Attributes:
        experts: The experts.
        temperature: The temperature of sampling.
        max_tokens: Longest answer, in tokens.
        concurrency: Most prompts in flight.
        attempts: How often a call is tried before its error is recorded.
        max_cost: The most that the whole file may cost, in units of price.
        judge: The expert that judges answers to prompts with a judge's check.
        recipes: Which of `experts` are recipes of several experts.
    """

    experts: tuple[str, ...]
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 8
    attempts: int = 5
    max_cost: float = math.inf
    judge: str | None = None
    recipes: frozenset[str] = frozenset()


@dataclass(slots=True)
class Progress:
    """How far a recording is.

    Attributes:
        total: Pairs of prompts and experts, those of earlier recordings included.
        done: How many of them have an outcome.
        failed: Pairs whose last attempt failed in this recording.
        tokens: Tokens of prompts and answers in this recording.
        cost: Cost of the whole file, in units of price.
        stopped: Why the recording stopped before its end; None where it did not.
    """

    total: int
    done: int
    failed: int = 0
    tokens: int = 0
    cost: float = 0.0
    stopped: str | None = None
    errors: dict[str, int] = field(default_factory=dict)


class _StoppedError(Exception):
    """No other call can succeed."""


class Recorder:
    """Records outcomes into a file.

    Args:
        endpoint: Where the experts are asked.
        file: The open file.
        tasks: The prompts.
        settings: How experts are asked.
        prices: Each expert's and the judge's price, where they are known.
        jitter: Draws how long to wait between attempts.
        say: Takes the progress after each pair.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        file: OutcomeFile,
        tasks: Sequence[Task],
        settings: RecorderSettings,
        *,
        prices: Mapping[str, Price],
        jitter: random.Random,
        say: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._endpoint = endpoint
        self._file = file
        self._tasks = tasks
        self._settings = settings
        self._prices = prices
        self._jitter = jitter
        self._say = say
        self._worst = WorstCase(prices)
        self._check_rows()
        self._bound = CostBound(settings.max_cost, spent_of(file.rows.values()))
        self._sandboxes = asyncio.Semaphore(_SANDBOXES)
        self._unreached = 0
        pairs = len(tasks) * len(settings.experts)
        self.progress = Progress(pairs, pairs - len(self._left()), cost=self._bound.spent)

    def _check_rows(self) -> None:
        """Drop rows whose check has changed. Refuse those of other prompts or settings.

        Raises:
            OutcomeError: The file can't be continued with these prompts and settings.
        """
        changed = []
        for task in self._tasks:
            row = self._file.rows.get(task.id)
            if row is None:
                continue
            if row["prompt"] != task.text:
                raise OutcomeError(
                    f"{self._file.path}: the row {task.id!r} has another prompt; take another "
                    "file, or give the prompt another id"
                )
            if row.get("check") != _digest(task):
                changed.append(task.id)
            elif row.get("asked") != self._asked(task):
                raise OutcomeError(
                    f"{self._file.path}: the row {task.id!r} was recorded with other settings "
                    f"({json.dumps(row.get('asked'))}, not {json.dumps(self._asked(task))}); take "
                    "another file, or the same settings"
                )
        if changed:
            self._file.drop(changed)

    def _asked(self, task: Task) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "temperature": self._settings.temperature,
            "max_tokens": self._max_tokens(task),
        }
        if isinstance(task.check, JudgeCheck):
            asked["judge"] = self._settings.judge
        return asked

    def _max_tokens(self, task: Task) -> int:
        return min(self._settings.max_tokens, task.max_tokens or self._settings.max_tokens)

    def _left(self) -> list[tuple[Task, str]]:
        """The pairs without an outcome, in blocks of prompts by expert, categories in turn."""
        groups: dict[str | None, list[Task]] = defaultdict(list)
        for task in self._tasks:
            groups[task.category].append(task)
        mixed = [task for task in chain(*zip_longest(*groups.values())) if task is not None]
        return [
            (task, expert)
            for start in range(0, len(mixed), _BLOCK)
            for expert in self._settings.experts
            for task in mixed[start : start + _BLOCK]
            if expert not in self._file.rows.get(task.id, {"outcomes": ()})["outcomes"]
        ]

    async def run(self) -> Progress:
        """Ask what has no outcome yet, until the end or the bound on cost."""
        left = iter(self._left())
        workers = [asyncio.create_task(self._work(left)) for _ in range(self._settings.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return self.progress

    async def _work(self, left: Iterator[tuple[Task, str]]) -> None:
        for task, expert in left:
            if self.progress.stopped is not None:
                return
            try:
                await self._pair(task, expert)
            except CostBoundReachedError:
                self._stop("the next call could pass the bound on cost (--max-cost)")
            except _StoppedError as stop:
                self._stop(str(stop))
            self.progress.cost = self._bound.spent
            self._say(self.progress)

    def _stop(self, reason: str) -> None:
        self.progress.stopped = self.progress.stopped or reason

    async def _pair(self, task: Task, expert: str) -> None:
        """Ask one expert one prompt, score its answer, and write the outcome or the error."""
        bill = _Bill()
        try:
            messages = task.conversation()
            reply = await self._ask(expert, messages, self._max_tokens(task), bill)
            score = await self._score(task, reply.text, bill)
        except (CallError, ScoringError) as error:
            code = error.code if isinstance(error, CallError) else "not_scored"
            self._write(task, expert, error=_error_of(task, expert, code, error, bill, self._file))
            self.progress.failed += 1
            self.progress.errors[code] = self.progress.errors.get(code, 0) + 1
            if isinstance(error, CallError):
                self._check_end(error)
            return
        except CostBoundReachedError as error:
            if bill.total:
                # The answer was paid, and nothing is left for its judge or another attempt.
                spent = _error_of(task, expert, "max_cost", error, bill, self._file)
                self._write(task, expert, error=spent)
            raise
        outcome: dict[str, Any] = {
            "score": round(score.value, 6),
            "answer": stated(reply.text),
            "output_chars": len(reply.text),
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "reasoning_tokens": reply.reasoning_tokens,
            "cost": round(bill.answer, 9) if self._priced(expert, reply) else None,
            "seconds": round(reply.seconds, 4),
            "finish_reason": reply.finish_reason,
            # A fit makes no recipes of recipes.
            "recipe": True if expert in self._settings.recipes else None,
        }
        beside = bill.total - bill.answer
        beside += _spent_before(self._file.rows.get(task.id), expert)
        if beside > 0:
            # Of attempts that failed, and of the judge: no part of what an answer costs.
            outcome["cost_beside"] = round(beside, 9)
        self._write(task, expert, outcome={k: v for k, v in outcome.items() if v is not None})
        self.progress.done += 1

    def _priced(self, expert: str, reply: Reply) -> bool:
        return reply.cost is not None or expert in self._prices

    def _check_end(self, error: CallError) -> None:
        """Stop where no other call can succeed.

        Raises:
            _StoppedError: The key is wrong, the quota is spent, or nobody answers.
        """
        if error.final:
            raise _StoppedError(str(error))
        self._unreached = 0 if error.reached else self._unreached + 1
        if self._unreached >= max(_SHOWN, self._settings.concurrency):
            raise _StoppedError(f"{self._unreached} prompts in a row had no reply: {error}")

    def _write(
        self,
        task: Task,
        expert: str,
        *,
        outcome: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> None:
        row: Row = {"id": task.id, "prompt": task.text}
        if task.category is not None:
            row["category"] = task.category
        row |= {"check": _digest(task), "asked": self._asked(task), "outcomes": {}}
        if outcome is not None:
            row["outcomes"] = {expert: outcome}
        if error is not None:
            row["errors"] = {expert: error}
        self._file.append(row)

    async def _ask(
        self, expert: str, messages: list[dict[str, str]], max_tokens: int, bill: _Bill
    ) -> Reply:
        """Ask until there is an answer; each attempt is reserved and settled."""
        for attempt in range(1, self._settings.attempts + 1):
            worst = self._worst.of(expert, messages, max_tokens)
            await self._bound.reserve(worst)
            actual = worst  # what counts if this is cancelled: nobody knows
            try:
                reply = await self._endpoint.ask(
                    expert, messages, max_tokens=max_tokens, temperature=self._settings.temperature
                )
                actual = self._cost_of(expert, reply, worst)
                bill.answer = actual
                self._unreached = 0
                if reply.prompt_tokens is not None:
                    self._worst.seen(expert, messages, reply.prompt_tokens)
                self.progress.tokens += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
                return reply
            except CallError as error:
                actual = worst if error.charged else 0.0
                if not error.retried or attempt == self._settings.attempts:
                    raise
                wait_s = error.retry_after_s
            finally:
                bill.total += actual
                await self._bound.settle(worst, actual)
            await backoff(attempt, wait_s, self._jitter.random())
        raise AssertionError("unreachable")

    def _cost_of(self, expert: str, reply: Reply, worst: float) -> float:
        if reply.cost is not None:
            return reply.cost
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            return worst
        price = self._prices.get(expert, Price())
        return cost(price, reply.prompt_tokens, reply.completion_tokens)

    async def _score(self, task: Task, text: str, bill: _Bill) -> Score:
        match task.check:
            case UnitTestsCheck():
                async with self._sandboxes:
                    return await score_code(task.check, text)
            case JudgeCheck():
                return await self._judge(task.check, task, text, bill)
            case check:
                return await asyncio.to_thread(score_text, check, text)

    async def _judge(self, check: JudgeCheck, task: Task, text: str, bill: _Bill) -> Score:
        if not text.strip():
            return Score(0.0, "no answer")
        assert self._settings.judge is not None
        dialogue = "\n\n".join(f"{item['role']}: {item['content']}" for item in task.conversation())
        prompt = task.text if len(task.conversation()) == 1 else dialogue
        own = _Bill()
        try:
            verdicts = [
                (await self._ask(self._settings.judge, question, judging.MAX_TOKENS, own)).text
                for question in judging.questions(check, prompt, text)
            ]
        finally:
            bill.total += own.total
        return judging.score_verdicts(check, verdicts)


@dataclass(slots=True)
class _Bill:
    """What a pair has cost: the answer's call, and all attempts and the judge together."""

    answer: float = 0.0
    total: float = 0.0


def spent_of(rows: Any) -> float:
    """What all rows have cost, in units of price; failed attempts and judges included."""
    return math.fsum(
        record.get(name, 0.0)
        for row in rows
        for record in (*row["outcomes"].values(), *row.get("errors", {}).values())
        if isinstance(record, dict)
        for name in ("cost", "cost_beside")
        if isinstance(record.get(name), int | float)
    )


def _spent_before(row: Row | None, expert: str) -> float:
    """What earlier attempts of a pair have cost that ended with an error."""
    error = (row or {}).get("errors", {}).get(expert, {})
    return float(error.get("cost", 0.0))


def _error_of(
    task: Task, expert: str, code: str, error: Exception, bill: _Bill, file: OutcomeFile
) -> dict[str, Any]:
    fields: dict[str, Any] = {"code": code, "message": str(error) or code}
    spent = bill.total + _spent_before(file.rows.get(task.id), expert)
    return {**fields, "cost": round(spent, 9)} if spent else fields


def _digest(task: Task) -> str:
    """A short digest of a task's check and conversation, by which a change of them is noticed."""
    data = [task.check.model_dump(mode="json", by_alias=True), task.conversation()]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
