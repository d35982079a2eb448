"""Limits, budgets and usage: which apply to a request, and how a refusal reads."""

from __future__ import annotations

from typing import Any

import pytest

from service.broker.limit_and_budget_ledger import BudgetState, Ledger, UsageBound
from service.config import Config
from service.errors import RateLimitExceededError
from service.store.memory_store import MemoryStore
from service.types import NOBODY, Limits, Tenant, Usage

NOW_S = 1_700_000_000.0
BOUND = UsageBound(100, 50, 2, prompt_cost=1.0, token_cost=0.04)


def ledger(**sections: Any) -> Ledger:
    config = Config.model_validate(
        {
            "experts": {"general": {"model": "m"}},
            "pools": {"cpu": {"engine": "simulated"}},
            **sections,
        }
    )
    return Ledger(config, MemoryStore(lambda: NOW_S))


async def taken(book: Ledger, name: str, tenant: Tenant, bound: UsageBound = BOUND) -> None:
    await book.arrive(name, tenant)
    await book.reserve(name + "-0", tenant, bound)


async def test_claim_without_limits_is_granted_and_recorded() -> None:
    book = ledger()
    assert not book.bounds(NOBODY)
    held = await book.reserve("r", NOBODY, BOUND)
    assert held.max_tokens == 50
    await book.settle(held, Usage(7, 5, 0.25), expert="general", ended_s=NOW_S)
    (day,) = (await book.usage(NOBODY, NOW_S, 3)).items()
    assert day == (
        "2023-11-14",
        {
            "requests": 1,
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "cost_micro": 250_000,
            "general/requests": 1,
            "general/prompt_tokens": 7,
            "general/completion_tokens": 5,
            "general/cost_micro": 250_000,
        },
    )


async def test_claim_counts_in_a_global_and_a_tenant_budget() -> None:
    book = ledger(
        tenants={"a": {}},
        budgets={
            "all": {"amount": 10, "period": "day"},
            "a-hour": {"amount": 6, "window_s": 3600, "tenant": "a"},
        },
    )
    a, b = Tenant("a"), Tenant("b")
    held = await book.reserve("1", a, BOUND)
    await book.reserve("2", b, BOUND)
    state = await book.state()
    assert state["all"].reserved == 6.0
    assert (state["a-hour"].reserved, state["a-hour"].tenant) == (3.0, "a")
    await book.settle(held, Usage(100, 20, 1.4), ended_s=NOW_S)
    state = await book.state()
    day_s = NOW_S - NOW_S % 86_400
    assert state["all"] == BudgetState(10.0, 1.4, 3.0, day_s, day_s + 86_400)
    assert (state["a-hour"].spent, state["a-hour"].reserved) == (1.4, 0.0)


async def test_claim_is_clipped_to_the_remaining_budget() -> None:
    book = ledger(budgets={"all": {"amount": 1.5, "period": "month"}})
    held = await book.reserve("1", NOBODY, BOUND)
    assert held.max_tokens == 12  # 1 + 12 · 0.04 of 1.5
    with pytest.raises(RateLimitExceededError) as caught:
        await book.reserve("2", NOBODY, BOUND)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.retry_after_s == 1.0
    assert "under way" in caught.value.message
    # What is held may be given back in a moment; what is spent is gone until the month ends.
    assert not caught.value.final
    await book.settle(held, Usage(1, 12, 1.5), ended_s=NOW_S)
    with pytest.raises(RateLimitExceededError) as caught:
        await book.reserve("3", NOBODY, BOUND)
    assert (caught.value.code, caught.value.final) == ("insufficient_quota", True)


@pytest.mark.parametrize(
    ("limits", "message", "code"),
    [
        (Limits(requests_per_min=1), "this key may use 1 requests per minute", None),
        (Limits(tokens_per_min=201), "this key may use 201 tokens per minute", None),
        (Limits(concurrent=1), "this key may use 1 requests at once; requests under way", None),
        (
            Limits(budget=3.0),
            "this key's budget of 3 units is used up; requests under way",
            "insufficient_quota",
        ),
    ],
)
async def test_claim_refusal_names_the_limit_of_the_key(
    limits: Limits, message: str, code: str
) -> None:
    book = ledger()
    tenant = Tenant("a", key="k1", limits=limits)
    await taken(book, "1", tenant)
    with pytest.raises(RateLimitExceededError) as caught:
        await taken(book, "2", tenant)
    assert caught.value.message.startswith(message)
    assert caught.value.code == (code or "rate_limit_exceeded")
    assert caught.value.retry_after_s is not None
    assert not caught.value.final
    # Another key of the same tenant has its own.
    await taken(book, "3", Tenant("a", key="k2", limits=limits))


