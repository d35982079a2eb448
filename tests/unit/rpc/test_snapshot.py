"""Snapshots on the wire."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed, decode, encode
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
    again = decode(encode(WHOLE, None), None)
    assert again == WHOLE
    assert again.experts["a"].state is Residency.LOADING


def test_snapshot_delta_has_only_changes() -> None:
    later = Snapshot(**{**_fields(WHOLE), "seq": 4, "queues": {"a": Queue(0, 3)}})
    line = encode(later, WHOLE)
    assert orjson.loads(line).keys() == {"seq", "queues"}
    assert decode(line, WHOLE) == later


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
        b'{"boot": "b", "kind": "k", "experts": {"a": {"state": "nowhere"}}}',
        b'{"boot": "b", "kind": "k", "experts": {"a": {"state": "disk", "more": 1}}}',
        b'{"boot": "b", "kind": "k", "queues": 3}',
        b'{"boot": "b", "kind": "k", "queues": {"a": 3}}',
        b'{"boot": "b", "kind": "k", "experts": [1]}',
    ],
)
def test_snapshot_invalid_line_raises_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line, None)


def _fields(snapshot: Snapshot) -> dict[str, Any]:
    return {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}
