"""Whether answers agree: the final answer of a text, made comparable. Pure.

A final answer is a JSON value, a choice among letters, a number, or a short text. Long free
text has none, and agrees with nobody: then the stronger expert is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

# A short text is an answer of its own; a longer one would agree with nobody anyway.
_SHORT_CHARS = 80
_LOOKED_AT_CHARS = 20_000
_MARKED = re.compile(
    r"(?:\bfinal answer\b|\bthe (?:correct )?(?:answer|option|choice)\b|\banswer\b)"
    r"\s*(?:is|are|:|=|would be)?\s*:?\s*(?P<said>[^\n]{1,200})",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]{1,100})\}")
_HASHES = re.compile(r"^####\s*(.{1,100})$", re.MULTILINE)
# A letter in brackets, or one that ends or is set off; "A man" and "I think" are none.
_CHOICE = re.compile(r"^\W*?(?:(?:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z])(?:[.):,]|\W*$))", re.I)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?%?")
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*?)\n```$", re.DOTALL)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_WORD = re.compile(r"[^\w%./+-]+")


@dataclass(frozen=True, slots=True)
class Final:
    """A final answer: equal ones agree. `kind`: json, choice, number or text."""

    kind: str
    value: str


def final_answer(text: str, *, as_json: bool = False) -> Final | None:
    """The final answer that a text gives, None where it gives none.

    `as_json`: the client asked for JSON, so nothing else is an answer.
    """
    text = text.strip()[-_LOOKED_AT_CHARS:]
    if as_json or text[:1] in ("{", "[") or text.startswith("```"):
        found = _json(text)
        if found is not None or as_json:
            return found
    for pattern in (_HASHES, _BOXED):
        marked = pattern.findall(text)
        if marked:
            return _short(marked[-1])
    said = [match["said"] for match in _MARKED.finditer(text)]
    if said:
        return _short(said[-1])
    return _short(text) if len(text) <= _SHORT_CHARS else None


def _short(said: str) -> Final | None:
    """A choice, a number, or a few words."""
    said = said.strip().strip("*_`$ ")
    choice = _CHOICE.match(said)
    if choice is not None:
        return Final("choice", (choice[1] or choice[2]).upper())
    number = _number(said)
    if number is not None:
        return Final("number", number)
    words = _NO_WORD.sub(" ", _ARTICLES.sub(" ", said.casefold())).strip(" .")
    words = " ".join(words.split())
    return Final("text", words) if words and len(words) <= _SHORT_CHARS else None


def _number(said: str) -> str | None:
    """The one number of a short text, written one way: 1,200.50 and 1200.5 are the same."""
    found = [text for text in _NUMBER.findall(said) if any(c.isdigit() for c in text)]
    if len(found) != 1:
        return None
    # "7 days" is a number; "windows 7 is better than the others" is not.
    if len(_NO_WORD.sub(" ", said).split()) > 4:
        return None
    text = found[0].rstrip("%").replace(",", "")
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    # An exponent of a thousand would be written out as a thousand digits.
    if not value.is_finite() or abs(value.adjusted()) > 50:
        return None
    plain = format(value.normalize() + 0, "f")
    return plain + ("%" if found[0].endswith("%") else "")


def _json(text: str) -> Final | None:
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
        return Final("json", json.dumps(value, sort_keys=True, separators=(",", ":")))
    except (ValueError, RecursionError):
        return None


def agreed(finals: Sequence[Final | None]) -> bool:
    """Whether all gave a final answer, and the same."""
    return bool(finals) and finals[0] is not None and all(f == finals[0] for f in finals)


def majority(finals: Sequence[Final | None]) -> int | None:
    """Position of the answer most gave; among equals the last that gave any. None: nobody did."""
    given = [i for i, final in enumerate(finals) if final is not None]
    if not given:
        return None
    return max(given, key=lambda i: (sum(finals[i] == other for other in finals), i))


def confidence(logprobs: Sequence[float]) -> float:
    """How sure a model was of its own text: the geometric mean of its tokens' probabilities.

    In [0, 1]; 0 where there are none. (Used so by Malinin and Gales, Uncertainty Estimation
    in Autoregressive Structured Prediction, 2021: length-normalised log-likelihood.)
    """
    if not logprobs:
        return 0.0
    return math.exp(min(0.0, sum(logprobs) / len(logprobs)))
