"""Computes hashed n-grams of a prompt, with vectorised numpy.

The features of a text are counts in two tables of buckets, for character n-grams and for word
n-grams. The hash of an n-gram selects its bucket (Weinberger et al., "Feature Hashing for Large
Scale Multitask Learning", 2009). In addition, *marks* are indexes of character 4-grams and words in
a much larger bitmap, which records the grams of the training set. They give the novelty of a text.

Only the first and the last `edge_chars` characters count, so that the time has a bound. Letters are
lowered and every digit becomes `0`, because "12 cows" and "37 cows" are prompts of the same kind.
The text may be any `str`, even with lone surrogates and NULs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]

# Odd 32-bit constants. The hash of an n-gram is a polynomial in `_BASE`. The hash of a word is a
# difference of prefix sums, times a power of the inverse of the base modulo 2**32. `_MIX_1` and
# `_MIX_2` are the multipliers of murmur3's finaliser. `_ORDER_STEP` gives each order its own salt.
_BASE = 0x9E3779B1
_BASE_INVERSE = pow(_BASE, -1, 1 << 32)
_MIX_1 = np.uint32(0x85EBCA6B)
_MIX_2 = np.uint32(0xC2B2AE35)
_ORDER_STEP = 0x27D4EB2F
_MASK = 0xFFFFFFFF

_MARK_CHARS = 4
_END_MARKS = " .?!…。？！"
# For fewer ids, sorting is faster than a table of all buckets.
_SORT_BELOW = 4000
_ASCII_FOLD = bytes(
    ord("0") if 48 <= c <= 57 else (c + 32 if 65 <= c <= 90 else c) for c in range(256)
)
# Whether an ASCII code is a word character: letter, digit or underscore. The last entry stands for
# all characters above ASCII, which count as word characters.
_IS_WORD = np.array([chr(c).isalnum() or c == 95 for c in range(128)] + [True], dtype=np.bool_)


# The tables of positions grow with it.
MAX_EDGE_CHARS = 100_000


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The parameters of the features. The artifact's manifest has them for fit and service.

    Attributes:
        char_orders: Lengths of the character n-grams.
        word_orders: Lengths of the word n-grams.
        bits: Each of the two tables has 2**bits buckets.
        known_bits: The bitmap of seen grams has 2**known_bits bits.
        edge_chars: Number of characters that count from either end of a text.
        trims: Whether runs of white space count as one space, and marks at the end do not count.
    """

    char_orders: tuple[int, ...] = (2, 3, 4, 5)
    word_orders: tuple[int, ...] = (1, 2)
    bits: int = 15
    known_bits: int = 20
    edge_chars: int = 4000
    trims: bool = False

    @property
    def buckets(self) -> int:
        """Number of buckets of both tables together, 2 * 2**bits."""
        return 2 << self.bits

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureSpec:
        """Read the spec from a manifest.

        Raises:
            ValueError: A value is not allowed.
            TypeError: A value has the wrong type.
        """
        known = set(cls.__dataclass_fields__)
        # Artifacts of before have no `trims`.
        if set(data) | {"trims"} != known:
            raise ValueError(f"features: expected the keys {sorted(known)}, got {sorted(data)}")
        spec = cls(
            char_orders=tuple(int(n) for n in data["char_orders"]),
            word_orders=tuple(int(n) for n in data["word_orders"]),
            bits=int(data["bits"]),
            known_bits=int(data["known_bits"]),
            edge_chars=int(data["edge_chars"]),
            trims=bool(data.get("trims", False)),
        )
        orders = spec.char_orders + spec.word_orders
        if not (8 <= spec.bits <= 20 and 8 <= spec.known_bits <= 24):
            raise ValueError("features: bits 8..20 and known_bits 8..24 are allowed")
        if not 16 <= spec.edge_chars <= MAX_EDGE_CHARS:
            raise ValueError(f"features: edge_chars 16..{MAX_EDGE_CHARS} are allowed")
        if not orders or any(not 1 <= n <= 8 for n in orders):
            raise ValueError("features: orders of 1..8 are allowed")
        return spec


@dataclass(frozen=True, slots=True)
class Features:
    """The features of one text.

    Attributes:
        buckets: (entries,), ascending buckets without duplicates. Buckets below 2**bits belong to
            characters, and the others to words.
        counts: (entries,), number of n-grams in each bucket, at least 1.
        chars: Number of entries that belong to characters. They come first.
        marks: (grams,), indexes into the bitmap of seen grams, with duplicates.
        words: Number of words.
    """

    buckets: NDArray[np.int64]
    counts: NDArray[np.int64]
    chars: int
    marks: Ids
    words: int


def clip(text: str, edge_chars: int) -> str:
    """Keep the first and last `edge_chars` characters, with a newline between them."""
    if len(text) <= 2 * edge_chars:
        return text
    return f"{text[:edge_chars]}\n{text[-edge_chars:]}"


