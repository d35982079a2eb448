"""An exact solver of the 0/1 knapsack problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MOST_STATES = 4096
_STEPS = 4096
_EPSILON = 1e-12

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


def keep(values: Sequence[float], sizes: Sequence[int], capacity: int) -> frozenset[int]:
    """Choose the subset of greatest total value whose sizes fit in `capacity`.

    Items of value 0 or less are kept only where all items fit. The result is exact, with one
    exception: many items of different sizes and nearly equal value per byte give too many partial
    sums. Then sizes are rounded up to 1/4096 of the capacity.

    Args:
        values: The value of each item.
        sizes: The size of each item.
        capacity: The room for them.

    Returns:
        Indices of the kept items.

    Raises:
        ValueError: The numbers of values and sizes differ.
    """
    if len(values) != len(sizes):
        raise ValueError(f"{len(values)} values and {len(sizes)} sizes")
    if sum(sizes) <= capacity:
        return frozenset(range(len(sizes)))
    candidates = [i for i, v in enumerate(values) if v > 0 and sizes[i] <= capacity]
    free = [i for i in candidates if sizes[i] == 0]
    # The most valuable items per byte come first.
    rest = sorted((i for i in candidates if sizes[i] > 0), key=lambda i: (-values[i] / sizes[i], i))
    if sum(sizes[i] for i in rest) <= capacity:
        return frozenset(candidates)
    v = np.array([values[i] for i in rest], dtype=np.float64)
    s = np.array([sizes[i] for i in rest], dtype=np.int64)
    return frozenset([*free, *(rest[k] for k in _chosen(v, s, capacity))])


def _chosen(v: _Floats, s: _Ints, capacity: int) -> list[int]:
    """Choose the best subset of items that do not all fit. They are sorted by value per byte."""
    greedy, room = [], capacity
    for k, size in enumerate(s.tolist()):
        if size <= room:
            greedy.append(k)
            room -= size
    least = float(v[greedy].sum())
    # The relaxed problem, where a part of one item may be taken, has a known optimum. It bounds
    # the value of every choice with an item, or without that item. Where the bound does not
    # exceed the greedy value, the item is decided.
    held = np.cumsum(s)
    at = int(np.searchsorted(held, capacity, side="right"))
    before = int(held[at - 1]) if at else 0
    rate = v[at] / s[at]
    most = float(v[:at].sum() + (capacity - before) * rate)
    against = most - np.abs(v - s * rate)
    open_ = np.flatnonzero(against > least * (1 + _EPSILON))
    settled_in = [k for k in range(at) if against[k] <= least * (1 + _EPSILON)]
    base = float(v[settled_in].sum())
    left = capacity - int(s[settled_in].sum())
    found = _frontier(v[open_], s[open_], left, least - base)
    if found is None:
        found = _rounded(v[open_], s[open_], left)
    if base + float(v[open_[found]].sum()) <= least:
        return greedy
    return [*settled_in, *(int(open_[k]) for k in found)]


def _frontier(v: _Floats, s: _Ints, capacity: int, least: float) -> list[int] | None:
    """Choose the best subset item by item, and keep only undominated partial sums.

    A partial sum that can't exceed `least` any more is dropped.

    Returns:
        The indices of the subset, an empty list where no subset exceeds `least`, or None where
        there are too many sums.
    """
    sizes, worth = np.zeros(1, dtype=np.int64), np.zeros(1)
    held = np.concatenate(([0], np.cumsum(s)))
    value = np.concatenate(([0.0], np.cumsum(v)))
    steps: list[tuple[NDArray[np.intp], NDArray[np.bool_]]] = []
    for k in range(len(v)):
        fits = np.flatnonzero(sizes + s[k] <= capacity)
        parents = np.concatenate((np.arange(len(sizes)), fits))
        took = np.zeros(len(parents), dtype=bool)
        took[len(sizes) :] = True
        sizes = np.concatenate((sizes, sizes[fits] + s[k]))
        worth = np.concatenate((worth, worth[fits] + v[k]))
        order = np.lexsort((-worth, sizes))
        best = np.maximum.accumulate(worth[order])
        order = order[np.concatenate(([True], best[1:] > best[:-1]))]
        # The bound adds whole later items, and a part of one more item.
        room = capacity - sizes[order] + held[k + 1]
        upto = np.searchsorted(held, room, side="right") - 1
        whole = worth[order] + value[upto] - value[k + 1]
        least = max(least, float(whole.max()) * (1 - _EPSILON))
        more = np.minimum(upto, len(v) - 1)
        part = np.where(upto < len(v), (room - held[upto]) * (v[more] / s[more]), 0.0)
        order = order[whole + part > least]
        if len(order) > _MOST_STATES:
            return None
        if not len(order):
            return []
        sizes, worth = sizes[order], worth[order]
        steps.append((parents[order], took[order]))
    found, state = [], int(np.argmax(worth))
    for k in range(len(v) - 1, -1, -1):
        parents, took = steps[k]
        if took[state]:
            found.append(k)
        state = int(parents[state])
    return found


def _rounded(v: _Floats, s: _Ints, capacity: int) -> list[int]:
    """Choose the best subset by dynamic programming, with sizes rounded up to 1/4096."""
    step = max(1.0, capacity / _STEPS)
    room = int(capacity / step)
    sizes = [int(-(-size // step)) for size in s.tolist()]
    best = np.zeros(room + 1)
    taken = np.zeros((len(v), room + 1), dtype=bool)
    for k, size in enumerate(sizes):
        if size > room:
            continue
        with_it = best[: room + 1 - size] + v[k]
        better = with_it > best[size:]
        taken[k, size:] = better
        best[size:] = np.where(better, with_it, best[size:])
    found, left = [], int(np.argmax(best))
    for k in range(len(v) - 1, -1, -1):
        if taken[k, left]:
            found.append(k)
            left -= sizes[k]
    return found
