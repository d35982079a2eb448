"""Letting a request in: whose it is, the most that it may use, and what it did use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import orjson

from service.api.body import Asked
from service.api.endpoints import TABLE, UNCHARGED
from service.api.keyring import Keyring
from service.api.meter import Meter
from service.broker.ledger import Bound, Ledger, Reservation
from service.broker.price import Price, cost, prices_of
from service.config import Config
from service.errors import CoeError, InvalidRequest
from service.types import Tenant, Usage

log = logging.getLogger("coe.admission")

# The bound of an answer without one, of an expert whose context nobody knows.
_UNKNOWN_CONTEXT = 8192
# What a chat template may put around a prompt, beyond the bytes of its JSON.
_TEMPLATE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Called:
    """One call of an expert: tokens, and units of cost."""

    expert: str
    prompt_tokens: int
    completion_tokens: int
    cost: float


Charged = Callable[[Tenant, str, Sequence[Called]], None]


@dataclass(slots=True)
class Admitted:
    """A request that may run; `asked` may have its answer clipped.

    `counts`: somebody is charged for it; else what passes is left alone.
    """

    asked: Asked
    meter: Meter
    counts: bool = True

    @property
    def counting(self) -> Meter | None:
        """What the answer has to go through, and where calls of experts that only help to
        find it are added; None where nobody is charged."""
        return self.meter if self.counts else None


class Admission:
    """Admits requests of one gateway.

    `context`: an expert's in tokens, 0 where it is not known. `charged` is told
    of each request at its end: whose it was, its outcome, and of every call the expert,
    its tokens and its cost.
    """

    def __init__(
        self,
        config: Config,
        keyring: Keyring,
        ledger: Ledger,
        context: Callable[[str], int],
        charged: Charged,
    ) -> None:
        self.keyring = keyring
        self.ledger = ledger
        self._prices = prices_of(config)
        self._context = context
        self._charged = charged
        self._counts = bool(config.tenants or config.budgets)
        self._settling: set[asyncio.Task[None]] = set()

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """Whose request it is. Raises Unauthorized, StoreGone."""
        return self.keyring.identify(headers)

    @asynccontextmanager
    async def admit(
        self, asked: Asked, ways: Sequence[Sequence[str]], answered_by: Callable[[], str]
    ) -> AsyncIterator[Admitted]:
        """Reserve the most that a request may use, charge at the end what it used.

        `ways`: the experts that each way of answering may ask; `answered_by` tells at the
        end whose answer it was. Raises InvalidRequest; TooMany, StoreGone, which are to be
        told to `refused` unless it is tried again with other ways.
        """
        meter = Meter(asked)
        if not self._counts and not asked.tenant.key:
            yield Admitted(asked, meter, counts=False)
            return
        bound = Bound(0)
        if self.ledger.bounds(asked.tenant):
            bound = self._bound(asked, ways)
        held = await self.ledger.reserve(asked.request_id, asked.tenant, bound)
        try:
            yield self._admitted(asked, meter, bound, held.max_tokens)
        finally:
            # On its own: a client that leaves cancels us, and it must be settled all the same.
            settling = asyncio.create_task(self._settle(held, meter, answered_by()))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    def refused(self, tenant: Tenant, error: CoeError) -> None:
        """A request was not admitted, and that is the end of it."""
        self._charged(tenant, error.code, ())

    async def stop(self) -> None:
        """Wait for what is being settled."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    def _bound(self, asked: Asked, ways: Sequence[Sequence[str]]) -> Bound:
        """The most that any of these ways could use for it, all its calls together."""
        if asked.endpoint in UNCHARGED:
            return Bound(0)
        known = [self._context(name) for name in {name for way in ways for name in way}]
        context = max(known, default=0)
        # No tokenizer makes more tokens than there are bytes.
        prompt = asked.body_bytes + _TEMPLATE_TOKENS
        if all(known):
            prompt = min(prompt, asked.prompts * context)
        calls = max((len(way) for way in ways), default=1)
        prices = [[self._prices[name] for name in way] for way in ways]
        dearest = Price(
            max((sum(p.prompt for p in way) for way in prices), default=0.0),
            max((sum(p.completion for p in way) for way in prices), default=0.0),
        )
        if not TABLE[asked.endpoint].generates:
            return Bound(prompt, 0, 0, prompt_cost=cost(dearest, prompt, 0))
        length = asked.most_tokens
        if length is None:
            length = context if all(known) else max(context, _UNKNOWN_CONTEXT)
        elif all(known):
            length = min(length, context)
        return Bound(
            calls * prompt,
            length,
            calls * asked.answers,
            prompt_cost=cost(dearest, prompt, 0),
            token_cost=cost(dearest, 0, asked.answers),
            # The context bounds an answer only where it is known.
            needs_clip=asked.most_tokens is None and not all(known),
        )

    def _admitted(self, asked: Asked, meter: Meter, bound: Bound, granted: int) -> Admitted:
        if granted < bound.max_tokens or bound.needs_clip:
            asked = asked.at_most(granted)
        data: dict[str, Any] = meter.asks(asked.data)
        if data is asked.data:
            return Admitted(asked, meter)
        try:
            raw = orjson.dumps(data)
        except orjson.JSONEncodeError:
            raise InvalidRequest("the body is nested too deep") from None
        return Admitted(replace(asked, data=data, raw=raw), meter)

    async def _settle(self, held: Reservation, meter: Meter, expert: str) -> None:
        calls = self._calls(meter, expert)
        usage = Usage(
            sum(call.prompt_tokens for call in calls),
            sum(call.completion_tokens for call in calls),
            sum(call.cost for call in calls),
        )
        self._charged(held.tenant, _outcome(meter.status), calls)
        try:
            await self.ledger.settle(
                held, usage, expert=expert, ended_s=time.time(), served=0 < meter.status < 500
            )
        except CoeError as error:
            log.error("a request could not be settled: %s", error.code)

    def _calls(self, meter: Meter, expert: str) -> list[Called]:
        return [
            Called(name, prompt, completion, cost(self._prices[name], prompt, completion))
            for name, prompt, completion in meter.calls_made(expert)
            if name in self._prices
        ]


def _outcome(status: int) -> str:
    if status == 0:
        return "no_answer"
    if status < 400:
        return "ok"
    return "client_error" if status < 500 else "server_error"