def trim(text: str) -> str:
    """Make one space of each run of white space, and drop marks at the end of other text."""
    text = " ".join(text.split())
    return text.rstrip(_END_MARKS) or text


def codes(text: str) -> Ids:
    """Return the code points of a text in lower case, with every ASCII digit as `0`."""
    if text.isascii():
        folded = text.encode("ascii").translate(_ASCII_FOLD)
        return np.frombuffer(folded, dtype=np.uint8).astype(np.uint32)
    raw = text.lower().encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(raw, dtype="<u4").astype(np.uint32)
    points[(points >= 48) & (points <= 57)] = 48
    return points


def _grams(values: Ids, orders: Iterable[int]) -> dict[int, Ids]:
    """Return the hashes of the runs of up to so many values as the greatest order, by length."""
    found = {1: values}
    for order in range(2, max(orders, default=0) + 1):
        found[order] = found[order - 1][:-1] * np.uint32(_BASE) + values[order - 1 :]
    return found


def _salted(ids: Ids, salt: int) -> Ids:
    return ids + np.uint32(salt * _ORDER_STEP & _MASK)


def _mix(mixed: Ids) -> Ids:
    """Apply murmur3's finaliser in place. Every bit of an id affects every bit of its result."""
    mixed ^= mixed >> np.uint32(16)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint32(13)
    mixed *= _MIX_2
    return mixed


class Featurizer:
    """Computes the features of texts. It has no state besides its spec."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        length = 2 * spec.edge_chars + 2
        self._powers = _powers(_BASE, length)
        self._inverse_powers = _powers(_BASE_INVERSE, length)
        self._shift = np.uint32(32 - spec.bits)
        self._mark_shift = np.uint32(32 - spec.known_bits)

    def __call__(self, text: str) -> Features:
        """Compute the features of a text. `edge_chars` bounds the time for texts of any length."""
        spec = self.spec
        # `lower` may lengthen a text ("İ" becomes two code points), so it is cut again.
        text = clip(text, spec.edge_chars)
        points = codes(trim(text) if spec.trims else text)[: 2 * spec.edge_chars + 1]
        values = points + np.uint32(1)  # A NUL must change the hash as well.
        words = self._words(points, values)
        chars = _grams(values, (*spec.char_orders, _MARK_CHARS))
        of_words = _grams(words, spec.word_orders)
        # All hashes are mixed at once: for a short text a call of numpy costs more than its work.
        salted = [_salted(chars[order], order) for order in spec.char_orders]
        salted += [_salted(of_words[order], 16 + order) for order in spec.word_orders]
        salted += [_salted(chars[_MARK_CHARS], _MARK_CHARS), _salted(words, 32)]
        mixed = _mix(np.concatenate(salted))
        char_end = sum(map(len, salted[: len(spec.char_orders)]))
        word_end = char_end + sum(map(len, salted[len(spec.char_orders) : -2]))
        ids = mixed[:word_end] >> self._shift
        size = 1 << spec.bits
        char_buckets, char_counts = _count(ids[:char_end], size)
        word_buckets, word_counts = _count(ids[char_end:], size)
        return Features(
            buckets=np.concatenate((char_buckets, word_buckets + size)),
            counts=np.concatenate((char_counts, word_counts)),
            chars=len(char_buckets),
            marks=mixed[word_end:] >> self._mark_shift,
            words=len(words),
        )

    def _words(self, points: Ids, values: Ids) -> Ids:
        """Return a hash of each word, in order. A word is a maximal run of word characters."""
        inside = _IS_WORD[np.minimum(points, np.uint32(128))]
        if not inside.any():
            return np.empty(0, dtype=np.uint32)
        # `np.diff` with edges costs several times as much.
        padded = np.zeros(len(inside) + 2, dtype=np.bool_)
        padded[1:-1] = inside
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, ends = edges[::2], edges[1::2]
        prefix = np.zeros(len(points) + 1, dtype=np.uint32)
        np.cumsum(values * self._powers[: len(points)], dtype=np.uint32, out=prefix[1:])
        return np.asarray((prefix[ends] - prefix[starts]) * self._inverse_powers[starts])


def _powers(base: int, length: int) -> Ids:
    powers = np.full(length, base, dtype=np.uint32)
    powers[0] = 1
    return np.multiply.accumulate(powers, dtype=np.uint32)


def _count(ids: Ids, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the buckets that occur, ascending, and the number of occurrences of each."""
    count = len(ids)
    if count < _SORT_BELOW:
        ordered = np.sort(ids)
        bounds = np.empty(count + 1, dtype=np.bool_)
        bounds[0] = bounds[-1] = True
        np.not_equal(ordered[1:], ordered[:-1], out=bounds[1:-1])
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        first = np.flatnonzero(bounds)
        return ordered[first[:-1]].astype(np.int64), first[1:] - first[:-1]
    table = np.bincount(ids.astype(np.int64), minlength=size)
    buckets = np.flatnonzero(table > 0)  # `flatnonzero` is four times as fast on a bool array.
    return buckets, table[buckets]
