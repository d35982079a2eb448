"""Shadow evaluation: after a reply, other experts answer the same request and are compared.

It is for tenants that opted in. It happens after the reply and in the class `low`, from a bounded
queue that drops what does not fit. Every call reserves the most that it may cost in an account of
its own, so that its budget is never passed. Nothing of it counts for the tenant, and nothing of it
is cached or logged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import orjson

from service.broker.answer_agreement import final_answer
from service.broker.judge_prompts import MAX_TOKENS, Messages, both_orders, preference, trimmed
from service.broker.shadow_scores import scores_by_agreement, scores_by_preference
from service.broker.token_prices import MICRO, cost, micro, prices_of
from service.config import Config, ShadowConfig
from service.engine.engine_interface import Send
from service.errors import CoeError
from service.gateway.dispatch.internal_expert_calls import SideAnswer
from service.gateway.request.conversation_text import conversation_text
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.media_tokens import NOTHING
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.thinking_terms import NO_TERMS
from service.gateway.request.thinking_ways import ThinkingWays
from service.gateway.request_record import RequestRecord
from service.gateway.routing.route_plan import RoutePlan
from service.gateway.shadow.reply_text import ReplyText, whole_text
from service.store.limit_windows import DAY, MONTH
from service.store.outcome_folder import OutcomeFolder, default_folder
from service.store.store_interface import Account, Charge, Refused, Store, StoreClaim
from service.task_cancellation import cancel_and_wait
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry
from service.types import Tenant

log = logging.getLogger("coe.shadow")

# What a chat template may add to a prompt, beyond its bytes; more is believed once it was seen.
_TEMPLATE_TOKENS = 512
_EXPIRE_EVERY_S = 3600.0


class ShadowResult(StrEnum):
    """How the evaluation of one request ended."""

    RECORDED = "recorded"
    QUEUE_FULL = "queue_full"
    REPLY_UNUSABLE = "reply_unusable"
    NO_EXPERT = "no_expert"
    OVER_BUDGET = "over_budget"
    UNDECIDED = "undecided"
    FORGOTTEN = "forgotten"
    STOPPED = "stopped"
    FAILED = "failed"


class AsksExperts(Protocol):
    """Asks experts beside the requests of clients, see `SideCalls`."""

    async def ask(self, request: InferenceRequest, expert: str, timeout_s: float) -> SideAnswer:
        """Ask one expert. Raises CoeError."""

    def resident(self) -> set[str]:
        """The experts that answer without a swap."""


class _OverBudgetError(Exception):
    """The budget has no room for a call."""


@dataclass(frozen=True, slots=True)
class ShadowedReply:
    """A request whose reply is kept while it passes, because it may be evaluated."""

    request: InferenceRequest
    category: str
    reply: ReplyText


@dataclass(frozen=True, slots=True)
class _Sample:
    request: InferenceRequest
    category: str
    expert: str
    answer: _Answer
    answered_s: float


@dataclass(frozen=True, slots=True)
class _Answer:
    """An expert's answer: its text, and its tokens and cost where they are known."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None


class ShadowBudget:
    """The budget of shadow evaluation, counted in the store that gateways share.

    Args:
        config: The section `shadow`, with a budget.
        store: Counts it.
    """

    def __init__(self, config: ShadowConfig, store: Store) -> None:
        assert config.budget is not None
        window = {"day": DAY, "month": MONTH}[config.budget.period]
        self.account = Account("shadow/budget", int(config.budget.amount * MICRO), window)
        self._store = store

    async def spend(self, most: float, call: Callable[[], Any]) -> tuple[Any, float]:
        """Reserve the most that a call may cost, make it, and charge what it did cost.

        Args:
            most: Units of cost.
            call: Makes the call, and returns its answer and its cost; a cost of None is not known,
                and the whole reservation is charged, as it is for a call that fails.

        Returns:
            The answer, and what was charged.

        Raises:
            _OverBudgetError: The budget has no room for it.
            CoeError: The call failed, or the store is unavailable.
        """
        line = Charge(self.account, micro(most))
        claim = StoreClaim(f"shadow-{secrets.token_hex(12)}", (line,))
        granted = await self._store.reserve(claim)
        if isinstance(granted, Refused):
            raise _OverBudgetError
        charged = micro(most)
        try:
            answer, spent = await call()
            charged = charged if spent is None else micro(spent)
        finally:
            # A cancelled worker still has to settle.
            await asyncio.shield(self._store.settle(granted, [charged], None))
        return answer, charged / MICRO


