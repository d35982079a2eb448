"""Whether two questions say the same in nearly the same words. Pure.

Not what they mean: nothing here knows that "car" and "automobile" are one thing. The cosine of
the router's hashed n-grams finds candidates, but a long question with one other number in it
comes out at 0.99. So every word that carries meaning has to stand in the other question,
too, at the same place: only courtesy, articles, punctuation and spelling variants (one
letter, in words of five or more) may differ. Paraphrases are therefore missed; a
different number, name or negation is never taken for the same.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from service.router.features import Features, FeatureSpec, Featurizer

# Beyond this the features do not see all of a text.
MOST_CHARACTERS = 4000
_FEATURES = Featurizer(FeatureSpec())
# What is said with meaning: words, numbers with their signs and points, and other signs.
_WORDS = re.compile(r"[+-]?\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?|[^\w\s]")
_SILENT = frozenset({*".,;:!?\"'`’“”()…–", "the", "a", "an"})
_COURTESY = re.compile(
    r"^(?:(?:hi|hello|hey|good (?:morning|evening|day))(?: there)?\b[\s,.!]*)?"
    r"(?:(?:please|kindly)\b[\s,]*)?"
    r"(?:(?:can|could|would|will) you\b[\s,]*)?(?:(?:please|kindly)\b[\s,]*)?"
    r"(?:(?:tell|explain to) me\b[\s,]*)?"
)
# By hand: a search for them from every place on would take long where many follow each other.
_THANKS = ("please", "thanks", "thank you", "thx")
_ENDS = ",.! \t\n\r\v\f"


def said(text: str) -> list[str]:
    """The words of a question that carry its meaning, in order."""
    plain = unicodedata.normalize("NFKC", text).casefold().strip()
    bare = _without_thanks(_COURTESY.sub("", plain, count=1))
    return [word for word in _WORDS.findall(bare) if word not in _SILENT]


def _without_thanks(text: str) -> str:
    while True:
        bare = text.rstrip(_ENDS)
        word = next((one for one in _THANKS if bare.endswith(one)), None)
        if word is None or re.match(r"\w", bare[-len(word) - 1 : -len(word)]):
            return text
        text = bare[: -len(word)]


def same_words(one: list[str], other: list[str]) -> bool:
    """Whether they are the same but for spelling variants."""
    return (
        bool(one)
        and len(one) == len(other)
        and all(a == b or _variants(a, b) for a, b in zip(one, other, strict=True))
    )


def _variants(a: str, b: str) -> bool:
    """One letter more, less, other, or two swapped, in long words with the same beginning."""
    if min(len(a), len(b)) < 5 or a[0] != b[0] or not (a.isalpha() and b.isalpha()):
        return False
    if len(a) == len(b):
        differ = [i for i in range(len(a)) if a[i] != b[i]]
        if len(differ) == 1:
            # A letter at the end makes another word more often than a mistake.
            return differ[0] < len(a) - 1
        return (
            len(differ) == 2
            and differ[1] == differ[0] + 1
            and a[differ[0]] == b[differ[1]]
            and a[differ[1]] == b[differ[0]]
        )
    short, long = sorted((a, b), key=len)
    return len(long) == len(short) + 1 and any(
        long[:i] + long[i + 1 :] == short for i in range(1, len(long))
    )


def likeness(one: str, other: str) -> float:
    """Cosine of their hashed n-grams, in [0, 1]."""
    a, b = _FEATURES(one), _FEATURES(other)
    _, at_a, at_b = np.intersect1d(a.buckets, b.buckets, assume_unique=True, return_indices=True)
    norms = _norm(a) * _norm(b)
    return float(a.counts[at_a] @ b.counts[at_b]) / norms if norms else 0.0


def _norm(features: Features) -> float:
    return float(np.sqrt(np.square(features.counts.astype(np.float64)).sum()))
