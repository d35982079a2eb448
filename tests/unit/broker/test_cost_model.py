"""Expected cost of calls and expected length of answers."""

from __future__ import annotations

import numpy as np
import pytest

from service.broker.cost_model import CostModel, PriorTokens
from service.broker.token_prices import Price
from service.gateway.request_record import ExpertCall


def market() -> CostModel:
    return CostModel(("big",), ("math",), {"big": Price(2, 10)})


def expected(of: CostModel, most: int | None = None) -> float:
    return float(of.expect("math", 10, most).tokens[0])


@pytest.mark.parametrize("bound", [1, 16, 100, 399])
def test_expected_length_of_truncated_answers_is_the_natural_length(bound: int) -> None:
    """Health checks and classifiers ask for a token; that says nothing of how long answers are."""
    learning = market()
    for _ in range(60):
        learning.observe("big", "math", 400)
    for _ in range(200):
        learning.observe("big", "math", bound, cut=True)
    assert expected(learning) == pytest.approx(400, rel=0.01)
    assert expected(learning, bound) == bound


@pytest.mark.parametrize("bounds", [[None], [None, 1], [None, 200], [None, 50, 50, 50, 50]])
@pytest.mark.parametrize("shape", ["exponential", "lognormal"])
def test_expected_length_is_the_mean_whatever_limits_some_requests(
    bounds: list[int | None], shape: str
) -> None:
    draw = np.random.default_rng(0)
    collected = []
    for _ in range(10):
        learning = market()
        for i in range(1500):
            natural = (
                draw.exponential(400)
                if shape == "exponential"
                else draw.lognormal(np.log(400) - 0.32, 0.8)
            )
            length = max(1, int(natural))
            bound = bounds[int(draw.integers(len(bounds)))]
            cut = bound is not None and length >= bound
            learning.observe("big", "math", bound if cut and bound else length, cut=cut)
            if i > 500 and i % 100 == 0:
                collected.append(expected(learning))
    assert np.mean(collected) == pytest.approx(400, rel=0.1)


def test_expected_length_of_only_truncated_answers_exceeds_every_limit() -> None:
    learning = market()
    for _ in range(50):
        learning.observe("big", "math", 512, cut=True)
    assert expected(learning) > 512
    only_short = market()
    only_short.observe("big", "math", 1, cut=True)
    assert expected(only_short) >= 64, "one token asked for is no length of answers"


def test_expected_cost_of_several_answers_counts_each_and_the_prompt_once() -> None:
    learning = market()
    learning.observe("big", "math", 100)
    one, three = learning.expect("math", 10, None), learning.expect("math", 10, None, 3)
    assert three.tokens[0] == one.tokens[0]
    assert three.cost[0] - one.cost[0] == pytest.approx(2 * 100 * 10 / 1e6)


@pytest.mark.parametrize(
    ("spent", "length", "cut"),
    [
        (ExpertCall("a", Price(), completion_tokens=99, most_tokens=100), 99, False),
        (ExpertCall("a", Price(), completion_tokens=100, most_tokens=100), 100, True),
        (ExpertCall("a", Price(), completion_tokens=300, answers=3, most_tokens=100), 100, True),
        (ExpertCall("a", Price(), completion_tokens=150, answers=3, most_tokens=100), 50, False),
        (ExpertCall("a", Price(), completion_tokens=7, ended=False), 7, True),
        (ExpertCall("a", Price()), 0, False),
    ],
)
def test_expert_call_length_and_cut_tell_how_it_ended(
    spent: ExpertCall, length: int, cut: bool
) -> None:
    assert (spent.length, spent.cut) == (length, cut)


def test_prior_tokens_count_until_answers_were_seen_and_lose_to_these() -> None:
    prior = PriorTokens(
        answer=np.array([[30.0, np.nan], [100.0, np.nan]]),
        added=np.array([20.0, 0.0]),
        most=np.array([np.inf, 12.0]),
    )
    prices = {"long": Price(1e6, 1e6), "short": Price(1e6, 1e6)}
    learning = CostModel(("long", "short"), ("math",), prices, prior=prior)
    # An unknown category takes the mean; an expert without records the guess, within its bound.
    assert learning.expect("", 10, None).tokens.tolist() == [30, 12]
    found = learning.expect("math", 10, None)
    assert found.tokens.tolist() == [100, 12]
    assert found.cost.tolist() == [10 + 20 + 100, 10 + 12]
    # The request's own bound replaces the expert's, and is a guess only where nothing is known.
    assert learning.expect("math", 10, 400).tokens.tolist() == [100, 400]
    assert learning.expect("math", 10, 40).tokens.tolist() == [40, 40]
    for _ in range(300):
        learning.observe("long", "math", 200)
    assert learning.expect("math", 10, None).tokens[0] == pytest.approx(200, rel=0.3)
    assert learning.expect("", 10, None).tokens[0] == 30
