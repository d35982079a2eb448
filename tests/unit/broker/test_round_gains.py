"""Learned gains of further rounds: the config's first, then that of the rounds that were held."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.round_gains import HeldRound, RoundGains
from service.config.recipes import RecipeConfig
from service.types import Recipe

shares = st.floats(0, 1)
rounds = st.builds(HeldRound, shares, shares, st.booleans())


def council(gain: float = 0.2, members: str = "abc") -> Recipe:
    settings = {"kind": "deliberate", "members": list(members), "deliberate": {"gain": gain}}
    return RecipeConfig.model_validate(settings).recipe()


@given(rounds)
def test_held_round_gains_no_more_than_was_in_doubt(held: HeldRound) -> None:
    assert 0 <= held.gained <= held.doubt <= 1
    if not held.changed:
        assert held.gained == 0


@given(st.lists(rounds, max_size=40), shares)
def test_round_gains_stay_shares_whatever_rounds_show(seen: list[HeldRound], prior: float) -> None:
    gains, recipe = RoundGains(), council(prior)
    assert gains.mean(recipe) == pytest.approx(prior)
    for held in seen:
        gains.observe(recipe, held)
    assert 0 <= gains.mean(recipe) <= 1
    assert 0 <= gains.draw(recipe, random.Random(1)) <= 1


@pytest.mark.parametrize(("true", "prior"), [(0.0, 0.5), (0.1, 0.6), (0.5, 0.05), (0.9, 0.2)])
def test_round_gains_come_to_what_rounds_put_right(true: float, prior: float) -> None:
    gains, recipe, draw = RoundGains(), council(prior), random.Random(3)
    for _ in range(1500):
        # Of answers with a doubt of 0.4, a round puts this share right, and everybody sees it.
        changed = draw.random() < 0.4 * true
        gains.observe(recipe, HeldRound(0.6, 1.0 if changed else 0.6, changed))
    assert gains.mean(recipe) == pytest.approx(0.4 * true, abs=0.08)
    drawn = [gains.draw(recipe, draw) for _ in range(400)]
    assert sum(drawn) / len(drawn) == pytest.approx(gains.mean(recipe), abs=0.01)
    assert len(set(drawn)) > 1 or gains.mean(recipe) == 0


def test_round_gains_are_of_each_recipe_and_forgotten_with_its_experts() -> None:
    gains, one, other = RoundGains(), council(), council(members="ade")
    for _ in range(50):
        gains.observe(one, HeldRound(0.5, 0.5, changed=False))
    assert gains.mean(one) < 0.1
    assert gains.mean(other) == pytest.approx(0.2)
    gains.forget({"d"})
    assert gains.mean(one) < 0.1
    gains.forget({"b"})
    assert gains.mean(one) == pytest.approx(0.2)


def test_round_gains_a_config_with_another_gain_begins_anew() -> None:
    gains, recipe = RoundGains(), council()
    gains.observe(recipe, HeldRound(0.0, 1.0, changed=True))
    assert recipe.deliberation is not None
    other = replace(recipe, deliberation=replace(recipe.deliberation, gain=0.7))
    assert gains.mean(other) == pytest.approx(0.7)
