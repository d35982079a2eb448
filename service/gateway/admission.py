"""Admission: identifies the tenant, reserves what a request may use, and settles what it used.

A request is checked twice. When its headers arrive, it counts against the limits on requests and
on concurrent requests, before any of the body is read. Once it is parsed, the most tokens and cost
that it may use are reserved. Both are settled when the request ends, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from service.broker.limit_and_budget_ledger import Ledger, Reservation, UsageBound
from service.broker.recipe_steps import StepBound
from service.broker.savings import Saving
from service.broker.token_prices import Price, cost, prices_of
from service.config import Config
from service.errors import (
    CoeError,
    DeadlineExceededError,
    InvalidRequestError,
    RateLimitExceededError,
    StoreUnavailableError,
)
from service.gateway.auth import Authenticator
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import ExpertCall, RequestRecord
from service.gateway.usage_meter import UsageMeter
from service.http.asgi_helpers import ClientDisconnectedError
from service.http.error_formats import status_of
from service.http.on_behalf import OnBehalf, UsedByCalls
from service.http.prompt_endpoints import TABLE, UNCHARGED
from service.store.store_interface import Settlement
from service.telemetry.json_logging import log_fields
from service.types import Tenant, Usage

log = logging.getLogger("coe.admission")

# The bound in tokens of an answer without one, where the expert's context is unknown.
_UNKNOWN_CONTEXT = 8192
# What may be put around a prompt, beyond the bytes of its JSON: by a chat template, which may have
# a system prompt and a manual for tools of its own, or by a tokenizer alone. Once an expert's
# template proves longer, its observed length is used.
_TEMPLATE_TOKENS = 512
_FRAME_TOKENS = 64


Charged = Callable[[Tenant, str, Sequence[ExpertCall]], None]
Compared = Callable[[Tenant, Sequence[Saving]], None]


@dataclass(slots=True)
class Entry:
    """An admitted request, and what is reserved for it.

    Attributes:
        id: Unique among all requests of all gateways.
        tenant: The tenant that sent it.
        record: The request's record.
        counts: Whether its tenant is charged for it.
        held: Its reservations.
        meter: Counts the tokens of its answer, once it is parsed.
        fault: The code of the error that ended it, and its HTTP status.
        behalf: Whose request it is, where the gateway makes it; None for requests of clients.
    """

    id: str
    tenant: Tenant
    record: RequestRecord
    counts: bool
    held: list[Reservation] = field(default_factory=list)
    meter: UsageMeter | None = None
    fault: tuple[str, int] = ("", 0)
    behalf: OnBehalf[Settlement] | None = None

    @property
    def charged_meter(self) -> UsageMeter | None:
        """The meter for the answer and for the calls of a recipe's other experts.

        None if nobody is charged.
        """
        return self.meter if self.counts else None

    @property
    def outcome(self) -> str:
        """The outcome for the metrics of tenants."""
        if self.fault[1] in (429, 503) and not self.record.attempts:
            return self.fault[0]
        status = self.record.status or self.fault[1]
        if status == 0:
            return "no_answer"
        if status < 400:
            return "ok"
        return "client_error" if status < 500 else "server_error"

    @property
    def ours(self) -> bool:
        """Whether the service is to blame for the failure; then it doesn't count as a request."""
        if self.fault[0] == DeadlineExceededError.code and self.record.own_deadline:
            return False
        return max(self.record.status, self.fault[1]) >= 500


