"""Hashed n-grams of a prompt, by vectorised numpy. Owns how text becomes numbers.

A text becomes counts in two tables of buckets: character n-grams and word
n-grams, each gram put in a bucket by its hash (Weinberger et al., "Feature
Hashing for Large Scale Multitask Learning", 2009). Beside them stand the
*marks*: indexes of character 4-grams and words in a far larger bitmap of what
training has seen, from which novelty is read.

Only the first and the last `edge_chars` characters are looked at, so that the
time has a bound whatever the client sends. Letters are lowered and every digit
becomes `0`: "12 cows" and "37 cows" are one kind of prompt. Any `str` is taken,
lone surrogates and NULs included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]

# Odd 32-bit constants: the polynomial's base, its inverse modulo 2**32 (word
# hashes are differences of prefix sums, shifted back by it), two finalisers
# (murmur3's) and a step that keeps orders apart.
_BASE = 0x9E3779B1
_BASE_INVERSE = pow(_BASE, -1, 1 << 32)
_MIX_1 = np.uint32(0x85EBCA6B)
_MIX_2 = np.uint32(0xC2B2AE35)
_ORDER_STEP = 0x27D4EB2F
_MASK = 0xFFFFFFFF

_MARK_CHARS = 4
# Sorting few ids is quicker than a table of all buckets.
_SORT_BELOW = 4000
_ASCII_FOLD = bytes(
    ord("0") if 48 <= c <= 57 else (c + 32 if 65 <= c <= 90 else c) for c in range(256)
)
# Word characters of ASCII: letters, digits, underscore. Everything above ASCII counts as one.
_IS_WORD = np.array([chr(c).isalnum() or c == 95 for c in range(128)] + [True], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What is counted; stored in the artifact's manifest, so that fit and service agree.

    `bits`: each of the two tables has 2**bits buckets. `known_bits`: the bitmap
    of what training saw has 2**known_bits bits. `edge_chars`: characters looked
    at from either end.
    """

    char_orders: tuple[int, ...] = (2, 3, 4, 5)
    word_orders: tuple[int, ...] = (1, 2)
    bits: int = 15
    known_bits: int = 20
    edge_chars: int = 4000

    @property
    def buckets(self) -> int:
        """Number of buckets of both tables together: 2 * 2**bits."""
        return 2 << self.bits

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureSpec:
        """The spec from a manifest. Raises ValueError or TypeError naming what is wrong."""
        known = set(cls.__dataclass_fields__)
        if set(data) != known:
            raise ValueError(f"features: expected the keys {sorted(known)}, got {sorted(data)}")
        spec = cls(
            char_orders=tuple(int(n) for n in data["char_orders"]),
            word_orders=tuple(int(n) for n in data["word_orders"]),
            bits=int(data["bits"]),
            known_bits=int(data["known_bits"]),
            edge_chars=int(data["edge_chars"]),
        )
        orders = spec.char_orders + spec.word_orders
        if not (8 <= spec.bits <= 20 and 8 <= spec.known_bits <= 24 and spec.edge_chars >= 16):
            raise ValueError("features: bits 8..20, known_bits 8..24, edge_chars >= 16 are allowed")
        if not orders or any(not 1 <= n <= 8 for n in orders):
            raise ValueError("features: orders of 1..8 are allowed")
        return spec


@dataclass(frozen=True, slots=True)
class Features:
    """One text's features.

    `buckets` (int64, ascending, unique) and `counts` (int64, >= 1) have equal
    length; buckets below 2**bits are characters', the others words'. The first
    `chars` entries are the characters'. `marks` (uint32) index the bitmap of
    seen grams, one entry for each occurrence. `words` is the number of words.
    """

    buckets: NDArray[np.int64]
    counts: NDArray[np.int64]
    chars: int
    marks: Ids
    words: int


def clip(text: str, edge_chars: int) -> str:
    """The first and last `edge_chars` characters, with a newline between them."""
    if len(text) <= 2 * edge_chars:
        return text
    return f"{text[:edge_chars]}\n{text[-edge_chars:]}"


