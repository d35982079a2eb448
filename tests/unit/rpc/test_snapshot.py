"""Snapshots on the wire."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rpc.snapshot import (
    ExpertState,
    Queue,
    Snapshot,
    Speed,
    decode,
    encode,
)
from service.types import Residency

WHOLE = Snapshot(
    boot="b",
    kind="cpu",
    seq=3,
    experts={"a": ExpertState(Residency.LOADING, eta_s=4.0, engine={"name": "vllm"})},
    queues={"a": Queue(1, 2)},
    capacity={"a": 8},
    speeds={"a": Speed(0.1, 0.01)},
    idle_speeds={"a": Speed(0.05, 0.005)},
    acks={"g": 7},
)


def test_snapshot_round_trips() -> None:
    again, _ = decode(encode(WHOLE, None), None)
    assert again == WHOLE
    assert again.experts["a"].state is Residency.LOADING


def test_snapshot_delta_has_only_changed_entries() -> None:
    two = replace(WHOLE, queues={"a": Queue(1, 2), "b": Queue(3)}, speeds={"a": Speed(1)})
    later = replace(two, seq=4, queues={"a": Queue(0, 3), "b": Queue(3)}, speeds={})
    line = encode(later, two)
    wire = orjson.loads(line)
    assert wire.keys() == {"seq", "changed", "removed"}
    assert wire["changed"].keys() == {"queues"}
    assert wire["changed"]["queues"].keys() == {"a"}
    assert wire["removed"] == {"speeds": ["a"]}
    decoded, _ = decode(line, two)
    assert decoded == later
    assert decoded.queues["b"] is two.queues["b"], "an entry that stays is the same object"
    assert decoded.experts is two.experts


names = st.sampled_from("abcd")
small = st.integers(0, 3)
snapshots = st.builds(
    Snapshot,
    st.just("b"),
    st.just("cpu"),
    seq=small,
    draining=st.booleans(),
    experts=st.dictionaries(
        names, st.builds(ExpertState, st.sampled_from(Residency), max_model_len=small, slot=small)
    ),
    queues=st.dictionaries(names, st.builds(Queue, small, small)),
    capacity=st.dictionaries(names, small),
    speeds=st.dictionaries(names, st.builds(Speed, small.map(float))),
    idle_speeds=st.dictionaries(names, st.builds(Speed, small.map(float))),
    acks=st.dictionaries(names, small),
    shares=st.dictionaries(names, names),
)


@given(st.lists(snapshots, min_size=1, max_size=6))
def test_snapshot_stream_decodes_to_what_was_encoded(states: list[Snapshot]) -> None:
    sent = received = None
    for state in states:
        before = received
        received, delta = decode(encode(state, sent), before)
        sent = state
        assert received == state
        if before is None:
            assert delta is None
            continue
        assert delta is not None
        assert delta.before is before
        for table in ("experts", "queues", "capacity", "speeds", "idle_speeds", "acks", "shares"):
            new, old = getattr(received, table), getattr(before, table)
            changed = {key for key in new if key not in old or new[key] != old[key]}
            assert {*delta.changed.get(table, ())} == changed
            assert {*delta.removed.get(table, ())} == old.keys() - new.keys()


@pytest.mark.parametrize(
    "line",
    [
        b'{"seq": 4, "changed": {"nothing": {}}}',
        b'{"seq": 4, "changed": {"queues": 3}}',
        b'{"seq": 4, "changed": {"queues": {"a": {"waiting": "many"}}}}',
        b'{"seq": 4, "changed": 3}',
        b'{"seq": 4, "removed": {"seq": ["a"]}}',
        b'{"seq": 4, "removed": {"queues": 3}}',
        b'{"seq": 4, "removed": {"queues": [[]]}}',
    ],
)
def test_snapshot_invalid_delta_raises_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a snapshot of this version"):
        decode(line, WHOLE)


def test_snapshot_heartbeat_is_short() -> None:
    assert encode(WHOLE, WHOLE) == b'{"seq":3}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"seq": 1}',
        b'{"boot": "b"}',
        b'{"boot": "b", "kind": "k", "unknown": 1}',
        b'{"boot": "b", "kind": "k", "changed": {"queues": {}}}',
        b'{"boot": "b", "kind": "k", "experts": {"a": {"state": "nowhere"}}}',
        b'{"boot": "b", "kind": "k", "experts": {"a": {"swap_s": 1}}}',
        b'{"boot": "b", "kind": "k", "queues": 3}',
        b'{"boot": "b", "kind": "k", "queues": {"a": 3}}',
        b'{"boot": "b", "kind": "k", "experts": [1]}',
    ],
)
def test_snapshot_invalid_line_raises_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line, None)


def test_snapshot_field_of_an_entry_that_is_not_known_is_left_out() -> None:
    line = b'{"boot": "b", "kind": "k", "experts": {"a": {"state": "disk", "more": 1}}}'
    assert decode(line, None)[0].experts == {"a": ExpertState(Residency.DISK)}
