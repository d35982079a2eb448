"""Limits, budgets and usage: which apply to whom, and how a refusal is told."""

from __future__ import annotations

from typing import Any

import pytest

from service.broker.ledger import Bound, BudgetState, Ledger
from service.config import Config
from service.errors import TooMany
from service.store.memory import MemoryStore
from service.types import NOBODY, Limits, Tenant, Usage

NOW_S = 1_700_000_000.0
BOUND = Bound(100, 50, 2, prompt_cost=1.0, token_cost=0.04)


def ledger(**sections: Any) -> Ledger:
    config = Config.model_validate(
        {
            "experts": {"general": {"model": "m"}},
            "pools": {"cpu": {"engine": "simulated"}},
            **sections,
        }
    )
    return Ledger(config, MemoryStore(lambda: NOW_S))


async def test_without_limits_nothing_is_refused_but_all_is_noted() -> None:
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


async def test_a_named_budget_for_all_and_one_for_a_tenant() -> None:
    book = ledger(
        budgets={
            "all": {"amount": 10, "period": "day"},
            "a-hour": {"amount": 6, "window_s": 3600, "tenant": "a"},
        }
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


async def test_the_answer_is_clipped_to_what_is_left() -> None:
    book = ledger(budgets={"all": {"amount": 1.5, "period": "month"}})
    held = await book.reserve("1", NOBODY, BOUND)
    assert held.max_tokens == 12  # 1 + 12 · 0.04 of 1.5
    with pytest.raises(TooMany) as caught:
        await book.reserve("2", NOBODY, BOUND)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.retry_after_s == 1.0
    assert "under way" in caught.value.message


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
async def test_each_limit_of_a_key_is_named(limits: Limits, message: str, code: str) -> None:
    book = ledger()
    tenant = Tenant("a", key="k1", limits=limits)
    await book.reserve("1", tenant, BOUND)
    with pytest.raises(TooMany) as caught:
        await book.reserve("2", tenant, BOUND)
    assert caught.value.message.startswith(message)
    assert caught.value.code == (code or "rate_limit_exceeded")
    assert caught.value.retry_after_s is not None
    # Another key of the same tenant has its own.
    await book.reserve("3", Tenant("a", key="k2", limits=limits), BOUND)


async def test_a_tenant_s_limits_hold_for_all_its_keys_together() -> None:
    book = ledger(tenants={"a": {"requests_per_min": 2, "budget": {"amount": 100}}})
    for key in ("k1", "k2"):
        await book.reserve(key, Tenant("a", key=key), Bound(1))
    with pytest.raises(TooMany) as caught:
        await book.reserve("k3", Tenant("a", key="k3"), Bound(1))
    assert caught.value.message == "this tenant may use 2 requests per minute"
    assert set(await book.state()) == {"tenant/a"}


async def test_a_request_larger_than_its_limit_is_told_so() -> None:
    book = ledger(tenants={"default": {"tokens_per_min": 50}})
    with pytest.raises(TooMany) as caught:
        await book.reserve("1", NOBODY, BOUND)
    assert caught.value.retry_after_s is None
    assert caught.value.message.startswith("this request alone is larger")