def codes(text: str) -> Ids:
    """Folded code points (uint32): lower case, every ASCII digit as `0`."""
    if text.isascii():
        folded = text.encode("ascii").translate(_ASCII_FOLD)
        return np.frombuffer(folded, dtype=np.uint8).astype(np.uint32)
    raw = text.lower().encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(raw, dtype="<u4").astype(np.uint32)
    points[(points >= 48) & (points <= 57)] = 48
    return points


def _mix(ids: Ids, salt: int) -> Ids:
    """Murmur3's finaliser with a salt: every bit of the result depends on every bit of `ids`."""
    mixed = ids + np.uint32(salt * _ORDER_STEP & _MASK)
    mixed ^= mixed >> np.uint32(16)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint32(13)
    mixed *= _MIX_2
    return mixed


class Featurizer:
    """Turns texts into `Features` under one `FeatureSpec`. Stateless after construction."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        length = 2 * spec.edge_chars + 2
        self._powers = _powers(_BASE, length)
        self._inverse_powers = _powers(_BASE_INVERSE, length)
        self._shift = np.uint32(32 - spec.bits)
        self._mark_shift = np.uint32(32 - spec.known_bits)

    def __call__(self, text: str) -> Features:
        """Features of one text; time is bounded by `edge_chars`, not by the text."""
        spec = self.spec
        # lower() may lengthen a text ("İ" becomes two code points): cut once more.
        points = codes(clip(text, spec.edge_chars))[: 2 * spec.edge_chars + 1]
        char_ids: list[Ids] = []
        marks: list[Ids] = []
        values = points + np.uint32(1)  # NUL must count as well
        rolled = values
        for order in range(1, max((*spec.char_orders, _MARK_CHARS)) + 1):
            if order > 1:
                rolled = rolled[:-1] * np.uint32(_BASE) + values[order - 1 :]
            if order in spec.char_orders or order == _MARK_CHARS:
                mixed = _mix(rolled, order)
                if order in spec.char_orders:
                    char_ids.append(mixed >> self._shift)
                if order == _MARK_CHARS:
                    marks.append(mixed >> self._mark_shift)
        words = self._words(points, values)
        word_ids: list[Ids] = []
        rolled = words
        for order in range(1, max(spec.word_orders, default=0) + 1):
            if order > 1:
                rolled = rolled[:-1] * np.uint32(_BASE) + words[order - 1 :]
            if order in spec.word_orders:
                word_ids.append(_mix(rolled, 16 + order) >> self._shift)
        marks.append(_mix(words, 32) >> self._mark_shift)
        size = 1 << spec.bits
        char_buckets, char_counts = _count(char_ids, size)
        word_buckets, word_counts = _count(word_ids, size)
        return Features(
            buckets=np.concatenate((char_buckets, word_buckets + size)),
            counts=np.concatenate((char_counts, word_counts)),
            chars=len(char_buckets),
            marks=np.concatenate(marks),
            words=len(words),
        )

    def _words(self, points: Ids, values: Ids) -> Ids:
        """A hash of each word (maximal run of word characters), in order."""
        inside = _IS_WORD[np.minimum(points, np.uint32(128))]
        if not inside.any():
            return np.empty(0, dtype=np.uint32)
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        prefix = np.zeros(len(points) + 1, dtype=np.uint32)
        np.cumsum(values * self._powers[: len(points)], dtype=np.uint32, out=prefix[1:])
        return np.asarray((prefix[ends] - prefix[starts]) * self._inverse_powers[starts])


def _powers(base: int, length: int) -> Ids:
    powers = np.full(length, base, dtype=np.uint32)
    powers[0] = 1
    return np.multiply.accumulate(powers, dtype=np.uint32)


def _count(ids: list[Ids], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Occupied buckets of 0..size-1, ascending, and how often each occurs."""
    joined = np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)
    if len(joined) < _SORT_BELOW:
        ordered = np.sort(joined)
        first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        first = first[: len(ordered)]
        return ordered[first].astype(np.int64), np.diff(first, append=len(ordered))
    table = np.bincount(joined.astype(np.int64), minlength=size)
    buckets = np.flatnonzero(table > 0)  # on a bool array: four times as quick
    return buckets, table[buckets]
