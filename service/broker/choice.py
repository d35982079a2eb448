"""Choosing where a request goes. Pure: what is known of the pools comes in as data.

Every way to answer has a utility,

    U = Q − λ · (T + X)

Q: expected quality of the expert for this prompt, in [0, 1]; T: time to the answer in s
(loading or swapping, queue, prefill, decode); X: what a swap for it costs others, in s (there
and back, for each request waiting in that slot); λ: quality per second. The greatest
wins. The difference to the best if every expert were resident is unmet demand: by it
alone a cold expert gets loaded that each single request shies away from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.link.snapshot import STALE_S, ExpertState, Snapshot, Speed
from service.types import Residency

# Until an expert was measured.
_GUESS = Speed(first_s=0.2, chunk_s=0.02)


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a gateway knows of one pool.

    `unseen`: requests sent that the snapshot can't count yet, by expert.
    """

    boot: str
    snapshot: Snapshot
    age_s: float
    unseen: dict[str, int]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request wants: the experts that may answer with their expected quality in [0, 1],
    what a second is worth in quality, and about how many tokens the answer has.
    """

    quality: Mapping[str, float]
    time_price: float = 0.01
    tokens: int = 64


@dataclass(frozen=True, slots=True)
class Option:
    """A way to answer: an expert in a pool (`boot`), or a remote one (`boot` None).

    Times in s. wait_s: until its first token is begun; answer_s: from then to the end;
    displaced_s: what it costs others.
    """

    expert: str
    boot: str | None
    quality: float
    wait_s: float
    answer_s: float
    displaced_s: float
    utility: float


def answer_s(speed: Speed, tokens: int) -> float:
    """Prefill and decode, by measured speed."""
    first_s = speed.first_s or _GUESS.first_s
    return first_s + tokens * (speed.chunk_s or _GUESS.chunk_s)


def wait_s(view: PoolView, expert: str, tokens: int) -> float:
    """Loading or swapping, and the requests ahead: whole batches of them that must end first."""
    snapshot = view.snapshot
    state = snapshot.experts[expert]
    ahead = 0
    for name in _slot_mates(snapshot, state):
        queue = snapshot.queues.get(name)
        ahead += view.unseen.get(name, 0)
        ahead += queue.waiting + queue.running if queue is not None else 0
    capacity = max(1, snapshot.capacity.get(expert, 1))
    speed = snapshot.speeds.get(expert, _GUESS)
    batches, rest = divmod(ahead, capacity)
    # Those in the same batch cost little, but not nothing.
    share = rest / capacity * (speed.first_s or _GUESS.first_s)
    return state.eta_s + batches * answer_s(speed, tokens) + share


def displaced_s(view: PoolView, expert: str) -> float:
    """A swap there and back, for each request that waits or runs in that slot for others."""
    snapshot = view.snapshot
    state = snapshot.experts[expert]
    if state.state is Residency.DEVICE:
        return 0.0
    others = 0
    for name in _slot_mates(snapshot, state):
        queue = snapshot.queues.get(name)
        if name != expert and queue is not None:
            others += queue.waiting + queue.running
    return 2 * state.swap_s * others


def _slot_mates(snapshot: Snapshot, state: ExpertState) -> list[str]:
    return [name for name, other in snapshot.experts.items() if other.slot == state.slot]


def options(wish: Wish, remote: frozenset[str], views: Iterable[PoolView]) -> list[Option]:
    """Every way to answer, best first.

    A pool that drains or has failed to load the expert is none; one not heard of for
    over a second comes after all that were.
    """
    fresh: list[Option] = []
    stale: list[Option] = []
    known = list(views)
    for expert, quality in wish.quality.items():
        if expert in remote:
            fresh.append(Option(expert, None, quality, 0.0, 0.0, 0.0, quality))
            continue
        for view in known:
            if not _usable(view, expert):
                continue
            waiting = wait_s(view, expert, wish.tokens)
            speed = view.snapshot.speeds.get(expert, _GUESS)
            answering = answer_s(speed, wish.tokens)
            displacing = displaced_s(view, expert)
            utility = quality - wish.time_price * (waiting + answering + displacing)
            option = Option(expert, view.boot, quality, waiting, answering, displacing, utility)
            (stale if view.age_s > STALE_S else fresh).append(option)
    fresh.sort(key=_rank)
    stale.sort(key=_rank)
    return fresh + stale


def _rank(option: Option) -> tuple[float, float, str, str]:
    return -option.utility, option.wait_s, option.expert, option.boot or ""


def _usable(view: PoolView, expert: str) -> bool:
    state = view.snapshot.experts.get(expert)
    return state is not None and not view.snapshot.draining and state.state is not Residency.FAILED


def unmet(wish: Wish, chosen: Option, views: Iterable[PoolView]) -> tuple[str, float] | None:
    """The expert that would have won were all resident and idle, and by how much.

    None where that is the chosen one, or no pool could hold it.
    """
    best: tuple[float, str] | None = None
    known = list(views)
    for expert, quality in wish.quality.items():
        speeds = [
            view.snapshot.speeds.get(expert, _GUESS) for view in known if _usable(view, expert)
        ]
        if not speeds:
            continue
        answering = min(answer_s(speed, wish.tokens) for speed in speeds)
        utility = quality - wish.time_price * answering
        if best is None or utility > best[0]:
            best = utility, expert
    if best is None or best[1] == chosen.expert or best[0] <= chosen.utility:
        return None
    return best[1], best[0] - chosen.utility


def home(expert: str, views: Iterable[PoolView]) -> str | None:
    """The one pool to tell of an expert's unmet demand: where loading it displaces least.

    A pool that has it in memory or on its way comes first. Loads are compared by
    powers of two and ties broken by rendezvous hash of expert and pool, so that
    gateways with slightly different snapshots agree without talking.
    """

    def key(view: PoolView) -> tuple[int, int, bytes]:
        snapshot = view.snapshot
        state = snapshot.experts[expert]
        near = state.state in (Residency.DEVICE, Residency.HOST, Residency.LOADING)
        load = 0
        for name in _slot_mates(snapshot, state):
            queue = snapshot.queues.get(name)
            if name != expert and queue is not None:
                load += queue.waiting + queue.running
        digest = hashlib.blake2b(f"{expert}\0{view.boot}".encode(), digest_size=8).digest()
        return 0 if near else 1, load.bit_length(), digest

    able = [view for view in views if _usable(view, expert)]
    return min(able, key=key).boot if able else None


def failure_reason(expert: str, views: Iterable[PoolView]) -> str | None:
    """Why no pool has the expert, if every pool that should have it failed to load it."""
    reasons = []
    for view in views:
        state = view.snapshot.experts.get(expert)
        if state is None:
            continue
        if state.state is not Residency.FAILED:
            return None
        reasons.append(state.reason)
    return reasons[0] if reasons else None
