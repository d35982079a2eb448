"""What a gateway knows of a pool, and its form on the wire.

One NDJSON line each: the whole state first, then only the fields that changed,
and a heartbeat (a line with nothing changed) at least every 250 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import orjson

from service.types import Residency

HEARTBEAT_S = 0.25
COALESCE_S = 0.05
STALE_S = 1.0
GONE_S = 3.0


@dataclass(frozen=True, slots=True)
class ExpertState:
    """One expert in one pool: where its weights are, and why not if it failed.

    `eta_s`: seconds until it answers, as far as known; 0 when it does.
    `swap_s`: how long putting it in another's place takes, 0 where it has a slot of its
    own. `slot`: which of the pool's slots it is in. `max_model_len`: context in tokens,
    0 until known.
    """

    state: Residency
    eta_s: float = 0.0
    swap_s: float = 0.0
    slot: int = 0
    reason: str = ""
    max_model_len: int = 0
    engine: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """Requests of one expert in a pool: waiting for a place, and running.

    `places`: of the engine, that all of them take together; a request has one for each of its
    answers. `waiting_tokens`: of the prompts that wait.
    """

    waiting: int = 0
    running: int = 0
    places: int = 0
    waiting_tokens: int = 0

    @property
    def ahead(self) -> int:
        """How many usual requests are before a new one."""
        return max(self.places, self.waiting + self.running)


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured, as moving averages, in seconds.

    To the first byte: `first_s`, and `per_token_s` more for each prompt token; between
    chunks: `chunk_s`. 0: not measured.
    """

    first_s: float = 0.0
    chunk_s: float = 0.0
    per_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool's state. `boot` is new whenever the pool's process is.

    `capacity`: requests that may run at once for each expert's slot. `acks`: the
    last sequence number received from each gateway.
    """

    boot: str
    kind: str
    seq: int = 0
    draining: bool = False
    experts: dict[str, ExpertState] = field(default_factory=dict)
    queues: dict[str, Queue] = field(default_factory=dict)
    capacity: dict[str, int] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    acks: dict[str, int] = field(default_factory=dict)


def encode(now: Snapshot, before: Snapshot | None) -> bytes:
    """One line: all of `now`, or what differs from `before`."""
    changed = {
        f.name: getattr(now, f.name)
        for f in fields(now)
        if before is None or f.name == "seq" or getattr(now, f.name) != getattr(before, f.name)
    }
    return orjson.dumps(changed) + b"\n"


_NESTED: dict[str, Any] = {"experts": ExpertState, "queues": Queue, "speeds": Speed}


def decode(line: bytes, before: Snapshot | None) -> Snapshot:
    """The state after a line. Raises ValueError on a line that isn't one of ours."""
    try:
        return _decode(orjson.loads(line), before)
    except (TypeError, AttributeError) as error:
        # Other fields than ours: a gateway and a pool of different versions.
        raise ValueError(f"not a snapshot of this version: {error}") from None


def _decode(data: Any, before: Snapshot | None) -> Snapshot:
    if not isinstance(data, dict) or (before is None and "boot" not in data):
        raise ValueError("a snapshot stream begins with a whole state")
    for name, kind in _NESTED.items():
        if name in data:
            data[name] = {key: kind(**value) for key, value in data[name].items()}
    for state in data.get("experts", {}).values():
        object.__setattr__(state, "state", Residency(state.state))
    return Snapshot(**data) if before is None else replace(before, **data)
