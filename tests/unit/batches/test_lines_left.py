"""The lines that are left: each one starts once, whatever plans come meanwhile."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.batches.batch_types import LineChoice
from service.batches.lines_left import LinesLeft, by_model


def choices(models: str) -> list[LineChoice]:
    return [LineChoice(line, model, 0.5, 1.0 + line, 1.0) for line, model in enumerate(models)]


def test_lines_left_hands_out_the_lines_of_each_model_in_order() -> None:
    left = LinesLeft(choices("abab"), done={0})
    assert left.models == ["b", "a"]
    taken = [left.take(model) for model in "bab"]
    assert [choice and choice.line for choice in taken] == [1, 2, 3]
    assert left.under_way_cost == 2 + 3 + 4
    assert left.take("a") is None
    assert left.models == []
    for choice in taken:
        assert choice is not None
        left.ended(choice)
    assert left.under_way_cost == 0


@given(st.data(), st.integers(1, 30))
def test_lines_left_starts_every_line_once_while_plans_change(data: st.DataObject, n: int) -> None:
    left = LinesLeft(choices("".join(data.draw(st.sampled_from("abc")) for _ in range(n))))
    snapshot, started = left.snapshot(), []
    while models := left.models:
        action = data.draw(st.sampled_from(["take", "take", "look", "exchange"]))
        if action == "look":
            snapshot = left.snapshot()
            seen = [choice.line for each in snapshot for choice in each]
            assert sorted([*seen, *started]) == list(range(n))
            assert all(snapshot)
        elif action == "exchange":
            lines = [choice.line for each in snapshot for choice in each]
            # A plan of a snapshot, in which some lines have started since.
            made = [LineChoice(i, data.draw(st.sampled_from("abcd")), 0.5, 1.0, 1.0) for i in lines]
            left.exchange(by_model(made))
        else:
            choice = left.take(data.draw(st.sampled_from(models)))
            assert choice is not None
            started.append(choice.line)
            left.ended(choice)
    assert sorted(started) == list(range(n))
