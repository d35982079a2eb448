"""When experts have been idle for long enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.pool.slots.idle_unload import IdlePolicy, longest_limit

limits = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.0, 1.0, 5.0, 60.0]))
used = st.dictionaries(st.sampled_from("abc"), st.floats(0, 100))


@given(limits=limits, used=used, names=st.sets(st.sampled_from("abc")), now_s=st.floats(100, 200))
def test_due_means_that_every_expert_was_idle_for_its_own_limit(
    limits: dict[str, float], used: dict[str, float], names: set[str], now_s: float
) -> None:
    due = IdlePolicy(limits).is_due(names, used, now_s)
    each = [IdlePolicy(limits).is_due([name], used, now_s) for name in names]
    assert due == (bool(names) and all(each))
    for name, alone in zip(names, each, strict=True):
        limit_s = limits.get(name, 0.0)
        assert alone == (limit_s > 0 and name in used and now_s - used[name] >= limit_s)
    if due:
        # Once due, it stays due until somebody asks.
        assert IdlePolicy(limits).is_due(names, used, now_s + 1)


@given(given_s=st.lists(st.floats(0, 100)))
def test_longest_limit_is_never_where_any_name_is_never(given_s: list[float]) -> None:
    found = longest_limit(given_s)
    if not given_s or 0.0 in given_s:
        assert found == 0.0
    else:
        assert found == max(given_s)
