"""What a reviewer is asked about the answers of others, and how its reviews are read. Pure.

A reviewer sees answers without the names of who gave them, and in an order that is shuffled for
each reviewer. It never sees its own answer among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.broker.answer_agreement import after_thinking
from service.broker.deliberation import MAX_SCORE, Review, Reviews
from service.broker.prompt_fences import NewMark, filled

MAX_CORRECTION_CHARS = 600
_MAX_READ_CHARS = 20_000
# A JSON value is looked for behind this many of the last opening brackets.
_MAX_BRACKETS = 64
_LINE = re.compile(
    r"^[\W_]*(?:(?:answer|score)\W{0,3}){1,2}#?(\d{1,2})\W{0,6}?(?:score\W{0,3})?"
    r"[:=\s]\W{0,3}?(-?\d{1,6}(?:\.\d{1,6})?)\b(?!\.?\d)(?:\s*(?:/|out\s+of)\s*10\b)?(.*)$",
    re.IGNORECASE,
)
_LABEL = ("answer", "id", "number")
# Signs between a score and its correction.
_AROUND = " \t-\u2013\u2014:;,|*"

# The number of an answer, its score, and a correction; and where it stands in the text.
_Entry = tuple[int, float, str]
_Placed = tuple[int, _Entry]


@dataclass(frozen=True, slots=True)
class Ballot:
    """The answers that one reviewer sees.

    Attributes:
        reviewer: The reviewer's position among the members.
        order: Positions of the members whose answers it sees, in the order in which it sees them.
    """

    reviewer: int
    order: tuple[int, ...]


def ballots(answered: Sequence[int], reviewers: Sequence[int], rng: random.Random) -> list[Ballot]:
    """Give each reviewer the answers of all others in a shuffled order.

    Args:
        answered: Positions of the members that answered.
        reviewers: Positions of the members that review.
        rng: Shuffles.

    Returns:
        A ballot for each reviewer that has an answer to review.
    """
    found = []
    for reviewer in reviewers:
        order = [at for at in answered if at != reviewer]
        rng.shuffle(order)
        if order:
            found.append(Ballot(reviewer, tuple(order)))
    return found


def review_prompt(
    template: str,
    question: str,
    answers: Mapping[int, str],
    ballot: Ballot,
    new_mark: NewMark,
) -> str:
    """Write the prompt for one reviewer.

    Args:
        template: A template with `{question}` and `{answers}`.
        question: What was asked.
        answers: By member the part of its answer that others see.
        ballot: Whose answers the reviewer sees, and in which order.
        new_mark: Draws a fence's mark at random.
    """
    return filled(
        template,
        {
            "question": [("Question", question)],
            "answers": [
                (f"Answer {number}", answers[at]) for number, at in enumerate(ballot.order, 1)
            ],
        },
        new_mark,
    )


def revise_prompt(template: str, answer: str, corrections: Sequence[str], new_mark: NewMark) -> str:
    """Write what members are told in a further round, with the leading answer as context."""
    return filled(
        template,
        {
            "answer": [("Best answer so far", answer)],
            "corrections": [
                (f"Correction {number}", text) for number, text in enumerate(corrections, 1)
            ]
            or [("Corrections", "none")],
        },
        new_mark,
    )


def read_reviews(text: str, ballot: Ballot) -> dict[int, Review]:
    """Read a reviewer's text.

    It states a score for each answer in a JSON value, or in lines such as `Answer 1: 7 - too long`.
    Of several scores for one answer, the last counts. Scores outside [0, `MAX_SCORE`] and all else
    are left out, so that the result may lack answers.

    Args:
        text: What the reviewer wrote.
        ballot: The answers that it saw.

    Returns:
        Member → review of its answer.
    """
    text = after_thinking(text)[-_MAX_READ_CHARS:]
    found: dict[int, Review] = {}
    # A reviewer may quote what an answer says of scores, in any form, before it gives its own.
    from_json, rest = _from_json(text)
    entries = sorted([*from_json, *_from_lines(rest)], key=lambda entry: entry[0])
    for _, (label, score, correction) in entries:
        if 1 <= label <= len(ballot.order) and 0.0 <= score <= MAX_SCORE:
            kept = correction.strip(_AROUND)[:MAX_CORRECTION_CHARS]
            found[ballot.order[label - 1]] = Review(score, kept)
    return found


def corrections_of(reviews: Reviews, leader_at: int) -> list[str]:
    """What the reviewers want corrected in the leading answer, without repetitions."""
    texts = [
        seen[leader_at].correction
        for reviewer, seen in sorted(reviews.items())
        if leader_at in seen and reviewer != leader_at
    ]
    return [text for text in dict.fromkeys(texts) if text]


def _from_lines(text: str) -> list[_Placed]:
    found = []
    at = 0
    for line in text.splitlines(keepends=True):
        if (match := _LINE.match(line.rstrip())) is not None:
            found.append((at, (int(match[1]), float(match[2]), match[3])))
        at += len(line)
    return found


def _from_json(text: str) -> tuple[list[_Placed], str]:
    """The entries of JSON values, and the text with blanks in place of these values."""
    decoder = json.JSONDecoder()
    found: list[_Placed] = []
    rest = text
    end = 0
    for start in [match.start() for match in re.finditer(r"[\[{]", text)][-_MAX_BRACKETS:]:
        if start < end:
            continue
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if entries := _entries(value):
            found += [(start, entry) for entry in entries]
            rest = rest[:start] + " " * (end - start) + rest[end:]
    return found, rest


def _entries(value: Any) -> list[_Entry]:
    if isinstance(value, dict):
        inner = next((v for v in value.values() if isinstance(v, list)), None)
        value = [value] if "score" in value else inner
    found = []
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, dict):
            continue
        label = next((item[name] for name in _LABEL if name in item), None)
        score, correction = item.get("score"), item.get("correction")
        if (
            isinstance(label, int)
            and isinstance(score, int | float)
            and not isinstance(score, bool)
            and not isinstance(label, bool)
        ):
            try:
                number = float(score)
            except OverflowError:
                continue
            found.append((label, number, correction if isinstance(correction, str) else ""))
    return found