class Admission:
    """Admits the requests of one gateway.

    Args:
        config: The config, with tenants, budgets and prices.
        authenticator: Identifies tenants.
        ledger: Counts limits and budgets.
        context: Returns an expert's context in tokens, 0 where it is unknown.
        charged: Called at the end of each request, with its tenant, its outcome and its calls.
        defaults: The defaults of the experts.
        compared: Called with what each request saved, for the requests that the router decided.
    """

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        ledger: Ledger,
        context: Callable[[str], int],
        charged: Charged,
        defaults: RequestDefaults,
        compared: Compared,
    ) -> None:
        self.authenticator = authenticator
        self.ledger = ledger
        self._prices = prices_of(config)
        self._context = context
        self._charged = charged
        self._compared = compared
        self._defaults = defaults
        self._counts = bool(config.tenants or config.budgets)
        self._settling: set[asyncio.Task[None]] = set()
        self._templates: dict[str, int] = {}

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """The tenant of a request. Raises UnauthorizedError, StoreUnavailableError."""
        return self.authenticator.identify(headers)

    async def look_up(self, headers: dict[bytes, bytes]) -> Tenant:
        """The tenant of a request that calls no expert; it counts as a request.

        Raises:
            UnauthorizedError: Its key is missing or not valid.
            RateLimitExceededError: The tenant has sent too many requests.
            StoreUnavailableError: Keys or limits can't be read.
        """
        tenant = self.identify(headers)
        if self._counts or tenant.key:
            await self.ledger.look_up(secrets.token_hex(12), tenant)
        return tenant

    @asynccontextmanager
    async def enter(
        self,
        headers: dict[bytes, bytes],
        record: RequestRecord,
        behalf: OnBehalf[Settlement] | None = None,
    ) -> AsyncIterator[Entry]:
        """Admit a request by its headers, and settle its reservations at its end.

        Args:
            headers: The headers, by name.
            record: The request's record.
            behalf: The tenant of a request that the gateway makes. Its settlements are left to
                the maker. None for requests of clients, who show a key.

        Raises:
            UnauthorizedError: Its key is missing or not valid.
            RateLimitExceededError: The tenant has too many requests.
            StoreUnavailableError: Keys or limits can't be read.
        """
        tenant = self.identify(headers) if behalf is None else behalf.tenant
        log_fields(tenant=tenant.name, key=tenant.key)
        entry = Entry(secrets.token_hex(12), tenant, record, self._counts or bool(tenant.key))
        entry.behalf = behalf
        if not entry.counts:
            try:
                yield entry
            finally:
                self._savings(entry, record.calls)
                if behalf is not None:
                    # A task of its own, as for a request that is charged.
                    await asyncio.shield(self._in_background(self._count_used(entry)))
            return
        try:
            entry.held.append(await self.ledger.arrive(entry.id, tenant))
        except (RateLimitExceededError, StoreUnavailableError) as error:
            self._charged(tenant, error.code, ())
            if behalf is not None:
                behalf.ended.set()
            raise
        try:
            yield entry
        except CoeError as error:
            entry.fault = error.code, status_of(error)
            raise
        except ClientDisconnectedError:
            raise
        except Exception:
            entry.fault = CoeError.code, 500
            raise
        finally:
            # A task of its own, because a client that leaves cancels this one.
            await asyncio.shield(self._in_background(self._settle(entry)))

    async def admit(
        self,
        entry: Entry,
        request: InferenceRequest,
        expert_sets: Callable[[], Sequence[Sequence[str]]],
        likely_tokens: Callable[[], float],
        most_shown: Callable[[], StepBound] = StepBound,
    ) -> InferenceRequest:
        """Reserve the most that a request may use.

        Args:
            entry: The request as it arrived.
            request: What it asks.
            expert_sets: Returns the experts that each candidate may call.
            likely_tokens: Returns the expected tokens of all calls of one candidate together.
            most_shown: Returns what calls may have beyond the request's own prompt and answer.

        Returns:
            The request. Its answer may have a lower bound, and its body may be written anew,
            so that the engine reports usage in every chunk.

        Raises:
            InvalidRequestError: The body is nested too deep to be written again.
            RateLimitExceededError: One of its limits has no room for it.
            StoreUnavailableError: Limits can't be counted.
        """
        entry.meter = meter = UsageMeter(request)
        if not entry.counts:
            return request
        bound = UsageBound(0, places=request.sequences)
        if self.ledger.bounds(request.tenant):
            bound = self._bound(request, expert_sets(), likely_tokens, most_shown())
        held = await self.ledger.reserve(f"{entry.id}-{len(entry.held)}", entry.tenant, bound)
        entry.held.append(held)
        if held.max_tokens < bound.max_tokens or bound.needs_clip:
            request = request.at_most(held.max_tokens)
        data: dict[str, Any] = meter.asks(request.data)
        if data is request.data:
            return request
        try:
            raw = orjson.dumps(data)
        except orjson.JSONEncodeError:
            raise InvalidRequestError("the body is nested too deep") from None
        return replace(request, data=data, raw=raw)

    async def stop(self) -> None:
        """Wait until every request is settled."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    def _bound(
        self,
        request: InferenceRequest,
        expert_sets: Sequence[Sequence[str]],
        likely_tokens: Callable[[], float],
        beyond: StepBound,
    ) -> UsageBound:
        """The most that any candidate could use, with all its calls together."""
        if request.endpoint in UNCHARGED:
            return UsageBound(0)
        experts = {name for experts in expert_sets for name in experts}
        known = [self._context(name) for name in experts]
        context = max(known, default=0)
        # No tokenizer makes more tokens than the text has bytes.
        frame = _FRAME_TOKENS
        if TABLE[request.endpoint].needs == "chat":
            learned = (self._templates.get(name, 0) for name in experts)
            frame = max(_TEMPLATE_TOKENS, *learned)
        added = max((self._defaults.system_bytes(request, name) for name in experts), default=0)
        prompt = request.most_prompt_tokens + added + frame + beyond.shown_bytes
        if all(known) and not TABLE[request.endpoint].listens:
            prompt = min(prompt, request.prompts * context)
        calls = max(map(len, expert_sets), default=1)
        dearest = self._dearest(expert_sets)
        if not TABLE[request.endpoint].generates:
            return UsageBound(
                prompt,
                0,
                0,
                prompt_cost=cost(dearest, prompt, 0),
                likely_prompt=min(prompt, request.prompt_tokens),
                places=request.sequences,
            )
        length = request.most_tokens
        if length is None:
            length = context if all(known) else max(context, _UNKNOWN_CONTEXT)
        elif all(known):
            length = min(length, context)
        length = max(length, beyond.answer_tokens)
        return UsageBound(
            calls * prompt,
            length,
            calls * request.answers,
            prompt_cost=cost(dearest, prompt, 0),
            token_cost=cost(dearest, 0, request.answers),
            # The context bounds an answer only where it is known.
            needs_clip=request.most_tokens is None and not all(known),
            likely_prompt=calls * min(prompt, request.prompt_tokens),
            likely_tokens=None
            if request.most_tokens is not None
            else max(1, math.ceil(likely_tokens() / calls)),
            places=request.sequences,
        )

    def _dearest(self, expert_sets: Sequence[Sequence[str]]) -> Price:
        """The greatest price of all calls of a candidate together."""
        if len(expert_sets) == 1 and len(expert_sets[0]) == 1:
            return self._prices[expert_sets[0][0]]
        prices = [[self._prices[name] for name in experts] for experts in expert_sets]
        return Price(
            max((sum(price.prompt for price in each) for each in prices), default=0.0),
            max((sum(price.completion for price in each) for each in prices), default=0.0),
        )

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task for which `stop` waits."""
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _count_used(self, entry: Entry) -> None:
        """Tell the maker of a request that nobody is charged for what its calls came to."""
        assert entry.behalf is not None
        try:
            entry.behalf.used = _used(_usage_of(await self._calls(entry, entry.record.expert)))
        finally:
            entry.behalf.ended.set()

    async def _settle(self, entry: Entry) -> None:
        expert = entry.record.expert
        calls = await self._calls(entry, expert)
        usage = _usage_of(calls)
        self._charged(entry.tenant, entry.outcome, calls)
        savings = self._savings(entry, calls)
        # Only a reservation with lines is settled in the store; the last of these carries the
        # usage note.
        kept = [held for held in entry.held if held.granted.claim.lines] or entry.held
        settlements = [
            self.ledger.settlement(
                held,
                usage,
                expert=expert,
                ended_s=time.time(),
                counts=not entry.ours,
                noted=held is kept[-1] and not entry.ours,
                savings=savings,
            )
            for held in entry.held
        ]
        if entry.behalf is not None:
            entry.behalf.settlements += settlements
            entry.behalf.used = _used(usage)
            entry.behalf.ended.set()
            return
        # One after the other: a task for each would cost more than a store in memory takes.
        for settlement in settlements:
            try:
                await self.ledger.deliver(settlement)
            except CoeError as error:
                log.error("settlement of a request failed: %s", error.code)
            except Exception as error:
                log.error("settlement of a request failed", exc_info=error)

    def _savings(self, entry: Entry, calls: Sequence[ExpertCall]) -> tuple[Saving, ...]:
        """Compare a request with the baselines."""
        comparison = entry.record.comparison
        answered = [call for call in calls if call.expert == entry.record.expert]
        if comparison is None or not answered:
            return ()
        tokens = answered[-1].prompt_tokens
        spent = sum(call.cost for call in calls)
        if tokens is None:
            # A stream without usage, where nobody is charged.
            spent += cost(answered[-1].price, comparison.prompt_tokens, 0)
        savings = comparison.settle(tokens, spent)
        self._compared(entry.tenant, savings)
        return savings

    async def _calls(self, entry: Entry, expert: str) -> list[ExpertCall]:
        if entry.meter is None:
            return []
        for call in entry.record.unfinished:
            entry.meter.abandon(*await call.used())
        calls = []
        for name, prompt, completion in entry.meter.calls_made(expert):
            beyond = prompt - entry.meter.most_prompt_tokens
            if beyond > _TEMPLATE_TOKENS:
                self._templates[name] = max(beyond, self._templates.get(name, 0))
            if name in self._prices:
                calls.append(ExpertCall(name, self._prices[name], prompt, completion))
        return calls


def _usage_of(calls: Sequence[ExpertCall]) -> Usage:
    return Usage(
        sum(call.prompt_tokens or 0 for call in calls),
        sum(call.completion_tokens or 0 for call in calls),
        sum(call.cost for call in calls),
    )


def _used(usage: Usage) -> UsedByCalls:
    return UsedByCalls(usage.prompt_tokens, usage.completion_tokens, usage.cost)
