"""Ways to fill equal accelerators with engines of their own units. Pure.

A pattern is a multiset of sizes that fits one accelerator. Of patterns only the maximal ones count
(Gilmore and Gomory, 1961): a slot may stay empty or hold something smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Pattern = tuple[int, ...]

MAX_PATTERNS = 4000
# Both searches are recursive, by sizes and by items.
_MOST_SIZES = 400
_MOST_ITEMS = 400


def maximal_patterns(
    sizes: Sequence[int], room: int, most: int = MAX_PATTERNS
) -> list[Pattern] | None:
    """List the maximal patterns of these sizes that fit in `room`, largest size first.

    Args:
        sizes: The size of each item; a pattern uses a size at most as often as items have it.
        room: The room of one accelerator.
        most: The most patterns to list.

    Returns:
        The patterns, or None where there are more than `most`.
    """
    counts = Counter(size for size in sizes if size <= room)
    distinct = sorted(counts, reverse=True)
    if len(distinct) > _MOST_SIZES:
        return None
    smallest = distinct[-1] if distinct else 0
    found: list[Pattern] = []
    steps = 0

    def fill(at: int, left: int, taken: list[int]) -> bool:
        nonlocal steps
        steps += 1
        if len(found) > most or steps > 50 * most:
            return False
        if at == len(distinct):
            # Maximal: no size that was left over would still fit.
            used = Counter(taken)
            if taken and not any(size <= left and used[size] < counts[size] for size in distinct):
                found.append(tuple(taken))
            return True
        if left < smallest:
            found.append(tuple(taken))
            return True
        size = distinct[at]
        for times in range(min(counts[size], left // size if size else counts[size]), -1, -1):
            if not fill(at + 1, left - times * size, taken + [size] * times):
                return False
        return True

    if distinct and not fill(0, room, []):
        return None
    return sorted(set(found), reverse=True)


def pack(
    sizes: Sequence[int],
    bins: int,
    room: int,
    *,
    names: Sequence[str] | None = None,
    most_steps: int = 20_000,
) -> list[list[int]] | None:
    """Put items into equal bins, best fit first, then by branch and bound.

    Args:
        sizes: The size of each item.
        bins: The number of bins.
        room: The room of each bin.
        names: The name of each item; no bin gets two items of one name.
        most_steps: The most nodes of the search.

    Returns:
        Indices of the items of each bin, or None where no packing was found.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    left = [room] * bins
    held: list[list[int]] = [[] for _ in range(bins)]
    steps = 0

    def place(k: int) -> bool:
        nonlocal steps
        steps += 1
        if steps > most_steps:
            return False
        if k == len(order):
            return True
        item = order[k]
        tried: set[tuple[int, ...]] = set()
        for b in sorted(range(bins), key=lambda b: (left[b], b)):
            # Bins that hold the same sizes, or names, are alike.
            alike = (left[b],) if names is None else tuple(held[b])
            if left[b] < sizes[item] or alike in tried:
                continue
            if names is not None and any(names[i] == names[item] for i in held[b]):
                continue
            tried.add(alike)
            left[b] -= sizes[item]
            held[b].append(item)
            if place(k + 1):
                return True
            held[b].pop()
            left[b] += sizes[item]
        return False

    # Best fit alone, for which no search is needed.
    for k, item in enumerate(order):
        free = [
            b
            for b in range(bins)
            if left[b] >= sizes[item]
            and (names is None or all(names[i] != names[item] for i in held[b]))
        ]
        if not free:
            break
        tightest = min(free, key=lambda b: (left[b], b))
        left[tightest] -= sizes[item]
        held[tightest].append(item)
        if k == len(order) - 1:
            return held
    if len(order) > _MOST_ITEMS:
        return None
    left = [room] * bins
    held = [[] for _ in range(bins)]
    return held if place(0) else None
