"""The state of all pools as arrays, so that a selection among thousands of places is fast.

Rows are pools. A pool's row is brought up to date once for each of its snapshots. Columns are the
experts of a catalog. An expert that a pool does not have is marked as not usable there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.broker.rendezvous_hash import rendezvous_hash
from service.rpc.expert_latency import PRIOR
from service.rpc.snapshot import STALE_S, ExpertState, Queue, Snapshot, SnapshotDelta, Speed
from service.types import Residency

Floats = NDArray[np.float64]

# The id of a pool's process. None stands for the gateway's own pool of remote experts.
BootId = str | None
REMOTE: Final = None
# An expert in a pool.
Place = tuple[str, BootId]

_IDLE = Queue()
# Attributes of an enumeration are looked up slowly.
_DEVICE, _FAILED = Residency.DEVICE, Residency.FAILED
_UNMEASURED = (0.0, 0.0, 0.0, 0.0)
# The tables of a snapshot that a row is read from, but for its structure.
_TABLES = ("experts", "queues", "speeds", "idle_speeds")
# Rows of one pool's array.
_ETA, _FIRST, _PER_TOKEN, _CHUNK, _CAPACITY, _AHEAD, _DISPLACED, _USABLE, _CONTEXT, _PROMPTS = (
    range(10)
)
_IDLE_FIRST, _IDLE_PER_TOKEN, _IDLE_CHUNK, _FAR = range(10, 14)
_COLUMNS = 14
# Among pools where a cold expert would be ready at about the same time, within this share of it,
# a rendezvous hash of expert and pool chooses.
_ALIKE = 0.25
# The first token, each prompt token, each token; the same where nothing else runs.
_SPEED = slice(_FIRST, _CHUNK + 1)
_IDLE_SPEED = slice(_IDLE_FIRST, _IDLE_CHUNK + 1)
_PRIOR = np.array((PRIOR.first_s, PRIOR.per_token_s, PRIOR.chunk_s))


@dataclass(frozen=True, slots=True)
class PoolView:
    """The latest state of one pool.

    Attributes:
        boot: The pool's boot id; `REMOTE` for the gateway's own remote experts.
        snapshot: The pool's last snapshot.
        age_s: Age of the snapshot.
        unseen: Number of requests that were sent but that the snapshot does not count yet, by
            expert.
    """

    boot: BootId
    snapshot: Snapshot
    age_s: float
    unseen: dict[str, int]


def idle_view(experts: Sequence[str]) -> PoolView:
    """A pool where all these experts are resident and idle, for routing without a service."""
    states = {name: ExpertState(Residency.DEVICE, slot=i) for i, name in enumerate(experts)}
    return PoolView("idle", Snapshot(boot="idle", kind="idle", experts=states), 0.0, {})


@dataclass(frozen=True, slots=True)
class PoolMatrix:
    """The state of all pools. Arrays are (pools, experts), times in s.

    Attributes:
        boots: (pools,), boot ids.
        fresh: (pools,), whether the snapshot is at most a second old.
        usable: Whether the pool can serve the expert.
        eta: Time until the expert's weights are ready.
        first: Time to the first token of an empty prompt.
        per_token: Time to the first token, added for each prompt token.
        chunk: Time per token of the answer.
        capacity: Number of requests that may run at the same time.
        ahead: Number of sequences before a new request in the expert's slot.
        displaced: Time that a swap to the expert costs other requests, as a share: the requests
            that wait for the expert already have theirs.
        context: Tokens that prompt and answer may have together; 0 if unknown.
        prompts: Prompt tokens in the queue of the slot.
        idle_first: `first` where nothing else runs; 0 if that was never measured. The next two are
            like this.
        idle_per_token: `per_token` where nothing else runs.
        idle_chunk: `chunk` where nothing else runs.
        far: Time that counts against a pool in the order of a rendezvous hash of expert and pool,
            as a part of the time until the expert is ready there. It only chooses the pool. So cold
            experts spread over equal pools, and all gateways take the same pool for each of them.
    """

    boots: tuple[BootId, ...]
    fresh: NDArray[np.bool_]
    usable: NDArray[np.bool_]
    eta: Floats
    first: Floats
    per_token: Floats
    chunk: Floats
    capacity: Floats
    ahead: Floats
    displaced: Floats
    context: Floats
    prompts: Floats
    idle_first: Floats
    idle_per_token: Floats
    idle_chunk: Floats
    far: Floats


@dataclass(slots=True)
class PlaceFigures:
    """One expert in one pool, with the figures that `PoolMatrix` has of all."""

    eta: float
    first: float
    per_token: float
    chunk: float
    capacity: float
    ahead: float
    displaced: float
    usable: float
    context: float
    prompts: float
    idle_first: float
    idle_per_token: float
    idle_chunk: float
    far: float


class PoolStateTable:
    """Keeps the row of each pool. A new snapshot changes only what differs from the one before.

    Args:
        index: The column of each expert, as in the catalog.
    """

    def __init__(self, index: dict[str, int]) -> None:
        """Create an empty table."""
        self._index = index
        self._experts = {column: name for name, column in index.items()}
        self._rows: dict[BootId, _PoolRow] = {}
        # The pools of the last matrix, in its order; their rows write into one block of memory.
        self._boots: tuple[BootId, ...] = ()
        self._ordered: list[_PoolRow] = []
        self._block = np.empty((_COLUMNS, 0, len(index)))

    def update(self, boot: BootId, snapshot: Snapshot, delta: SnapshotDelta | None = None) -> None:
        """Bring a pool's row up to date, so that the next selection need not do it.

        Args:
            boot: The pool's boot id.
            snapshot: The pool's state.
            delta: What it changes; None where that is unknown.
        """
        self._row(boot).update(snapshot, delta)

    def to_matrix(self, views: Sequence[PoolView]) -> PoolMatrix:
        """The arrays of these pools, in the same order.

        They are the table's own, and show later updates, too: use them before the next one.
        """
        boots = tuple([view.boot for view in views])
        if boots != self._boots:
            self._lay_out(boots)
        for row, view in zip(self._ordered, views, strict=True):
            # Faster than a call that finds the same.
            if row.last is not view.snapshot:
                row.update(view.snapshot, None)
        table = self._block
        ahead = table[_AHEAD]
        if any(view.unseen for view in views):
            ahead = ahead.copy()
            for i, view in enumerate(views):
                if view.unseen:
                    self._count_unseen(ahead[i], view)
        return PoolMatrix(
            boots=boots,
            fresh=np.array([view.age_s <= STALE_S for view in views], dtype=bool),
            usable=table[_USABLE] > 0,
            eta=table[_ETA],
            first=table[_FIRST],
            per_token=table[_PER_TOKEN],
            chunk=table[_CHUNK],
            capacity=table[_CAPACITY],
            ahead=ahead,
            displaced=table[_DISPLACED],
            context=table[_CONTEXT],
            prompts=table[_PROMPTS],
            idle_first=table[_IDLE_FIRST],
            idle_per_token=table[_IDLE_PER_TOKEN],
            idle_chunk=table[_IDLE_CHUNK],
            far=table[_FAR],
        )

    def _lay_out(self, boots: tuple[BootId, ...]) -> None:
        """Put the rows of these pools into one block, each figure of all pools together."""
        self.keep(boots)
        # A row that is in this block no more must not write into the one that took its place.
        for row in self._ordered:
            row.figures = row.figures.copy()
        self._boots = boots
        self._block = np.empty((_COLUMNS, len(boots), len(self._index)))
        self._ordered = []
        for i, boot in enumerate(boots):
            row = self._row(boot)
            self._block[:, i] = row.figures
            row.figures = self._block[:, i]
            self._ordered.append(row)

    def _row(self, boot: BootId) -> _PoolRow:
        row = self._rows.get(boot)
        if row is None:
            row = self._rows[boot] = _PoolRow(self._index)
        return row

    def keep(self, boots: Sequence[BootId]) -> None:
        """Forget other pools than these, once there are many."""
        if len(self._rows) > 2 * len(boots) + 8:
            known = set(boots)
            self._rows = {boot: row for boot, row in self._rows.items() if boot in known}

    def place(self, view: PoolView, column: int) -> PlaceFigures:
        """Return the figures of the expert of a column in one pool, requests on their way included.

        They are the same as in the matrix of this view.
        """
        row = self._row(view.boot)
        row.update(view.snapshot, None)
        # In the order of the array's rows.
        found = PlaceFigures(*row.figures[:, column].tolist())
        if view.unseen:
            experts = view.snapshot.experts
            own = experts.get(self._experts[column])
            for name, count in view.unseen.items():
                if own is not None and name in experts and experts[name].slot == own.slot:
                    found.ahead += count
        return found

    def _count_unseen(self, ahead: Floats, view: PoolView) -> None:
        """Add the requests on their way to `ahead`, (experts,).

        A request counts for every expert of its slot, because they share one engine.
        """
        experts = view.snapshot.experts
        by_slot: dict[int, int] = {}
        for name, count in view.unseen.items():
            if name in experts:
                slot = experts[name].slot
                by_slot[slot] = by_slot.get(slot, 0) + count
        for name, state in experts.items():
            if state.slot in by_slot and name in self._index:
                ahead[self._index[name]] += by_slot[state.slot]


class _PoolRow:
    """One pool's row: the figures of its experts, brought up to date by each snapshot.

    The experts of the snapshot have arrays of their own, in the snapshot's order. Sums over a slot
    and averages over experts are computed from these arrays, in a few operations for all experts.

    Attributes:
        figures: (figures, experts of the catalog).
        last: The snapshot that they show.
    """

    def __init__(self, index: dict[str, int]) -> None:
        self._index = index
        self.last: Snapshot | None = None
        self._names: list[str] = []
        self._distance = np.zeros(0)
        self.figures = np.zeros((_COLUMNS, len(index)))
        self.figures[_CAPACITY] = 1.0

    def update(self, snapshot: Snapshot, delta: SnapshotDelta | None) -> None:
        """Take over a snapshot. With what it changes, only that is read."""
        last, self.last = self.last, snapshot
        if snapshot is last:
            return
        if delta is not None and delta.before is last and self._keeps_structure(snapshot, delta):
            keys = delta.changed
            # A table may have entries of an expert that the pool does not have (any more).
            touched = {
                table: [
                    name
                    for name in (*keys.get(table, ()), *delta.removed.get(table, ()))
                    if name in self._at
                ]
                for table in _TABLES
            }
            if snapshot.draining == last.draining and not any(touched.values()):
                return
        else:
            self._read_structure(snapshot)
            touched = dict.fromkeys(_TABLES, self._names)
        self._read_states(snapshot.experts, touched["experts"])
        self._read_queues(snapshot.queues, touched["queues"])
        if names := touched["speeds"]:
            self._read_speeds(self._speeds, snapshot.speeds, names)
            self._guess_speeds()
        if names := touched["idle_speeds"]:
            self._read_speeds(self._idle_speeds, snapshot.idle_speeds, names)
            self._values[_IDLE_SPEED] = self._idle_speeds[:3]
        self._write_figures(snapshot.draining)

    @staticmethod
    def _keeps_structure(snapshot: Snapshot, delta: SnapshotDelta) -> bool:
        """Whether experts, slots, capacities and shared weights are those of before."""
        before = delta.before.experts
        return (
            "experts" not in delta.removed
            and not any(
                name in delta.changed or name in delta.removed for name in ("shares", "capacity")
            )
            and all(
                name in before and before[name].slot == snapshot.experts[name].slot
                for name in delta.changed.get("experts", ())
            )
        )

    def _read_structure(self, snapshot: Snapshot) -> None:
        names = list(snapshot.experts)
        if names != self._names:
            hashes = [rendezvous_hash(name, snapshot.boot) for name in names]
            self._distance = _ALIKE * np.array(hashes)
        self._names = names
        self._at = {name: i for i, name in enumerate(names)}
        slots: dict[int, int] = {}
        weights: dict[str, int] = {}
        self._slot = np.array(
            [slots.setdefault(snapshot.experts[name].slot, len(slots)) for name in names], np.intp
        )
        self._weights = np.array(
            [weights.setdefault(snapshot.weights_of(name), len(weights)) for name in names], np.intp
        )
        known = [i for i, name in enumerate(names) if name in self._index]
        self._known = np.array(known, np.intp)
        self._column = np.array([self._index[names[i]] for i in known], np.intp)
        # Whether the pool has all experts of the catalog and no others, in its order.
        self._all_in_order = names == list(self._index)
        self._values = np.empty((_COLUMNS, len(names)))
        self._values[_CAPACITY] = [max(1, snapshot.capacity.get(name, 1)) for name in names]
        self.figures[_USABLE] = 0.0
        # Time until ready, time of a swap, context; whether it is not resident, and usable.
        self._states = np.zeros((5, len(names)))
        # Sequences ahead, requests, prompt tokens that wait.
        self._queues = np.zeros((3, len(names)))
        # Time to the first token, per prompt token, per token; whether it was measured.
        self._speeds = np.zeros((4, len(names)))
        self._idle_speeds = np.zeros((4, len(names)))

    def _read_states(self, states: dict[str, ExpertState], names: Sequence[str]) -> None:
        if names:
            self._states[:, self._positions(names)] = np.array(
                [
                    (
                        state.eta_s,
                        state.swap_s,
                        state.max_model_len,
                        state.state is not _DEVICE,
                        state.state is not _FAILED,
                    )
                    for state in map(states.__getitem__, names)
                ],
                float,
            ).T
            self._values[_ETA], self._values[_CONTEXT] = self._states[0], self._states[2]
            self._values[_USABLE] = self._states[4]
            np.multiply(self._distance, self._states[0], out=self._values[_FAR])

    def _read_queues(self, queues: dict[str, Queue], names: Sequence[str]) -> None:
        if names:
            self._queues[:, self._positions(names)] = np.array(
                [
                    (queue.ahead, queue.waiting + queue.running, queue.waiting_tokens)
                    for queue in (queues.get(name, _IDLE) for name in names)
                ],
                float,
            ).T
            ahead, requests, prompts = self._queues
            slot, weights = self._slot, self._weights
            self._own = np.bincount(weights, requests)[weights]
            self._others = np.bincount(slot, requests)[slot] - self._own
            self._values[_AHEAD] = np.bincount(slot, ahead)[slot]
            self._values[_PROMPTS] = np.bincount(slot, prompts)[slot]

    def _read_speeds(self, figures: Floats, speeds: dict[str, Speed], names: Sequence[str]) -> None:
        figures[:, self._positions(names)] = np.array(
            [
                _UNMEASURED
                if speed is None
                else (speed.first_s, speed.per_token_s, speed.chunk_s, 1.0)
                for speed in map(speeds.get, names)
            ]
        ).T

    def _guess_speeds(self) -> None:
        """Take the average of the measured experts for those that were not."""
        measured = self._speeds[3]
        count = measured.sum()
        guess = self._speeds[:3].sum(axis=1) / count if count else _PRIOR
        self._values[_SPEED] = np.where(measured > 0, self._speeds[:3], guess[:, None])

    def _positions(self, names: Sequence[str]) -> list[int]:
        return [self._at[name] for name in names]

    def _write_figures(self, draining: bool) -> None:
        if draining or not len(self._column):
            self.figures[_USABLE] = 0.0
            return
        values = self._values
        # The slot swaps to this expert and back. Both swaps delay the other experts' requests, and
        # are made once for all requests that wait for this one.
        swap, away = self._states[1], self._states[3]
        values[_DISPLACED] = 2 * swap * self._others * away / (1 + self._own)
        if self._all_in_order:
            self.figures[:] = values
        else:
            self.figures[:, self._column] = values[:, self._known]
