"""Letting a request in: whose it is, the most that it may use, and what it did use.

A request enters twice. As it arrives, by its headers alone, it counts as a request and as one of
those at once: who is over such a limit is refused before a byte of the body is read. Once it is
understood, what it may use is reserved. Both are settled when it ends, however it does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from service.broker.ledger import Ledger, Reservation, UsageBound
from service.broker.prices import Price, cost, prices_of
from service.config import Config
from service.errors import (
    CoeError,
    DeadlineExceededError,
    InvalidRequestError,
    RateLimitExceededError,
    StoreUnavailableError,
)
from service.gateway.auth import Authenticator
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import ExpertCall, RequestRecord
from service.gateway.sends.usage_meter import UsageMeter
from service.http.asgi import ClientDisconnectedError
from service.http.endpoints import TABLE, UNCHARGED
from service.http.openai_errors import status_of
from service.telemetry.logging import log_fields
from service.types import Tenant, Usage

log = logging.getLogger("coe.admission")

# The bound of an answer without one, of an expert whose context nobody knows.
_UNKNOWN_CONTEXT = 8192
# What may be put around a prompt, beyond the bytes of its JSON: by a chat template, which may have
# a system prompt and a manual for tools of its own, or by a tokenizer alone. Of an expert whose
# template has more, more is believed as soon as it was seen.
_TEMPLATE_TOKENS = 512
_FRAME_TOKENS = 64


Charged = Callable[[Tenant, str, Sequence[ExpertCall]], None]


@dataclass(slots=True)
class Entry:
    """A request that has arrived, and what is held for it.

    Attributes:
        id: Unique among all requests of all gateways.
        tenant: Whose it is.
        record: What becomes of it.
        counts: Somebody is charged for it; else what passes is left alone.
        held: What is reserved for it.
        meter: Counts its answer, once it is known what was asked.
        fault: The code of the error that ended it, and its HTTP status.
    """

    id: str
    tenant: Tenant
    record: RequestRecord
    counts: bool
    held: list[Reservation] = field(default_factory=list)
    meter: UsageMeter | None = None
    fault: tuple[str, int] = ("", 0)

    @property
    def counting(self) -> UsageMeter | None:
        """The meter for the answer and for the calls of a recipe's other experts.

        None if nobody is charged.
        """
        return self.meter if self.counts else None

    @property
    def outcome(self) -> str:
        """For the metrics of tenants."""
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
        """Whether it failed by our fault: then it does not count as a request."""
        if self.fault[0] == DeadlineExceededError.code and self.record.own_deadline:
            return False
        return max(self.record.status, self.fault[1]) >= 500


class Admission:
    """Admits requests of one gateway.

    `context`: an expert's in tokens, 0 where it is not known. `charged` is told
    of each request at its end: whose it was, its outcome, and of every call the expert,
    its tokens and its cost.
    """

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        ledger: Ledger,
        context: Callable[[str], int],
        charged: Charged,
    ) -> None:
        self.authenticator = authenticator
        self.ledger = ledger
        self._prices = prices_of(config)
        self._context = context
        self._charged = charged
        self._counts = bool(config.tenants or config.budgets)
        self._settling: set[asyncio.Task[None]] = set()
        self._templates: dict[str, int] = {}

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """Whose request it is. Raises UnauthorizedError, StoreUnavailableError."""
        return self.authenticator.identify(headers)

    async def look_up(self, headers: dict[bytes, bytes]) -> Tenant:
        """Whose request it is that asks no expert.

        Raises UnauthorizedError, RateLimitExceededError, StoreUnavailableError.
        """
        tenant = self.identify(headers)
        if self._counts or tenant.key:
            await self.ledger.look_up(secrets.token_hex(12), tenant)
        return tenant

    @asynccontextmanager
    async def enter(
        self, headers: dict[bytes, bytes], record: RequestRecord
    ) -> AsyncIterator[Entry]:
        """Take a request in by its headers, and settle what is held for it at its end.

        Raises UnauthorizedError, RateLimitExceededError, StoreUnavailableError.
        """
        tenant = self.identify(headers)
        log_fields(tenant=tenant.name, key=tenant.key)
        entry = Entry(secrets.token_hex(12), tenant, record, self._counts or bool(tenant.key))
        if not entry.counts:
            yield entry
            return
        try:
            entry.held.append(await self.ledger.arrive(entry.id, tenant))
        except (RateLimitExceededError, StoreUnavailableError) as error:
            self._charged(tenant, error.code, ())
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
            # On its own: a client that leaves cancels us, and it must be settled all the same.
            settling = asyncio.create_task(self._settle(entry))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    async def admit(
        self,
        entry: Entry,
        request: InferenceRequest,
        ways: Sequence[Sequence[str]],
        likely_tokens: Callable[[], float],
    ) -> InferenceRequest:
        """Reserve the most that a request may use; its answer may come back clipped.

        Args:
            entry: The request as it arrived.
            request: What it asks.
            ways: The experts that each way of answering may ask.
            likely_tokens: Tells the tokens that the calls of one way together are expected to make.

        Raises:
            InvalidRequestError: It can't be written again.
            RateLimitExceededError: One of its limits has no room for it.
            StoreUnavailableError: Limits can't be counted.
        """
        entry.meter = meter = UsageMeter(request)
        if not entry.counts:
            return request
        bound = UsageBound(0, places=request.sequences)
        if self.ledger.bounds(request.tenant):
            bound = self._bound(request, ways, likely_tokens())
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
        """Wait for what is being settled."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    def _bound(
        self, request: InferenceRequest, ways: Sequence[Sequence[str]], likely_tokens: float
    ) -> UsageBound:
        """The most that any of these ways could use for it, all its calls together."""
        if request.endpoint in UNCHARGED:
            return UsageBound(0)
        experts = {name for way in ways for name in way}
        known = [self._context(name) for name in experts]
        context = max(known, default=0)
        # No tokenizer makes more tokens than there are bytes.
        frame = _FRAME_TOKENS
        if TABLE[request.endpoint].needs == "chat":
            learned = (self._templates.get(name, 0) for name in experts)
            frame = max(_TEMPLATE_TOKENS, *learned)
        prompt = request.most_prompt_tokens + frame
        if all(known):
            prompt = min(prompt, request.prompts * context)
        calls = max((len(way) for way in ways), default=1)
        prices = [[self._prices[name] for name in way] for way in ways]
        dearest = Price(
            max((sum(p.prompt for p in way) for way in prices), default=0.0),
            max((sum(p.completion for p in way) for way in prices), default=0.0),
        )
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
            else max(1, math.ceil(likely_tokens / calls)),
            places=request.sequences,
        )

    async def _settle(self, entry: Entry) -> None:
        expert = entry.record.expert
        calls = await self._calls(entry, expert)
        usage = Usage(
            sum(call.prompt_tokens or 0 for call in calls),
            sum(call.completion_tokens or 0 for call in calls),
            sum(call.cost for call in calls),
        )
        self._charged(entry.tenant, entry.outcome, calls)
        # With what is settled in the store its usage is noted there, in one step.
        kept = [held for held in entry.held if held.granted.claim.lines] or entry.held
        settled = await asyncio.gather(
            *(
                self.ledger.settle(
                    held,
                    usage,
                    expert=expert,
                    ended_s=time.time(),
                    counts=not entry.ours,
                    noted=held is kept[-1] and not entry.ours,
                )
                for held in entry.held
            ),
            return_exceptions=True,
        )
        for error in settled:
            if isinstance(error, CoeError):
                log.error("a request could not be settled: %s", error.code)
            elif error is not None:
                log.error("a request could not be settled", exc_info=error)

    async def _calls(self, entry: Entry, expert: str) -> list[ExpertCall]:
        if entry.meter is None:
            return []
        for call in entry.record.unfinished:
            entry.meter.left(*await call.used())
        calls = []
        for name, prompt, completion in entry.meter.calls_made(expert):
            beyond = prompt - entry.meter.most_prompt_tokens
            if beyond > _TEMPLATE_TOKENS:
                self._templates[name] = max(beyond, self._templates.get(name, 0))
            if name in self._prices:
                calls.append(ExpertCall(name, self._prices[name], prompt, completion))
        return calls
