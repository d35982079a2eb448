"""Patterns and packing against every way of filling accelerators."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router_models.composition.engine_packings import maximal_patterns, pack

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 20))
def test_maximal_patterns_are_the_subsets_that_no_other_contains(
    sizes: list[int], room: int
) -> None:
    fitting = {
        tuple(sorted(some, reverse=True))
        for count in range(1, len(sizes) + 1)
        for some in itertools.combinations(sizes, count)
        if sum(some) <= room
    }
    most = {
        one
        for one in fitting
        if not any(one != other and Counter(one) <= Counter(other) for other in fitting)
    }
    found = maximal_patterns(sizes, room)
    assert found is not None
    assert set(found) == most
    assert len(found) == len(set(found))


def test_many_items_are_packed_without_a_deep_search() -> None:
    assert maximal_patterns(list(range(1, 2000)), 4000) is None
    found = pack([3, 2] * 2000, 2000, 5)
    assert found is not None
    assert all(len(items) == 2 for items in found)
    assert pack([3] * 2001, 2000, 5) is None


def test_maximal_patterns_beyond_the_limit_are_none() -> None:
    assert maximal_patterns(list(range(1, 40)), 60, most=50) is None
    assert maximal_patterns([5, 5, 7], 12, most=50) == [(7, 5), (5, 5)]


@given(SIZES, st.integers(1, 3), st.integers(1, 20), st.booleans())
def test_pack_finds_a_packing_where_there_is_one(
    sizes: list[int], bins: int, room: int, named: bool
) -> None:
    names = ["ab"[i % 2] for i in range(len(sizes))] if named else None

    def fits(ways: tuple[int, ...]) -> bool:
        held = [[i for i, b in enumerate(ways) if b == k] for k in range(bins)]
        return all(
            sum(sizes[i] for i in items) <= room
            and (names is None or len({names[i] for i in items}) == len(items))
            for items in held
        )

    possible = any(fits(ways) for ways in itertools.product(range(bins), repeat=len(sizes)))
    found = pack(sizes, bins, room, names=names)
    assert (found is not None) == possible
    if found is not None:
        assert sorted(i for items in found for i in items) == list(range(len(sizes)))
        where = {i: k for k, items in enumerate(found) for i in items}
        assert fits(tuple(where[i] for i in range(len(sizes))))
