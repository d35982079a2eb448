"""The bound on cost under any order of reservations and settlements."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_models.outcome_recording.cost_bound import (
    CostBound,
    CostBoundReachedError,
    WorstCase,
)
from service.broker.token_prices import Price, cost

AMOUNT = st.floats(0, 10, allow_nan=False)


@given(
    limit=st.floats(0, 30),
    spent=st.floats(0, 5),
    calls=st.lists(st.tuples(AMOUNT, st.floats(0, 1), st.integers(0, 3)), max_size=30),
    workers=st.integers(1, 6),
)
def test_cost_bound_is_never_passed_and_never_waits_for_ever(
    limit: float, spent: float, calls: list[tuple[float, float, int]], workers: int
) -> None:
    async def run() -> None:
        bound = CostBound(limit, spent)
        left = iter(calls)
        real = spent

        async def work() -> None:
            nonlocal real
            for worst, share, turns in left:
                try:
                    await bound.reserve(worst)
                except CostBoundReachedError:
                    assert bound.spent + worst > limit - 1e-5
                    return
                for _ in range(turns):
                    await asyncio.sleep(0)
                assert bound.spent + bound.reserved <= limit + 1e-12
                await bound.settle(worst, worst * share)
                real += worst * share

        async with asyncio.timeout(10):
            await asyncio.gather(*(work() for _ in range(workers)))
        assert bound.reserved == 0
        assert real <= max(limit, spent) + 1e-9
        assert bound.spent >= real - 1e-9

    asyncio.run(run())


@given(st.lists(st.text(max_size=200), min_size=1, max_size=4), st.integers(1, 500), st.data())
def test_worst_case_is_no_less_than_any_tokenizer_s_cost(
    texts: list[str], max_tokens: int, data: Any
) -> None:
    price = Price(3.0, 7.0)
    worst = WorstCase({"a": price})
    messages = [{"role": "user", "content": text} for text in texts]
    most = sum(len(text.encode()) for text in texts) + 1024
    prompt_tokens = data.draw(st.integers(0, most))
    answer = data.draw(st.integers(0, max_tokens))
    assert cost(price, prompt_tokens, answer) <= worst.of("a", messages, max_tokens)


def test_worst_case_learns_a_long_template() -> None:
    worst = WorstCase({"a": Price(1e6, 0.0), "b": Price(1e6, 0.0)})
    messages = [{"role": "user", "content": "hello"}]
    before = worst.of("a", messages, 1)
    worst.seen("a", messages, 5000)
    assert worst.of("a", messages, 1) >= 2 * 4995
    assert worst.of("b", messages, 1) == before
    worst.seen("a", messages, 20)
    assert worst.of("a", messages, 1) >= 2 * 4995


def test_cost_bound_without_a_limit_reserves_everything() -> None:
    async def run() -> float:
        bound = CostBound()
        await bound.reserve(1e12)
        await bound.settle(1e12, 2.5)
        return bound.spent

    assert asyncio.run(run()) == pytest.approx(2.5)
