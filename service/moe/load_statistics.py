"""Statistics of the choices of a model's gates: load, balance, cacheability. Pure functions.

A layer's choices are an integer array (tokens, k) with the routed experts of each token. The value
-1 fills the row of a token with fewer than k experts.

Cacheability follows J. Liang and others, "Not All Models Suit Expert Offloading: On Local
Routing Consistency of Mixture-of-Expert Models", https://arxiv.org/abs/2505.16056 (v3):

- *SRP*, segment routing best performance. Every `SEGMENT` consecutive tokens of a text are a
  segment. A hypothetical router chooses experts only once for a whole segment. Its F1 combines the
  recall of all uses and the precision over segment length times chosen experts. SRP is the best F1
  of any such router. F1 = 2u / (t + n), with u covered uses, t tokens times chosen experts, and n
  uses in total. The best router takes the experts with enough uses, so that a histogram of uses
  per segment and expert contains all data that SRP needs.
- *SCH*, segment cache best hit rate. A cache holds a fixed number of a layer's experts and knows
  which experts the present token and the following tokens, `SEGMENT` in total, will use. It loads
  the experts that a token uses. It evicts the expert with the fewest known future uses, then the
  least recently used expert, then the expert with the lower index. A cache that is not full keeps
  every expert that it loads.

Both are 1 where all tokens choose the same experts. Sums over texts can be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The tokens of a segment, and the size of the cache as a multiple of a token's experts. The paper
# uses this length as its middle value, and finds this cache size worth its memory for most models.
SEGMENT = 16
CACHE_TIMES = 2

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Cacheability:
    """The sums over texts by layer, from which SRP and SCH are computed.

    Attributes:
        segments: The number of pairs of segment and expert, by the number of the segment's tokens
            that use the expert, (layers, SEGMENT + 1).
        hits: The hits of the cache, (layers,).
        uses: The uses of the cache, (layers,).
    """

    segments: NDArray[np.int64]
    hits: NDArray[np.int64]
    uses: NDArray[np.int64]

    @staticmethod
    def none(layers: int) -> Cacheability:
        """Return empty sums."""
        zeros = np.zeros(layers, np.int64)
        return Cacheability(np.zeros((layers, SEGMENT + 1), np.int64), zeros, zeros)

    def __add__(self, other: Cacheability) -> Cacheability:
        return Cacheability(
            self.segments + other.segments, self.hits + other.hits, self.uses + other.uses
        )

    def srp(self, layer: int) -> float | None:
        """Return a layer's segment routing best performance; None before a whole segment."""
        return best_f1(self.segments[layer])

    def sch(self, layer: int) -> float | None:
        """Return a layer's segment cache best hit rate; None before the first token."""
        uses = int(self.uses[layer])
        return int(self.hits[layer]) / uses if uses else None


def imbalance(load: Ints) -> float | None:
    """Return the busiest expert's load divided by the mean: 1 (even) to experts / k."""
    mean = float(np.mean(load))
    return float(np.max(load)) / mean if mean > 0 else None


def entropy_bits(load: Ints) -> float | None:
    """Return the Shannon entropy of the load over experts, in bits: 0 to log2(experts)."""
    total = float(np.sum(load))
    if total <= 0:
        return None
    share = load[load > 0] / total
    return float(-(share * np.log2(share)).sum()) + 0.0


def evenness(load: Ints) -> float | None:
    """Return the entropy divided by the highest possible: 0 (one expert) to 1 (even)."""
    bits = entropy_bits(load)
    if bits is None or len(load) < 2:
        return None
    return bits / float(np.log2(len(load)))


def cacheability(choices: Ints, experts: int, *, cache: int) -> Cacheability:
    """Compute the sums of one text.

    Args:
        choices: The choices for consecutive tokens, (layers, tokens, k).
        experts: The number of routed experts of a layer.
        cache: The number of a layer's routed experts that the cache holds, at least k.

    Raises:
        ValueError: The cache is too small.
    """
    width = choices.shape[2]
    if cache < min(width, experts):
        raise ValueError(f"a cache of {cache} experts can't hold the {width} that a token needs")
    used = _used(choices, experts)
    # The uses of each expert before each token.
    before = np.zeros((used.shape[0], used.shape[1] + 1, experts), np.int32)
    np.cumsum(used, axis=1, out=before[:, 1:])
    hits, uses = _cache(used, before, cache)
    return Cacheability(_segments(before), hits, uses)


def best_f1(segments: Ints) -> float | None:
    """Return the SRP of a histogram whose entry c counts (segment, expert) pairs with c uses."""
    length = len(segments) - 1
    counts = np.arange(length + 1)
    # For each threshold, u and t of a router that takes the experts with at least so many uses.
    covered = np.cumsum((segments * counts)[::-1])[::-1]
    taken = np.cumsum(segments[::-1])[::-1] * length
    if covered[0] == 0:
        return None
    return float((2 * covered[1:] / (taken[1:] + covered[0])).max())


def _used(choices: Ints, experts: int) -> NDArray[np.bool_]:
    """Return whether a token uses an expert, (layers, tokens, experts)."""
    used = np.zeros((*choices.shape[:2], experts + 1), np.bool_)
    np.put_along_axis(used, choices.astype(np.int64), True, axis=2)  # -1 is the last, cut below
    return used[:, :, :experts]


def _segments(before: NDArray[np.int32]) -> NDArray[np.int64]:
    layers = before.shape[0]
    uses = before[:, SEGMENT:] - before[:, :-SEGMENT]
    places = uses + (np.arange(layers) * (SEGMENT + 1))[:, None, None]
    found = np.bincount(places.ravel(), minlength=layers * (SEGMENT + 1))
    return found.reshape(layers, SEGMENT + 1).astype(np.int64, copy=False)


def _cache(
    used: NDArray[np.bool_], before: NDArray[np.int32], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return hits and uses of each layer's cache. All layers are simulated together."""
    layers, tokens, experts = used.shape
    held = np.zeros((layers, experts), np.bool_)
    last = np.zeros((layers, experts), np.int64)
    numbers = np.arange(experts)
    hits = np.zeros(layers, np.int64)
    never = np.iinfo(np.int64).max
    for at in range(tokens):
        needed = used[:, at]
        room = size - held.sum(axis=1)
        missing = (needed & ~held).sum(axis=1)
        hits += (needed & held).sum(axis=1) + np.minimum(missing, room)
        held |= needed
        last[needed] = at + 1
        over = held.sum(axis=1) - size
        if (over > 0).any():
            coming = before[:, min(at + SEGMENT, tokens)] - before[:, at + 1]
            worth = (coming.astype(np.int64) * (tokens + 1) + last) * experts + numbers
            worth[needed | ~held] = never
            for left in range(int(over.max()), 0, -1):
                full = over >= left
                gone = worth[full].argmin(axis=1)
                held[full, gone] = False
                worth[full, gone] = never
    return hits, used.sum(axis=(1, 2)).astype(np.int64)
