"""The state of all pools as arrays, so that a selection among thousands of places is fast.

Rows are pools. A pool's row is computed once for each of its snapshots. Columns are the experts of
a catalog. An expert that a pool does not have is marked as not usable there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.rpc.expert_latency import PRIOR
from service.rpc.snapshot import STALE_S, ExpertState, Queue, Snapshot, Speed
from service.types import Residency

Floats = NDArray[np.float64]

# The id of a pool's process. None stands for the gateway's own pool of remote experts.
BootId = str | None
REMOTE: Final = None
# An expert in a pool.
Place = tuple[str, BootId]

_IDLE = Queue()
_UNMEASURED = Speed()
# Rows of one pool's array.
_ETA, _FIRST, _PER_TOKEN, _CHUNK, _CAPACITY, _AHEAD, _DISPLACED, _USABLE, _CONTEXT, _PROMPTS = (
    range(10)
)
_IDLE_FIRST, _IDLE_PER_TOKEN, _IDLE_CHUNK = range(10, 13)
_COLUMNS = 13


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
    """The state of all pools at one moment. Arrays are (pools, experts), times in s.

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
        displaced: Time that a swap to the expert costs other requests.
        context: Tokens that prompt and answer may have together; 0 if unknown.
        prompts: Prompt tokens in the queue of the slot.
        idle_first: `first` where nothing else runs; 0 if that was never measured. The next two are
            like this.
        idle_per_token: `per_token` where nothing else runs.
        idle_chunk: `chunk` where nothing else runs.
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


class PoolStateTable:
    """Caches the row of each pool until the pool's next snapshot.

    Args:
        index: The column of each expert, as in the catalog.
    """

    def __init__(self, index: dict[str, int]) -> None:
        """Create an empty table."""
        self._index = index
        self._rows: dict[BootId, tuple[Snapshot, Floats]] = {}

    def to_matrix(self, views: Sequence[PoolView]) -> PoolMatrix:
        """Compute the arrays of these pools, in the same order."""
        if len(self._rows) > 2 * len(views) + 8:
            known = {view.boot for view in views}
            self._rows = {boot: row for boot, row in self._rows.items() if boot in known}
        width = len(self._index)
        table = np.empty((len(views), _COLUMNS, width))
        for i, view in enumerate(views):
            table[i] = self._row(view.boot, view.snapshot)
            if view.unseen:
                self._count_unseen(table[i, _AHEAD], view)
        return PoolMatrix(
            boots=tuple(view.boot for view in views),
            fresh=np.array([view.age_s <= STALE_S for view in views], dtype=bool),
            usable=table[:, _USABLE] > 0,
            eta=table[:, _ETA],
            first=table[:, _FIRST],
            per_token=table[:, _PER_TOKEN],
            chunk=table[:, _CHUNK],
            capacity=table[:, _CAPACITY],
            ahead=table[:, _AHEAD],
            displaced=table[:, _DISPLACED],
            context=table[:, _CONTEXT],
            prompts=table[:, _PROMPTS],
            idle_first=table[:, _IDLE_FIRST],
            idle_per_token=table[:, _IDLE_PER_TOKEN],
            idle_chunk=table[:, _IDLE_CHUNK],
        )

    def _row(self, boot: BootId, snapshot: Snapshot) -> Floats:
        held = self._rows.get(boot)
        if held is None or held[0] is not snapshot:
            held = snapshot, _row_of(snapshot, self._index)
            self._rows[boot] = held
        return held[1]

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


def _row_of(snapshot: Snapshot, index: dict[str, int]) -> Floats:
    row = np.zeros((_COLUMNS, len(index)))
    row[_CAPACITY] = 1.0
    queues, speeds = snapshot.queues, snapshot.speeds
    in_slot: dict[int, int] = {}
    requests: dict[int, int] = {}
    # Requests by the weights that answer them.
    own: dict[str, int] = {}
    prompts: dict[int, int] = {}
    for name, state in snapshot.experts.items():
        queue = queues.get(name, _IDLE)
        in_slot[state.slot] = in_slot.get(state.slot, 0) + queue.ahead
        calls = queue.waiting + queue.running
        requests[state.slot] = requests.get(state.slot, 0) + calls
        weights = snapshot.weights_of(name)
        own[weights] = own.get(weights, 0) + calls
        prompts[state.slot] = prompts.get(state.slot, 0) + queue.waiting_tokens
    guess = _guess(list(speeds.values()))
    columns = []
    values = []
    for name, state in snapshot.experts.items():
        at = index.get(name)
        if at is None or snapshot.draining or state.state is Residency.FAILED:
            continue
        speed = speeds.get(name, guess)
        idle = snapshot.idle_speeds.get(name, _UNMEASURED)
        ahead = in_slot[state.slot]
        others = requests[state.slot] - own[snapshot.weights_of(name)]
        # The slot swaps to this expert and back. Both swaps delay the other experts' requests.
        displaced = 0.0 if state.state is Residency.DEVICE else 2 * state.swap_s * others
        columns.append(at)
        values.append(
            (
                state.eta_s,
                speed.first_s,
                speed.per_token_s,
                speed.chunk_s,
                max(1, snapshot.capacity.get(name, 1)),
                ahead,
                displaced,
                1.0,
                state.max_model_len,
                prompts[state.slot],
                idle.first_s,
                idle.per_token_s,
                idle.chunk_s,
            )
        )
    if columns:
        row[:, columns] = np.array(values).T
    return row


def _guess(measured: list[Speed]) -> Speed:
    """Estimate the speed of an expert without measurements by the average of the others."""
    if not measured:
        return PRIOR
    share = 1.0 / len(measured)
    return Speed(
        share * sum(speed.first_s for speed in measured),
        share * sum(speed.chunk_s for speed in measured),
        share * sum(speed.per_token_s for speed in measured),
    )
