"""Load, balance and cacheability of routed experts, compared with a direct computation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.moe.load_statistics import (
    CACHE_TIMES,
    SEGMENT,
    Cacheability,
    Ints,
    best_f1,
    cacheability,
    entropy_bits,
    evenness,
    imbalance,
)


def load_of(choices: Ints, experts: int) -> Ints:
    """How many tokens each of a layer's experts got."""
    return np.bincount(choices[choices >= 0], minlength=experts)


def random_choices(seed: int, layers: int, tokens: int, experts: int, k: int) -> Ints:
    chance = np.random.default_rng(seed)
    order = chance.random((layers, tokens, experts)).argsort(axis=2)
    return order[:, :, :k]


def slow_srp(choices: Ints, experts: int) -> float | None:
    """The best F1 of any threshold, pair by pair."""
    pairs = []
    for begin in range(len(choices) - SEGMENT + 1):
        segment = choices[begin : begin + SEGMENT]
        pairs += [sum(e in token for token in segment.tolist()) for e in range(experts)]
    uses = sum(pairs)
    if not uses:
        return None
    best = 0.0
    for least in range(1, SEGMENT + 1):
        taken = [count for count in pairs if count >= least]
        if taken:
            recall, precision = sum(taken) / uses, sum(taken) / (SEGMENT * len(taken))
            best = max(best, 2 * recall * precision / (recall + precision))
    return best


def slow_hits(choices: Ints, cache: int) -> int:
    """One layer's cache, expert by expert."""
    held: list[int] = []
    last: dict[int, int] = {}
    hits = 0
    for at, token in enumerate(choices.tolist()):
        needed = [e for e in token if e >= 0]
        missing = [e for e in needed if e not in held]
        free = max(0, cache - len(held))
        hits += len(needed) - len(missing) + min(free, len(missing))
        held += missing
        last.update(dict.fromkeys(needed, at))
        coming = [e for row in choices[at + 1 : at + SEGMENT].tolist() for e in row]
        others = [e for e in held if e not in needed]
        others.sort(key=lambda e: (coming.count(e), last[e], e))
        for gone in others[: max(0, len(held) - cache)]:
            held.remove(gone)
    return hits


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 60),
    experts=st.integers(2, 9),
    k=st.integers(1, 4),
    drop=st.booleans(),
    extra=st.integers(0, 4),
)
def test_cacheability_equals_the_direct_computation(
    seed: int, tokens: int, experts: int, k: int, drop: bool, extra: int
) -> None:
    k = min(k, experts)
    choices = random_choices(seed, 2, tokens, experts, k)
    if drop and k > 1:  # a token may be given fewer
        choices[:, ::3, -1] = -1
    cache = min(experts, k + extra)
    found = cacheability(choices, experts, cache=cache)
    for layer in range(2):
        slow = slow_srp(choices[layer], experts)
        assert found.srp(layer) == (slow if slow is None else pytest.approx(slow))
        assert found.hits[layer] == slow_hits(choices[layer], cache)
        assert found.uses[layer] == (choices[layer] >= 0).sum()


def test_srp_is_the_best_f1_of_any_subset() -> None:
    # Every set of (segment, expert) pairs, of a text with two segments and two experts.
    choices = random_choices(3, 1, SEGMENT + 1, 3, 1)
    counts = [
        int((choices[0, begin : begin + SEGMENT] == e).sum()) for begin in (0, 1) for e in range(3)
    ]
    best = 0.0
    for taken in product((0, 1), repeat=len(counts)):
        covered = sum(c for c, t in zip(counts, taken, strict=True) if t)
        best = max(best, 2 * covered / (SEGMENT * sum(taken) + sum(counts)))
    assert cacheability(choices, 3, cache=2).srp(0) == pytest.approx(best)


