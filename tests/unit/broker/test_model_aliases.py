"""Patterns, precedence, and shares of an alias's requests."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.model_aliases import AliasTable, draw_target, matches, weights_for
from service.config.aliases import ResolvedAlias

LETTERS = "ab*"
names = st.text("ab", max_size=10)
weights = st.dictionaries(st.sampled_from("pqrst"), st.floats(0.01, 100), min_size=2, max_size=5)


@given(pattern=st.text(LETTERS, min_size=1, max_size=10), name=names)
def test_matches_as_a_regular_expression_would(pattern: str, name: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert matches(pattern, name) == (re.fullmatch(expression, name) is not None)


def test_matches_a_hostile_pattern_at_once() -> None:
    # A backtracking matcher would take 2**60 steps.
    assert not matches("*a" * 60 + "b", "a" * 128)


def to(target: str) -> ResolvedAlias:
    return ResolvedAlias(None, {target: 1})


@given(patterns=st.sets(st.text(LETTERS, min_size=1, max_size=6), min_size=1), name=names)
def test_find_takes_exact_names_then_the_longest_pattern(patterns: set[str], name: str) -> None:
    table = AliasTable({pattern: to(pattern) for pattern in patterns}, ())
    fitting = [pattern for pattern in patterns if matches(pattern, name)]
    found = table.find(name)
    if name in patterns:
        assert found == (name, to(name))
    elif not fitting:
        assert found is None
    else:
        assert found is not None
        assert found[0] in fitting
        assert len(found[0]) == max(map(len, fitting))


@pytest.mark.parametrize("name", ["taken", "auto", "auto:best", "auto/none", "auto:", "x" * 129])
def test_find_leaves_real_names_alone(name: str) -> None:
    assert AliasTable({"*": to("t")}, {"taken"}).find(name) is None


def test_find_equally_long_patterns_takes_the_first_of_the_config() -> None:
    table = AliasTable({"a*": to("1"), "*a": to("2"), "a*a": to("3")}, ())
    assert [table.find(name) for name in ("ab", "ba", "a")] == [
        ("a*", to("1")),
        ("*a", to("2")),
        ("a*", to("1")),
    ]
    assert table.find("aa") == ("a*a", to("3"))


@given(weights=weights, seed=st.text(max_size=8))
def test_draw_is_sticky_and_moves_only_the_sessions_it_must(
    weights: dict[str, float], seed: str
) -> None:
    drawn = draw_target(weights, seed)
    assert drawn in weights
    assert draw_target(dict(reversed(weights.items())), seed) == drawn
    for target in weights:
        rest = {name: weight for name, weight in weights.items() if name != target}
        if target != drawn:
            assert draw_target(rest, seed) == drawn
        grown = draw_target({**weights, target: weights[target] * 3}, seed)
        assert grown in (drawn, target)


def test_draw_follows_the_weights() -> None:
    given_weights = {"a": 70.0, "b": 25.0, "c": 5.0, "d": 0.0}
    count = 20_000
    drawn = [draw_target(given_weights, "prod", str(session)) for session in range(count)]
    for target, weight in given_weights.items():
        # Four standard deviations of a binomial share are at most 0.013 here.
        assert abs(drawn.count(target) / count - weight / 100) < 0.013


@given(
    weights=st.dictionaries(st.sampled_from("pqrst"), st.floats(0, 9), min_size=1),
    allowed=st.sets(st.sampled_from("pqrst")),
    left_out=st.sets(st.sampled_from("pqrst")),
)
def test_weights_never_hold_what_a_key_may_not_use(
    weights: dict[str, float], allowed: set[str], left_out: set[str]
) -> None:
    found = weights_for(ResolvedAlias("a", weights), allowed.__contains__, left_out)
    usable = {target for target in allowed if weights.get(target)}
    assert set(found) == (usable - left_out or usable)
    assert all(found[target] == weights[target] for target in found)
