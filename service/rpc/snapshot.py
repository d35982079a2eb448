"""Snapshots of a pool for gateways, and their wire format.

The format is a stream of NDJSON lines. The first line has the whole state, and each further line
has what changed: whole fields, or entries of fields that are tables by expert. A line without
changes serves as a heartbeat. There is a line at least every 250 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgspec

from service.types import Residency

HEARTBEAT_S = 0.25
COALESCE_S = 0.05
STALE_S = 1.0
GONE_S = 3.0


class ExpertState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One expert in one pool.

    Attributes:
        state: Where its weights are.
        eta_s: Estimated seconds until it can answer; 0 if it can answer now.
        swap_s: Seconds that a swap to it takes; 0 if it has its own slot.
        slot: Number of its slot in the pool.
        reason: Why it failed; empty if it did not.
        released: Whether its memory was given back until somebody asks for it.
        max_model_len: Context in tokens; 0 if it is unknown.
        engine: Properties of its engine, for display.
    """

    state: Residency
    eta_s: float = 0.0
    swap_s: float = 0.0
    slot: int = 0
    reason: str = ""
    released: bool = False
    max_model_len: int = 0
    engine: dict[str, str] = {}


class Queue(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Requests of one expert in a pool.

    Attributes:
        waiting: Requests in the queue.
        running: Requests in the engine.
        places: Sequences that all of these requests take in the engine, usually one per answer.
        waiting_tokens: Prompt tokens in the queue.
        batch_waiting: Those of `waiting` that are lines of batches.
        batch_running: Those of `running` that are lines of batches.
    """

    waiting: int = 0
    running: int = 0
    places: int = 0
    waiting_tokens: int = 0
    batch_waiting: int = 0
    batch_running: int = 0

    @property
    def ahead(self) -> int:
        """Number of sequences that come before a new request. Waiting lines of batches do not."""
        return max(self.places, self.waiting + self.running) - self.batch_waiting

    @property
    def people(self) -> int:
        """Number of requests that are no lines of batches."""
        return self.waiting + self.running - self.batch_waiting - self.batch_running

    def without(self, other: Queue) -> Queue:
        """Return this queue without the requests of a part of it."""
        return Queue(
            self.waiting - other.waiting,
            self.running - other.running,
            self.places - other.places,
            self.waiting_tokens - other.waiting_tokens,
            self.batch_waiting - other.batch_waiting,
            self.batch_running - other.batch_running,
        )


class Speed(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Measured latencies in seconds, as moving averages; 0 without measurements.

    Attributes:
        first_s: Time to the first byte for an empty prompt.
        chunk_s: Time between two chunks.
        per_token_s: Additional time to the first byte for each prompt token.
    """

    first_s: float = 0.0
    chunk_s: float = 0.0
    per_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a pool.

    Attributes:
        boot: Id of the pool's process, new for every process.
        kind: Kind of the pool.
        seq: Sequence number of this state.
        draining: Whether the pool is stopping.
        added: Revision of the added experts that the pool has.
        experts: State of each expert.
        queues: Requests of each expert.
        capacity: Requests that may run at once, by expert.
        speeds: Measured latencies of each expert.
        idle_speeds: The same of requests that had the engine to themselves.
        acks: Last call number received from each gateway.
        shares: The experts that another expert's weights answer for, each with that expert.
        prefixes: Digests of conversations that are likely to be in a prefix cache, each with the
            expert that answered.
    """

    boot: str
    kind: str
    seq: int = 0
    draining: bool = False
    added: int = 0
    experts: dict[str, ExpertState] = field(default_factory=dict)
    queues: dict[str, Queue] = field(default_factory=dict)
    capacity: dict[str, int] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    idle_speeds: dict[str, Speed] = field(default_factory=dict)
    acks: dict[str, int] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    def weights_of(self, expert: str) -> str:
        """Return the expert whose weights answer for an expert: usually itself."""
        return self.shares.get(expert, expert)


_TABLES = ("experts", "queues", "capacity", "speeds", "idle_speeds", "acks", "shares", "prefixes")
_FIELDS = tuple(f.name for f in fields(Snapshot) if f.name != "seq")


@dataclass(frozen=True, slots=True)
class SnapshotDelta:
    """What differs between two snapshots of one stream.

    Attributes:
        before: The earlier snapshot.
        changed: By table, the keys of entries that are new or have another value.
        removed: By table, the keys that are gone.
    """

    before: Snapshot
    changed: Mapping[str, Collection[str]]
    removed: Mapping[str, Collection[str]]


def encode(now: Snapshot, before: Snapshot | None) -> bytes:
    """Encode a snapshot as a line. With `before`, the line has only the differences from it.

    Fields of entries that have their defaults are left out.
    """
    if before is None:
        return msgspec.json.encode(now) + b"\n"
    line: dict[str, Any] = {"seq": now.seq}
    changed: dict[str, dict[str, Any]] = {}
    removed: dict[str, list[str]] = {}
    for name in _FIELDS:
        new, old = getattr(now, name), getattr(before, name)
        if new is old or new == old:
            continue
        if name not in _TABLES:
            line[name] = new
            continue
        # Most entries are the same objects, which is found faster than that they are equal.
        if entries := {
            key: value
            for key, value in new.items()
            if (before_it := old.get(key)) is not value and before_it != value
        }:
            changed[name] = entries
        if gone := [key for key in old if key not in new]:
            removed[name] = gone
    if changed:
        line["changed"] = changed
    if removed:
        line["removed"] = removed
    return msgspec.json.encode(line) + b"\n"


class _Tables(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Entries of a snapshot's tables; None for a table without any."""

    experts: dict[str, ExpertState] | None = None
    queues: dict[str, Queue] | None = None
    capacity: dict[str, int] | None = None
    speeds: dict[str, Speed] | None = None
    idle_speeds: dict[str, Speed] | None = None
    acks: dict[str, int] | None = None
    shares: dict[str, str] | None = None
    prefixes: dict[str, str] | None = None


class _Line(_Tables, forbid_unknown_fields=True):
    """A line of the stream, with the fields of a snapshot that it tells of."""

    boot: str | None = None
    kind: str | None = None
    seq: int | None = None
    draining: bool | None = None
    added: int | None = None
    changed: _Tables | None = None
    removed: dict[str, list[str]] = {}


_DECODER = msgspec.json.Decoder(_Line)
_LINE_FIELDS = ("boot", "kind", "seq", "draining", "added", *_TABLES)


def decode(line: bytes, before: Snapshot | None) -> tuple[Snapshot, SnapshotDelta | None]:
    """Decode a line.

    An entry that did not change is the same object in both snapshots, and so is a table. Fields of
    entries that this version does not know are left out.

    Args:
        line: The line.
        before: The snapshot of the previous line; None for the first line.

    Returns:
        The whole state after this line, and what differs from `before`; None where the line has
        whole tables.

    Raises:
        ValueError: The line is not valid.
    """
    try:
        wire = _DECODER.decode(line)
    except msgspec.MsgspecError as error:
        # The line has unknown fields, because gateway and pool have different versions.
        raise ValueError(f"not a snapshot of this version: {error}") from None
    data: dict[str, Any] = {
        name: value for name in _LINE_FIELDS if (value := getattr(wire, name)) is not None
    }
    if before is None:
        if wire.boot is None or wire.kind is None or wire.changed is not None or wire.removed:
            raise ValueError("a snapshot stream begins with a whole state")
        return Snapshot(**data), None
    whole = any(name in data for name in _TABLES)
    changed: dict[str, dict[str, Any]] = {}
    if wire.changed is not None:
        for name in _TABLES:
            if (entries := getattr(wire.changed, name)) is not None:
                changed[name] = entries
                data[name] = {**getattr(before, name), **entries}
    for name, keys in wire.removed.items():
        if name not in _TABLES:
            raise ValueError(f"not a snapshot of this version: it has no table {name!r}")
        table = data[name] if name in changed else dict(getattr(before, name))
        for key in keys:
            table.pop(key, None)
        data[name] = table
    after = replace(before, **data)
    return after, None if whole else SnapshotDelta(before, changed, wire.removed)
