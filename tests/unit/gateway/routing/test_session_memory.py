"""Sessions are bounded in number and age, and hold several conversations."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from service.gateway.request.conversation_turns import TurnState
from service.gateway.routing.session_memory import (
    MAX_TURNS,
    SessionMemory,
    SessionTurn,
    from_value,
    last_turn,
    merged,
    to_value,
)


def turn(digest: str, at_s: float, calls: tuple[str, ...] = (), expert: str = "a") -> SessionTurn:
    return SessionTurn(digest, expert, expert, "math", "boot", 10, at_s, calls)


def test_session_memory_bounds_the_sessions_of_each_tenant_alone() -> None:
    memory = SessionMemory()
    memory.put("quiet", "own", (turn("x", 1.0),), since_s=0, max_sessions=3)
    forgotten = []
    for i in range(10):
        kept = (turn("x", float(i)),)
        forgotten += memory.put("busy", str(i), kept, since_s=0, max_sessions=3)
    assert forgotten == [("busy", str(i)) for i in range(7)]
    assert len(memory) == 4
    assert memory.get("quiet", "own", since_s=0) == (turn("x", 1.0),)
    assert memory.get("busy", "9", since_s=0)
    assert not memory.get("quiet", "9", since_s=0)


def test_session_memory_forgets_old_sessions_of_every_tenant() -> None:
    memory = SessionMemory()
    for tenant in ("a", "b"):
        memory.put(tenant, "old", (turn("x", 10.0),), since_s=0, max_sessions=5)
    assert not memory.get("a", "old", since_s=10.5)
    memory.put("c", "new", (turn("x", 20.0),), since_s=10.5, max_sessions=5)
    assert len(memory) == 1


def test_session_memory_session_in_use_outlives_older_ones() -> None:
    memory = SessionMemory()
    for name, at_s in (("used", 1.0), ("idle", 2.0), ("used", 3.0), ("new", 4.0)):
        memory.put("a", name, (turn("x", at_s),), since_s=0, max_sessions=2)
    assert memory.get("a", "used", since_s=0)
    assert not memory.get("a", "idle", since_s=0)


def test_merged_keeps_the_newest_turn_of_each_conversation() -> None:
    several = [turn(str(i % 5), float(i)) for i in range(20)]
    found = merged(several[:10], several[10:])
    assert [one.at_s for one in found] == [19, 18, 17, 16, 15]
    assert len(merged(turn(str(i), float(i)) for i in range(50))) == MAX_TURNS


def test_last_turn_prefers_the_call_then_the_history_then_the_newest() -> None:
    turns = merged(
        [turn("h1", 1, ("c1",), "a"), turn("h2", 2, ("c2",), "b"), turn("h3", 3, (), "c")]
    )

    def found(state: TurnState) -> tuple[str | None, bool]:
        got, certain = last_turn(turns, state)
        return (None if got is None else got.expert), certain

    assert found(TurnState(history="h2", open=True, calls=frozenset({"c1"}))) == ("a", True)
    assert found(TurnState(history="h2", open=True, calls=frozenset({"c9"}))) == ("b", False)
    # A call without an id is known by the history alone.
    assert found(TurnState(history="h2", open=True)) == ("b", True)
    assert found(TurnState(history="h1")) == ("a", True)
    assert found(TurnState(history="h9")) == ("c", False)
    assert last_turn((), TurnState(history="h1")) == (None, False)


def test_session_value_is_read_as_it_was_written() -> None:
    turns = (turn("h", 2.0, ("c1", "c2")), SessionTurn("g", "b", "b", "", None, 0, 1.0))
    assert from_value(to_value(turns)) == turns


@pytest.mark.parametrize(
    "value", [None, b"", b"x", b"{}", b"[1]", b"[[]]", b'[["a"]]', b'[[1,2,3,4,5,"x",1,[]]]', b"3"]
)
def test_session_value_of_another_form_is_no_session(value: bytes | None) -> None:
    assert from_value(value) == ()


def test_session_value_reads_topics_and_what_was_written_without_them() -> None:
    told = replace(turn("x", 1.0, ("c",)), topics=(("math", 0.7), ("code", 0.2)))
    assert from_value(to_value((told,))) == (told,)
    before = orjson.loads(to_value((told,)))
    del before[0][-1]
    assert from_value(orjson.dumps(before)) == (replace(told, topics=()),)


@pytest.mark.parametrize("topics", [3, "math", [["math"]], [["math", "x"]], [["math", 7]], None])
def test_session_value_with_damaged_topics_is_no_session(topics: object) -> None:
    given = orjson.loads(to_value((turn("x", 1.0),)))
    given[0][-1] = topics
    assert from_value(orjson.dumps(given)) == ()
