"""Slots of a layer: never too many, nothing in use is evicted, every expert is computed once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.expert_offload.slot_policies import POLICY_NAMES, PolicyName, slot_policy
from service.expert_offload.slot_table import Load, SlotTable


@st.composite
def _tables(draw: st.DrawFn) -> tuple[SlotTable, list[np.ndarray]]:
    experts = draw(st.integers(1, 9))
    slots = draw(st.integers(1, experts))
    policy = draw(st.sampled_from(POLICY_NAMES))
    row = st.lists(st.integers(0, 3), min_size=experts, max_size=experts)
    steps = draw(st.lists(row, min_size=1, max_size=12))
    table = SlotTable(experts, slots, slot_policy(policy, experts, slots))
    return table, [np.array(step, np.int64) for step in steps]


def _check(table: SlotTable) -> None:
    held = np.flatnonzero(table.slot_of >= 0)
    assert len(held) <= table.slots
    assert table.expert_in[table.slot_of[held]].tolist() == held.tolist()
    assert np.count_nonzero(table.expert_in >= 0) == len(held)


@given(_tables())
def test_passes_compute_each_expert_once_with_its_own_weights(
    case: tuple[SlotTable, list[np.ndarray]],
) -> None:
    table, steps = case
    # The expert whose weights lie in each slot, as a loader leaves them.
    memory = np.full(table.slots, -1)
    for tokens in steps:
        before = table.resident()
        computed: list[int] = []
        loaded: list[int] = []
        for part in table.passes(tokens):
            for load in part.loads:
                memory[load.slot] = load.expert
                loaded.append(load.expert)
            assert len(part.experts) <= table.slots
            assert memory[table.slot_of[list(part.experts)]].tolist() == list(part.experts)
            computed += part.experts
            _check(table)
        needed = np.flatnonzero(tokens)
        assert sorted(computed) == needed.tolist()
        assert sorted(loaded) == [e for e in needed if not before[e]]
        if len(needed) <= table.slots:
            assert table.resident()[needed].all()


@given(_tables(), st.data())
def test_prefetch_keeps_all_that_is_wanted(
    case: tuple[SlotTable, list[np.ndarray]], data: st.DataObject
) -> None:
    table, steps = case
    experts = len(table.slot_of)
    for tokens in steps:
        list(table.passes(tokens))
        wanted = np.array(data.draw(st.permutations(range(experts))), np.intp)
        wanted = wanted[: data.draw(st.integers(0, experts))]
        before = table.resident()
        loads = table.prefetch(wanted)
        _check(table)
        assert table.resident()[wanted[: table.slots]].all()
        assert not any(before[load.expert] for load in loads)


def test_forget_leaves_the_slot_empty_so_that_the_expert_is_loaded_again() -> None:
    table = SlotTable(4, 2, slot_policy("lru", 4, 2))
    tokens = np.array([1, 1, 0, 0], np.int64)
    (part,) = table.passes(tokens)
    table.forget(part.loads[1:])
    _check(table)
    (again,) = table.passes(tokens)
    assert again.loads == (Load(1, 1),)


@pytest.mark.parametrize("slots", [0, -1, 5])
def test_table_with_a_wrong_number_of_slots_is_refused(slots: int) -> None:
    with pytest.raises(ValueError, match="allowed are 1 to 4"):
        SlotTable(4, slots, slot_policy("lru", 4, 1))


@pytest.mark.parametrize(
    ("policy", "steps", "evicted"),
    [
        ("lru", [[0], [0], [0], [1]], 0),
        ("lfu", [[0], [0], [0], [1]], 1),
        ("segment", [[0], [0], [0], [1]], 1),
        # Old uses have lost their weight, but not those of the last segment.
        ("decay", [[0]] * 3 + [[1]] * 300, 0),
        ("lfu", [[0]] * 301 + [[1]] * 300, 1),
        ("segment", [[0]] * 300 + [[1]] * 16, 0),
        ("cacheable", [[0]] * 3 + [[1]] * 300, 0),
    ],
)
def test_policy_evicts_what_it_promises(
    policy: PolicyName, steps: list[list[int]], evicted: int
) -> None:
    table = SlotTable(3, 2, slot_policy(policy, 3, 2))
    for step in [*steps, [2]]:
        list(table.passes(np.bincount(step, minlength=3)))
    assert table.slot_of[evicted] == -1


def test_cacheable_follows_the_half_life_that_hits_most() -> None:
    from service.expert_offload.slot_policies import Cacheable

    stays, changes = Cacheable(8, 2), Cacheable(8, 2)
    chance = np.random.default_rng(1)
    for at in range(600):
        # One layer always draws from the same two of eight, with noise; the other moves on.
        often = chance.integers(2) if chance.random() < 0.7 else chance.integers(8)
        stays.observe(np.bincount([often], minlength=8))
        changes.observe(np.bincount([at // 12 % 8], minlength=8))
    assert stays.half_life_steps >= 32 > changes.half_life_steps