def test_statistics_of_perfectly_local_routing() -> None:
    choices = np.tile(np.array([2, 5]), (1, 64, 1))
    found = cacheability(choices, 8, cache=2)
    assert found.srp(0) == found.sch(0) == 1.0
    load = load_of(choices[0], 8)
    assert imbalance(load) == 4.0
    assert entropy_bits(load) == pytest.approx(1.0)
    assert evenness(load) == pytest.approx(1 / 3)


def test_statistics_of_uniformly_random_routing() -> None:
    choices = random_choices(1, 1, 4000, 8, 2)
    load = load_of(choices[0], 8)
    assert load.sum() == 8000
    assert imbalance(load) == pytest.approx(1.0, abs=0.1)
    assert evenness(load) == pytest.approx(1.0, abs=0.001)
    found = cacheability(choices, 8, cache=CACHE_TIMES * 2)
    # No better than taking everything (F1 of k/E), but for what chance makes local.
    srp, sch = found.srp(0), found.sch(0)
    assert srp is not None
    assert 0.4 < srp < 0.5
    # Knowing what comes, half of the experts serve more than half of the uses.
    assert sch is not None
    assert 0.5 < sch < 0.9


def test_statistics_of_routing_to_every_expert() -> None:
    choices = np.tile(np.arange(4), (1, 20, 1))
    found = cacheability(choices, 4, cache=4)
    assert found.srp(0) == found.sch(0) == 1.0
    load = load_of(choices[0], 4)
    assert imbalance(load) == 1.0
    assert entropy_bits(load) == pytest.approx(2.0)


def test_cacheability_hits_use_lookahead_within_a_segment() -> None:
    # 0 is not used again, 1 is: when 2 comes, 0 goes.
    choices = np.array([[[0], [1], [2], [1], [2], [0]]])
    assert cacheability(choices, 3, cache=2).hits.tolist() == [4]
    # Beyond the segment nothing is known: what was used longest ago goes.
    far = np.array([[[0], [1], [2], *[[2]] * (SEGMENT - 1), [0], [1]]])
    assert cacheability(far, 3, cache=2).hits.tolist() == [2 + SEGMENT - 1 + 0 + 1]


def test_srp_of_alternating_experts_is_two_thirds() -> None:
    # Two experts take turns: either both are taken (covers all, half in vain) or none is.
    choices = np.array([[[i % 2] for i in range(SEGMENT)]])
    assert cacheability(choices, 4, cache=1).srp(0) == pytest.approx(2 / 3)
    assert best_f1(np.bincount([8, 8, 0, 0], minlength=SEGMENT + 1)) == pytest.approx(2 / 3)


def test_cacheability_adds_up_and_empty_inputs_give_none() -> None:
    one, two = random_choices(1, 2, 40, 6, 2), random_choices(2, 2, 30, 6, 2)
    both = cacheability(one, 6, cache=4) + cacheability(two, 6, cache=4)
    assert both.uses.tolist() == [140, 140]
    assert both.segments.sum(axis=1).tolist() == [(25 + 15) * 6] * 2
    nothing = Cacheability.none(2)
    assert nothing.srp(0) is None
    assert nothing.sch(1) is None
    assert (both + nothing).srp(1) == both.srp(1)
    # Shorter than a segment: the cache says something, the segments nothing.
    short = cacheability(one[:, :5], 6, cache=4)
    assert short.srp(0) is None
    assert short.sch(0) is not None
    empty = np.zeros(6, np.int64)
    assert imbalance(empty) is entropy_bits(empty) is evenness(empty) is None


def test_cacheability_cache_smaller_than_top_k_raises() -> None:
    with pytest.raises(ValueError, match="a cache of 1 experts can't hold the 2"):
        cacheability(random_choices(1, 1, 4, 6, 2), 6, cache=1)


def test_entropy_of_known_loads() -> None:
    assert entropy_bits(np.array([1, 1, 2])) == pytest.approx(1.5)
    assert entropy_bits(np.array([7, 0, 0])) == 0.0
    assert evenness(np.array([1, 1, 2])) == pytest.approx(1.5 / math.log2(3))
