"""The conversations that a pool's engines are likely to have in their prefix caches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.pool.cached_prefixes import CachedPrefixes

names = st.sampled_from(["a", "b", "c"])


@given(
    st.lists(
        st.tuples(st.text("xyz", max_size=2), names, st.integers(0, 300), st.sets(names)),
        max_size=20,
    )
)
def test_cached_prefixes_are_recent_and_of_experts_that_stayed_resident(
    steps: list[tuple[str, str, int, set[str]]],
) -> None:
    known, expected = CachedPrefixes(), dict[str, tuple[str, float]]()
    now_s = 0.0
    for prefix, expert, later_s, resident in steps:
        now_s += later_s
        known.record(prefix, expert, now_s)
        if prefix:
            expected[prefix] = expert, now_s
        expected = {
            prefix: (expert, at_s)
            for prefix, (expert, at_s) in expected.items()
            if now_s - at_s <= 600 and expert in resident
        }
        wire = known.to_wire(resident, now_s)
        assert wire == {prefix: expert for prefix, (expert, _) in expected.items()}
        assert known.to_wire(resident, now_s) is wire, "nothing has changed"


def test_cached_prefixes_are_bounded_and_the_oldest_go_first() -> None:
    known = CachedPrefixes()
    for i in range(3000):
        known.record(str(i), "a", 0.0)
    known.record("2000", "a", 1.0)
    wire = known.to_wire({"a"}, 1.0)
    assert len(wire) == 1024
    assert list(wire)[-1] == "2000"
    assert "1975" not in wire
    assert "2999" in wire