async def test_claim_counts_all_keys_of_a_tenant_together() -> None:
    book = ledger(tenants={"a": {"requests_per_min": 2, "budget": {"amount": 100}}})
    for key in ("k1", "k2"):
        await taken(book, key, Tenant("a", key=key), UsageBound(1))
    with pytest.raises(RateLimitExceededError) as caught:
        await book.arrive("k3", Tenant("a", key="k3"))
    assert caught.value.message == "this tenant may use 2 requests per minute"
    assert set(await book.state()) == {"tenant/a"}


async def test_claim_larger_than_its_limit_raises_without_retry() -> None:
    book = ledger(tenants={"default": {"tokens_per_min": 50}})
    with pytest.raises(RateLimitExceededError) as caught:
        await book.reserve("1", NOBODY, BOUND)
    assert caught.value.retry_after_s is None
    assert caught.value.message.startswith("this request alone is larger")


async def test_arrive_counts_a_request_before_its_body_is_read() -> None:
    book = ledger(tenants={"default": {"requests_per_min": 2, "concurrent": 1}})
    held = await book.arrive("1", NOBODY)
    with pytest.raises(RateLimitExceededError, match="1 requests at once"):
        await book.arrive("2", NOBODY)
    await book.settle(held, Usage())
    await book.arrive("3", NOBODY)
    with pytest.raises(RateLimitExceededError, match="2 requests per minute"):
        await book.arrive("4", NOBODY)


async def test_settle_request_failed_by_the_service_does_not_count() -> None:
    book = ledger(tenants={"default": {"requests_per_min": 1}})
    await book.settle(await book.arrive("1", NOBODY), Usage(), counts=False, noted=False)
    await book.arrive("2", NOBODY)
    assert await book.usage(NOBODY, NOW_S, 1) == {}


async def test_look_up_has_its_own_allowance_of_equal_size() -> None:
    book = ledger(tenants={"default": {"requests_per_min": 2}})
    for number in range(2):
        await book.look_up(f"l{number}", NOBODY)
    with pytest.raises(RateLimitExceededError, match="2 requests per minute that ask no expert"):
        await book.look_up("l", NOBODY)
    await book.arrive("1", NOBODY)


@pytest.mark.parametrize(("places", "taken_up"), [(1, 1), (3, 3), (4, 4), (1024, 4)])
async def test_reserve_counts_concurrent_places_up_to_the_limit(places: int, taken_up: int) -> None:
    book = ledger(tenants={"default": {"concurrent": 4}})
    await taken(book, "1", NOBODY, UsageBound(0, places=places))
    ((_, balance),) = (await book.limits(NOBODY)).values()
    assert balance.reserved == taken_up
    for number in range(4 - taken_up):
        await book.arrive(f"more{number}", NOBODY)
    with pytest.raises(RateLimitExceededError, match="4 requests at once"):
        await book.arrive("one more", NOBODY)


@pytest.mark.parametrize(
    ("bound", "reserved"),
    [
        # Bounded by the client: that, and the prompt as it is likely to be.
        (UsageBound(4000, 50, 2, likely_prompt=1000), 1100),
        # Not bounded: what is usual.
        (UsageBound(4000, 130_000, 2, likely_prompt=1000, likely_tokens=64), 1128),
        (UsageBound(4000, 40, 2, likely_prompt=1000, likely_tokens=64), 1080),
        # More than the limit is usual: one may try.
        (UsageBound(4000, 130_000, 2, likely_prompt=1000, likely_tokens=9000), 5000),
    ],
)
async def test_reserve_token_rate_holds_the_expected_use(bound: UsageBound, reserved: int) -> None:
    book = ledger(tenants={"default": {"tokens_per_min": 5000}})
    held = await book.reserve("1", NOBODY, bound)
    ((_, balance),) = (await book.limits(NOBODY)).values()
    assert balance.reserved == reserved
    assert held.max_tokens == bound.max_tokens