class ShadowEvaluator:
    """Evaluates a share of the requests of the tenants that opted in.

    Args:
        config: The config.
        calls: Asks experts.
        store: Counts the budget.
        defaults: The defaults of the experts.
        context: Returns an expert's context in tokens, 0 where it is unknown.
        registry: Counts results and costs.
        draw: Returns a random number in [0, 1).
        clock: Returns seconds since 1970.
    """

    def __init__(
        self,
        config: Config,
        calls: AsksExperts,
        store: Store,
        defaults: RequestDefaults,
        context: Callable[[str], int],
        registry: MetricsRegistry,
        draw: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config.shadow
        self._calls = calls
        self._defaults = defaults
        self._context = context
        self._registry = registry
        self._draw = draw
        self._clock = clock
        self._prices = prices_of(config)
        self._willing = {name: t for name, t in config.tenants.items() if t.shadow}
        self._experts = config.shadow.experts or tuple(
            name
            for name, expert in config.experts.items()
            if "chat" in expert.capabilities and name != config.shadow.judge
        )
        self._ways = ThinkingWays(config)
        self._able = {name: frozenset(e.capabilities) for name, e in config.experts.items()}
        self._budget = ShadowBudget(config.shadow, store) if self._willing else None
        given = config.shadow.folder
        self._folder = OutcomeFolder(default_folder() if given is None else Path(given))
        self._queue: asyncio.Queue[_Sample] = asyncio.Queue(config.shadow.max_queued)
        self._templates: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to evaluate, where a tenant has opted in; outcomes expire in any case."""
        self._tasks.append(asyncio.create_task(self._expire()))
        if self._budget is not None:
            workers = range(self._config.max_in_flight)
            self._tasks += [asyncio.create_task(self._work()) for _ in workers]

    async def stop(self) -> None:
        """Stop; what was not evaluated is left out."""
        await cancel_and_wait(*self._tasks)
        while not self._queue.empty():
            self._queue.get_nowait()
            self._queue.task_done()
            self._count(ShadowResult.STOPPED)

    def watch(
        self, request: InferenceRequest, plan: RoutePlan, send: Send
    ) -> tuple[Send, ShadowedReply | None]:
        """Keep the reply to a request, if it is one of those to evaluate.

        Args:
            request: The request.
            plan: Its candidates.
            send: Sends the reply to the client.

        Returns:
            The send to use, and the reply that is kept; None for a request that is left alone.
        """
        if not self._is_eligible(request, plan) or self._draw() >= self._config.share:
            return send, None
        reply = ReplyText(send, self._config.max_answer_bytes)
        return reply, ShadowedReply(request, plan.category, reply)

    def offer(self, shadowed: ShadowedReply | None, record: RequestRecord) -> None:
        """Queue an answered request for evaluation. It never waits."""
        if shadowed is None or record.outcome != "ok" or record.status != 200:
            return
        text = shadowed.reply.text()
        if not text or not text.strip():
            self._count(ShadowResult.REPLY_UNUSABLE)
            return
        answer = _Answer(text)
        for call in record.calls:
            if call.expert == record.expert and None not in (
                call.prompt_tokens,
                call.completion_tokens,
            ):
                answer = _Answer(text, call.prompt_tokens, call.completion_tokens, call.cost)
        sample = _Sample(shadowed.request, shadowed.category, record.expert, answer, self._clock())
        try:
            self._queue.put_nowait(sample)
        except asyncio.QueueFull:
            self._count(ShadowResult.QUEUE_FULL)

    async def join(self) -> None:
        """Wait until everything that is queued was evaluated."""
        await self._queue.join()

    def _is_eligible(self, request: InferenceRequest, plan: RoutePlan) -> bool:
        return (
            self._budget is not None
            and request.tenant.name in self._willing
            and plan.estimates is not None
            and request.combinable
            and request.media is NOTHING
            # Its keys are tokens of one tokenizer.
            and not request.data.get("logit_bias")
        )

    def _may_see(self, request: InferenceRequest, expert: str) -> bool:
        """Whether an expert may get a request's prompt, by its key and its own bounds."""
        allowed = request.allow is None or expert in request.allow
        return allowed and expert not in request.deny and request.tenant.may_ask(expert)

    def _count(self, result: ShadowResult) -> None:
        self._registry.add(metric_declarations.SHADOW_REQUESTS, 1, result.value)

    async def _work(self) -> None:
        while True:
            sample = await self._queue.get()
            result = ShadowResult.FAILED
            try:
                result = await self._evaluate(sample)
            except (CoeError, OSError) as error:
                # The text of an error might quote a prompt.
                log.warning("shadow evaluation failed: %s", type(error).__name__)
            except Exception as error:
                log.error("shadow evaluation failed: %s", type(error).__name__)
            finally:
                self._count(result)
                self._queue.task_done()

    async def _expire(self) -> None:
        while True:
            try:
                await asyncio.to_thread(
                    self._folder.expire, self._clock(), self._config.retention_days
                )
            except OSError as error:
                log.error("expired outcomes can't be deleted: %s", error.strerror)
            await asyncio.sleep(_EXPIRE_EVERY_S)

    async def _evaluate(self, sample: _Sample) -> ShadowResult:
        """Ask the other experts, compare the answers, and record the outcome."""
        barred = self._ways.refusals(sample.request.endpoint, sample.request.thinking)
        others = [
            name
            for name in self._experts
            if name != sample.expert
            and name not in barred
            and self._may_see(sample.request, name)
            and sample.request.needs <= self._able[name]
        ]
        if not self._config.swaps:
            resident = self._calls.resident()
            others = [name for name in others if name in resident]
        if not others:
            return ShadowResult.NO_EXPERT
        answers = {sample.expert: sample.answer}
        request = _beside(sample.request, self._config.max_tokens)
        without = ShadowResult.FAILED
        for name in others:
            try:
                if (answer := await self._ask(request, name)) is not None:
                    answers[name] = answer
            except _OverBudgetError:
                without = ShadowResult.OVER_BUDGET
                break
            except CoeError as error:
                log.info("shadow call of expert %s failed: %s", name, error.code)
        if len(answers) < 2:
            return without
        as_json = "json" in sample.request.needs
        finals = {name: final_answer(a.text, as_json=as_json) for name, a in answers.items()}
        check, scores = "agreement", scores_by_agreement(finals)
        if scores is None:
            check, scores = "judge", await self._judged(sample, answers)
        if not scores:
            return ShadowResult.UNDECIDED
        return await asyncio.to_thread(self._record, sample, answers, scores, check)

    async def _judged(self, sample: _Sample, answers: Mapping[str, _Answer]) -> dict[str, float]:
        """Scores by the judge; empty without one, or where it gives no verdict."""
        judge, served = self._config.judge, sample.expert
        if judge is None or judge in answers or not self._may_see(sample.request, judge):
            return {}
        prompt = conversation_text(sample.request.data)
        preferences = {}
        for name, answer in answers.items():
            if name == served:
                continue
            texts = []
            with suppress(CoeError, _OverBudgetError):
                for asked in both_orders(
                    prompt, trimmed(answer.text), trimmed(answers[served].text)
                ):
                    verdict = await self._ask(_to_judge(sample.request, asked), judge)
                    texts.append("" if verdict is None else verdict.text)
                if (value := preference(texts[0], texts[1])) is not None:
                    preferences[name] = value
        return scores_by_preference(served, preferences)

    async def _ask(self, request: InferenceRequest, expert: str) -> _Answer | None:
        """Ask an expert within the budget; None where its answer can't be used.

        Raises:
            _OverBudgetError: The budget has no room for it.
            CoeError: There is no answer.
        """
        assert self._budget is not None
        price = self._prices[expert]
        request = replace(request, request_id=secrets.token_hex(12))
        frame = self._templates.get(expert, _TEMPLATE_TOKENS)
        prompt = request.most_prompt_tokens + self._defaults.system_bytes(request, expert) + frame
        if context := self._context(expert):
            prompt = min(prompt, context)
        most = cost(price, prompt, request.most_tokens or self._config.max_tokens)

        async def call() -> tuple[SideAnswer, float | None]:
            answer = await self._calls.ask(request, expert, self._config.timeout_s)
            used = answer.prompt_tokens, answer.completion_tokens
            if used[0] is None or used[1] is None:
                return answer, None
            self._templates[expert] = max(frame, used[0] - request.most_prompt_tokens)
            return answer, cost(price, used[0], used[1])

        answer, spent = await self._budget.spend(most, call)
        self._registry.add(metric_declarations.SHADOW_COST, spent, expert)
        text = whole_text(answer.body) if answer.status == 200 else None
        if not text or not text.strip():
            return None
        return _Answer(text, answer.prompt_tokens, answer.completion_tokens, spent)

    def _record(
        self,
        sample: _Sample,
        answers: Mapping[str, _Answer],
        scores: Mapping[str, float],
        check: str,
    ) -> ShadowResult:
        tenant = sample.request.tenant.name
        keeps = self._willing[tenant].shadow_prompts
        prompt = conversation_text(sample.request.data)
        outcomes: dict[str, dict[str, Any]] = {}
        for name, score in scores.items():
            answer = answers[name]
            given = {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "cost": answer.cost,
            }
            outcomes[name] = {"score": score, "output_chars": len(answer.text)}
            outcomes[name] |= {field: value for field, value in given.items() if value is not None}
            if keeps and (final := final_answer(answer.text)) is not None:
                outcomes[name]["answer"] = final.value
        row: dict[str, Any] = {
            "id": secrets.token_hex(12),
            "prompt_hash": self._folder.hash_of(prompt),
            "category": sample.category,
            "check": check,
            "served": sample.expert,
            "outcomes": outcomes,
        }
        if keeps:
            row["prompt"] = prompt
        added = self._folder.add(tenant, row, sample.answered_s)
        return ShadowResult.RECORDED if added else ShadowResult.FORGOTTEN


def _beside(request: InferenceRequest, max_tokens: int) -> InferenceRequest:
    """A request as it is sent beside the client's: whole, bounded, behind all others."""
    request = replace(request.for_member(0, logprobs=False), trace={}, tenant=_low(request.tenant))
    return request if request.most_tokens is not None else request.at_most(max_tokens)


def _to_judge(request: InferenceRequest, messages: Messages) -> InferenceRequest:
    """The request that asks a judge, in place of a client's request."""
    data: dict[str, Any] = {
        "messages": [*messages],
        "temperature": 0.0,
        "max_tokens": MAX_TOKENS,
    }
    return replace(
        _beside(request, MAX_TOKENS),
        data=data,
        raw=b"",
        needs=frozenset({"chat"}),
        body_bytes=len(orjson.dumps(data)),
        min_quality=0.0,
        max_cost=None,
        thinking=NO_TERMS,
        thinking_budget=None,
    )


def _low(tenant: Tenant) -> Tenant:
    """The tenant as whom pools count a call: not the client's, but with its prefix cache."""
    return Tenant(
        f"shadow/{tenant.name}",
        experts=tenant.experts,
        priority="low",
        cache_salt=tenant.cache_salt,
    )
