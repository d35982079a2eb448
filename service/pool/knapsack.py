"""The 0/1 knapsack: which of several things to keep in a bounded space. Exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEPS = 4096


def keep(values: Sequence[float], sizes: Sequence[int], capacity: int) -> frozenset[int]:
    """Indices of the subset of greatest total value whose sizes fit in `capacity`.

    Dynamic programming over space (Bellman), vectorised over it. Where not
    everything fits, sizes are rounded up to 1/4096 of the capacity: the subset
    always fits, and it is the best for sizes so rounded. Things of value 0 or less
    are kept only where everything fits.
    """
    if len(values) != len(sizes):
        raise ValueError(f"{len(values)} values and {len(sizes)} sizes")
    if sum(sizes) <= capacity:
        return frozenset(range(len(sizes)))
    candidates = [i for i, v in enumerate(values) if v > 0 and sizes[i] <= capacity]
    if not candidates:
        return frozenset()
    if len({sizes[i] for i in candidates}) == 1:
        # One family: all the same size, so the most valuable ones.
        size = sizes[candidates[0]]
        room = len(candidates) if size == 0 else capacity // size
        return frozenset(sorted(candidates, key=lambda i: (-values[i], i))[:room])
    step = max(1.0, capacity / _STEPS)
    room = int(capacity / step)
    best = np.zeros(room + 1)
    taken = np.zeros((len(candidates), room + 1), dtype=bool)
    for row, i in enumerate(candidates):
        size = int(-(-sizes[i] // step))
        if size > room:
            continue
        with_it = best[: room + 1 - size] + values[i]
        better = with_it > best[size:]
        taken[row, size:] = better
        best[size:] = np.where(better, with_it, best[size:])
    kept = set()
    left = int(np.argmax(best))
    for row in range(len(candidates) - 1, -1, -1):
        if taken[row, left]:
            i = candidates[row]
            kept.add(i)
            left -= int(-(-sizes[i] // step))
    return frozenset(kept)
