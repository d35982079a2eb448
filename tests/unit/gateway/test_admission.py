"""Admission: what counts before the body is read, what is reserved, and what is charged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from service.broker.limit_and_budget_ledger import Ledger
from service.broker.savings import Saving
from service.config import Config
from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    PoolUnavailableError,
    RateLimitExceededError,
)
from service.gateway.admission import Admission
from service.gateway.auth import Authenticator
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import ExpertCall, RequestRecord, Unfinished
from service.http.on_behalf import OnBehalf
from service.store.api_keys import digest_of
from service.store.memory_store import MemoryStore
from service.store.store_interface import Settlement
from service.types import NOBODY, Tenant
from tests.support.polling import until

CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-tests-a"
HEADERS = {b"authorization": b"Bearer " + KEY.encode()}
HELLO = [{"role": "user", "content": "hello"}]


class Door:
    """Admission with its store, and everything that it told of requests that ended."""

    def __init__(
        self, context: int = 4096, clock: Callable[[], float] = time.time, **limits: Any
    ) -> None:
        config = Config.model_validate(
            {
                "experts": {"big": {"model": "m", "price": {"prompt": 1, "completion": 10}}},
                "pools": {"cpu": {"engine": "simulated"}},
                "tenants": {"acme": limits},
                "keys": {"a": {"tenant": "acme", "sha256": digest_of(KEY)}},
            }
        )
        self.tenant = Tenant("acme", "a")
        self.ledger = Ledger(config, MemoryStore(clock))
        self.told: list[tuple[str, list[ExpertCall]]] = []
        self.saved: list[Saving] = []

        class NoBook:
            async def records(self) -> list[Any]:
                return []

        self.admission = Admission(
            config,
            Authenticator(config, NoBook()),  # type: ignore[arg-type]
            self.ledger,
            lambda expert: context,
            lambda tenant, outcome, calls: self.told.append((outcome, list(calls))),
            RequestDefaults(config),
            lambda tenant, savings: self.saved.extend(savings),
        )

    def asked(self, path: str = CHAT, **data: Any) -> InferenceRequest:
        body = {"model": "big", "messages": HELLO, **data}
        return parse_request(path, orjson.dumps(body), {}, 1000, self.tenant)

    @asynccontextmanager
    async def admitted(
        self, asked: InferenceRequest, passage: RequestRecord | None = None
    ) -> AsyncIterator[tuple[InferenceRequest, RequestRecord]]:
        passage = passage or RequestRecord(expert="big")
        async with self.admission.enter(HEADERS, passage) as entry:
            yield (
                await self.admission.admit(entry, asked, lambda: [("big",)], lambda: 64.0),
                passage,
            )

    async def spent(self, kind: str) -> tuple[float, float]:
        found = await self.ledger.limits(self.tenant)
        balance = next(b for name, (_, b) in found.items() if name.endswith(kind))
        return balance.spent, balance.reserved


async def test_enter_client_that_leaves_before_the_first_byte_is_counted_and_charged() -> None:
    door = Door(requests_per_min=3, tokens_per_min=100_000, budget={"amount": 50})

    async def leaves() -> str:
        passage = RequestRecord(expert="big")
        working = asyncio.Event()

        async def work() -> None:
            async with door.admitted(door.asked(max_tokens=2000), passage):
                # The engine works on it; the client waits for a whole answer.
                passage.unfinished.append(Unfinished(None, (30, 7)))
                working.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await until(lambda: working.is_set() or task.done(), "it works, or is refused")
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "left"
        except RateLimitExceededError:
            return "refused"
        return "answered"

    got = [await leaves() for _ in range(10)]
    await door.admission.stop()
    assert got == ["left"] * 3 + ["refused"] * 7
    assert await door.spent("requests") == (3, 0)
    assert await door.spent("tokens") == (3 * 37, 0)
    assert await door.spent("budget") == (3 * 100, 0)
    assert [outcome for outcome, _ in door.told] == ["no_answer"] * 3 + ["rate_limit_exceeded"] * 7


@pytest.mark.parametrize(
    ("error", "own_deadline", "counts"),
    [
        (InvalidRequestError("wrong"), False, 1),
        (PoolUnavailableError("away"), False, 0),
        (ValueError("a mistake of ours"), False, 0),
        (DeadlineExceededError("late"), False, 0),
        # By a deadline of one's own any number of requests could be made to fail.
        (DeadlineExceededError("late"), True, 1),
    ],
)
async def test_enter_failures_of_the_service_do_not_count(
    error: Exception, own_deadline: bool, counts: int
) -> None:
    door = Door(requests_per_min=5)
    with pytest.raises(type(error)):
        async with door.admission.enter(HEADERS, RequestRecord(own_deadline=own_deadline)):
            raise error
    assert await door.spent("requests") == (counts, 0)


async def test_admit_without_max_tokens_does_not_serialise_under_a_token_limit() -> None:
    door = Door(context=131_072, tokens_per_min=100_000)
    entered: list[InferenceRequest] = []
    hold = asyncio.Event()

    async def ask() -> None:
        async with door.admitted(door.asked()) as (asked, _):
            entered.append(asked)
            await hold.wait()

    tasks = [asyncio.create_task(ask()) for _ in range(50)]
    await until(lambda: len(entered) == 50, "all are admitted at once")
    assert all(asked.clipped is None for asked in entered)
    hold.set()
    await asyncio.gather(*tasks)


async def test_admit_burst_exceeds_the_token_limit_only_by_what_was_running() -> None:
    now = [1_700_000_000.0]
    door = Door(context=131_072, clock=lambda: now[0], tokens_per_min=10_000)

    async def ask() -> bool:
        passage = RequestRecord(expert="big")
        try:
            async with door.admitted(door.asked(), passage) as (asked, _):
                # It makes far more than what is usual.
                passage.unfinished.append(Unfinished(None, (asked.prompt_tokens, 1000)))
                await asyncio.sleep(0)
                now[0] += 0.1
        except RateLimitExceededError:
            return False
        return True

    each = door.asked().prompt_tokens + 1000
    admitted = sum(await asyncio.gather(*(ask() for _ in range(500))))
    # As many as are usually no more than the limit; what they made above that is owed.
    usual = door.asked().prompt_tokens + 64
    assert admitted == 10_000 // usual
    minutes = admitted * each / 10_000
    began_s = now[0]
    while now[0] - began_s < (minutes + 10) * 60:
        admitted += await ask()
        now[0] += 1.0
    # Over all that time no more than the limit, and what was running when it was reached.
    assert admitted * each <= 10_000 * (minutes + 12) + each
    assert admitted * each >= 10_000 * (minutes + 8)


async def test_admit_reserves_budget_for_the_longest_answer() -> None:
    door = Door(context=4096, budget={"amount": 50_000}, tokens_per_min=100_000)
    async with door.admitted(door.asked(n=2)):
        body = door.asked(n=2).body_bytes + 512
        assert await door.spent("budget") == (0, body * 1 + 2 * 4096 * 10)


@pytest.mark.parametrize(
    ("context", "more", "bound", "sent"),
    [
        (4096, {}, 4096, None),
        (4096, {"max_tokens": 100_000}, 4096, 100_000),
        # Where nobody knows the context, the request is given what was reserved.
        (0, {}, 8192, 8192),
        (0, {"max_tokens": 20_000}, 20_000, 20_000),
    ],
)
async def test_admit_reservation_is_the_longest_answer_the_engine_may_give(
    context: int, more: dict[str, Any], bound: int, sent: int | None
) -> None:
    door = Door(context=context, budget={"amount": 10**7})
    async with door.admitted(door.asked(**more)) as (asked, _):
        _, reserved = await door.spent("budget")
        assert reserved == asked.body_bytes + 512 + bound * 10
        assert asked.given_tokens == sent


async def test_admit_choices_and_prompts_count_as_concurrent_requests() -> None:
    door = Door(concurrent=4)
    async with door.admitted(door.asked(n=3)):
        assert await door.spent("concurrent") == (0, 3)
        with pytest.raises(RateLimitExceededError, match="4 requests at once"):
            async with door.admitted(door.asked(n=2)):
                pass
    texts = door.asked("/v1/embeddings", input=["x"] * 500)
    async with door.admitted(texts):
        assert await door.spent("concurrent") == (0, 4)
    assert await door.spent("concurrent") == (0, 0)


async def test_admit_reserves_template_tokens_once_they_were_observed() -> None:
    door = Door(budget={"amount": 10**7})
    bytes_of_it = door.asked(max_tokens=1).body_bytes
    passage = RequestRecord(expert="big")
    async with door.admitted(door.asked(max_tokens=1), passage):
        assert await door.spent("budget") == (0, bytes_of_it + 512 + 10)
        passage.unfinished.append(Unfinished(None, (bytes_of_it + 2000, 1)))
    async with door.admitted(door.asked(max_tokens=1)):
        assert (await door.spent("budget"))[1] == bytes_of_it + 2000 + 10
    async with door.admitted(
        door.asked("/v1/completions", prompt="x", max_tokens=1, messages=None)
    ) as (text, _):
        assert (await door.spent("budget"))[1] == text.body_bytes + 64 + 10


async def test_request_on_behalf_leaves_its_settlements_to_the_maker() -> None:
    door = Door(tokens_per_min=10_000, budget={"amount": 1, "period": "day"})
    behalf: OnBehalf[Settlement] = OnBehalf(door.tenant)
    record = RequestRecord(expert="big")
    async with door.admission.enter({}, record, behalf) as entry:
        await door.admission.admit(
            entry, door.asked(max_tokens=5), lambda: [("big",)], lambda: 64.0
        )
        assert entry.meter is not None
        entry.meter.add("big", 7, 3)
    assert behalf.ended.is_set()
    spent, reserved = await door.spent("tokens")
    assert spent == 0
    assert reserved > 0
    for settlement in behalf.settlements:
        await door.ledger.deliver(settlement)
    assert await door.spent("tokens") == (10, 0)
    assert (await door.spent("budget"))[1] == 0
    used = behalf.used
    assert (used.prompt_tokens, used.completion_tokens) == (7, 3)
    assert used.cost > 0


@pytest.mark.parametrize("charged", [True, False])
async def test_request_on_behalf_that_missed_its_deadline_tells_what_was_made(
    charged: bool,
) -> None:
    door = Door(tokens_per_min=10_000)
    door.admission._counts = charged
    behalf: OnBehalf[Settlement] = OnBehalf(door.tenant if charged else NOBODY)
    record = RequestRecord(expert="big", own_deadline=True)

    async def miss() -> None:
        async with door.admission.enter({}, record, behalf) as entry:
            await door.admission.admit(
                entry, door.asked(max_tokens=50), lambda: [("big",)], lambda: 64.0
            )
            record.unfinished.append(Unfinished(None, (9, 40)))
            raise DeadlineExceededError("too late")

    with pytest.raises(DeadlineExceededError):
        await miss()
    assert behalf.ended.is_set()
    assert (behalf.used.prompt_tokens, behalf.used.completion_tokens) == (9, 40)
    for settlement in behalf.settlements:
        await door.ledger.deliver(settlement)
    assert await door.spent("tokens") == ((49, 0) if charged else (0, 0))


async def test_request_on_behalf_that_is_refused_ends_without_settlements() -> None:
    door = Door(requests_per_min=1)
    for allowed in (True, False):
        behalf: OnBehalf[Settlement] = OnBehalf(door.tenant)
        try:
            async with door.admission.enter({}, RequestRecord(), behalf):
                assert allowed
        except RateLimitExceededError:
            assert not allowed
        assert behalf.ended.is_set()
        assert bool(behalf.settlements) == allowed
        for settlement in behalf.settlements:
            await door.ledger.deliver(settlement)
