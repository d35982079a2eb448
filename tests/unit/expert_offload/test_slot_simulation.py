"""Simulated expert slots against exhaustive search and the bound of Belady."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.expert_offload.slot_policies import POLICY_NAMES, PolicyName
from service.expert_offload.slot_simulation import (
    PREFETCH_NAMES,
    GateTrace,
    OffloadOutcome,
    PrefetchName,
    belady,
    gap_closed,
    one_by_one,
    prefetch_accuracy,
    simulate,
    step_counts,
)


@st.composite
def _traces(draw: st.DrawFn, *, experts: int = 6, layers: int = 2) -> GateTrace:
    steps = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=10)))
    k = draw(st.integers(1, 2))
    size = layers * sum(steps) * k
    numbers = st.lists(st.integers(-1, experts - 1), min_size=size, max_size=size)
    shape = (layers, sum(steps), k)
    choices, predicted = (np.array(draw(numbers), np.int16).reshape(shape) for _ in range(2))
    return GateTrace(experts, choices, steps, predicted)


def _fewest(trace: GateTrace, slots: int) -> int:
    """The fewest loads, by trying everything that can be left in the slots after each step."""
    needed = [
        [frozenset(np.flatnonzero(step).tolist()) for step in layer]
        for layer in step_counts(trace, trace.choices)
    ]

    def search(steps: list[frozenset[int]]) -> int:
        @cache
        def best(at: int, held: frozenset[int]) -> int:
            if at == len(steps):
                return 0
            now = steps[at]
            union = sorted(held | now)
            size = min(slots, len(union))
            left = [frozenset(kept) for kept in combinations(union, size)]
            if len(now) <= slots:
                left = [kept for kept in left if now <= kept]
            return len(now - held) + min(best(at + 1, kept) for kept in left)

        return best(0, frozenset())

    return sum(search(steps) for steps in needed)


@given(_traces(experts=4), st.integers(1, 4))
def test_belady_is_the_fewest_loads_of_all(trace: GateTrace, slots: int) -> None:
    assert belady(trace, slots).loads == _fewest(trace, slots)


@given(_traces(), st.integers(1, 6), st.sampled_from(POLICY_NAMES))
def test_no_policy_beats_belady(trace: GateTrace, slots: int, policy: PolicyName) -> None:
    outcome, best = simulate(trace, slots, policy), belady(trace, slots)
    assert outcome.uses == best.uses
    assert outcome.loads == outcome.waits >= best.loads
    assert outcome.hit_rate <= best.hit_rate


@given(_traces(), st.integers(1, 6), st.sampled_from(POLICY_NAMES), st.sampled_from(PREFETCH_NAMES))
def test_loads_are_never_fewer_than_belady_with_prefetching(
    trace: GateTrace, slots: int, policy: PolicyName, prefetch: PrefetchName
) -> None:
    # An expert that is fetched ahead is still loaded, so prefetching hides loads and saves none.
    outcome = simulate(trace, slots, policy, prefetch)
    assert outcome.loads >= belady(trace, slots).loads
    assert outcome.waits <= outcome.loads


@given(_traces(), st.sampled_from(POLICY_NAMES))
def test_with_a_slot_for_each_expert_each_is_loaded_once(
    trace: GateTrace, policy: PolicyName
) -> None:
    used = (step_counts(trace, trace.choices).sum(axis=1) > 0).sum()
    assert simulate(trace, trace.experts, policy).loads == used


@given(_traces(), st.sampled_from(POLICY_NAMES))
def test_right_predictions_leave_nothing_to_wait_for_behind_the_first_layer(
    trace: GateTrace, policy: PolicyName
) -> None:
    known = GateTrace(trace.experts, trace.choices, trace.steps, trace.choices)
    first = GateTrace(trace.experts, trace.choices[:1], trace.steps)
    waits = simulate(known, trace.experts, policy, "next_gate").waits
    assert waits == simulate(first, trace.experts, policy).waits


@given(_traces())
def test_step_counts_count_every_choice(trace: GateTrace) -> None:
    counts = step_counts(trace, trace.choices)
    start = 0
    for at, length in enumerate(trace.steps):
        for layer in range(trace.layers):
            chosen = trace.choices[layer, start : start + length]
            expected = np.bincount(chosen[chosen >= 0], minlength=trace.experts)
            assert counts[layer, at].tolist() == expected.tolist()
        start += length


def test_prefetch_accuracy_is_the_share_of_predicted_uses() -> None:
    choices = np.array([[[0, 1]], [[0, 1]], [[2, -1]]], np.int16)
    predicted = np.array([[[3, 3]], [[1, 2]], [[2, 0]]], np.int16)
    assert prefetch_accuracy(GateTrace(4, choices, (1,), predicted)) == (0.5, 1.0)


def test_one_by_one_generates_texts_together_until_each_ends() -> None:
    long, short = (np.full((1, n, 1), n, np.int16) for n in (3, 1))
    trace = one_by_one([long, short, short], 4, at_once=2)
    assert trace.steps == (2, 1, 1, 1)
    assert trace.choices[0, :, 0].tolist() == [3, 1, 3, 3, 1]


def test_gap_closed_is_none_without_a_gap() -> None:
    lru, half, best = (OffloadOutcome(10, waits, waits, 5) for waits in (8, 6, 4))
    assert gap_closed(half, lru, best) == 0.5
    assert gap_closed(lru, lru, lru) is None
    assert half.bytes_per_token(10) == 12


@pytest.mark.parametrize(
    ("choices", "steps", "predicted", "message"),
    [
        ([[[0]]], (2,), None, "the steps have 2 tokens"),
        ([[[0]]], (1, 0), None, "every step needs a token"),
        ([[[4]]], (1,), None, "not in -1 to 3"),
        ([[[0]]], (1,), [[[9]]], "not in -1 to 3"),
        ([[[0]]], (1,), [[[0, 1]]], "both must be the same"),
    ],
)
def test_wrong_trace_is_refused(
    choices: list, steps: tuple[int, ...], predicted: list | None, message: str
) -> None:
    guess = None if predicted is None else np.array(predicted, np.int16)
    with pytest.raises(ValueError, match=message):
        GateTrace(4, np.array(choices, np.int16), steps, guess)


def test_missing_predictions_and_texts_are_refused() -> None:
    trace = GateTrace(4, np.zeros((1, 1, 1), np.int16), (1,))
    for missing in (
        lambda: simulate(trace, 1, "lru", "next_gate"),
        lambda: prefetch_accuracy(trace),
    ):
        with pytest.raises(ValueError, match="no predictions"):
            missing()
    with pytest.raises(ValueError, match="no choices"):
        one_by_one([], 4, 1)
