"""What a conversation is about, from its turns one after another. Pure.

A hidden Markov model with one state for each category: from one turn to the next the category stays
with the probability `persistence`, or is drawn anew. The forward algorithm (Rabiner, "A Tutorial on
Hidden Markov Models", 1989) joins the likelihoods of the last turn with what the turns before say:

    p'[c] ∝ likelihood[c] · (persistence · earlier[c] + (1 − persistence) / categories)

So a turn that says little by itself is about what the conversation was about. A turn that is clear
still changes the subject.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.types import CategoryScores

Floats = NDArray[np.float64]
Topics = tuple[tuple[str, float], ...]
"""Categories of a conversation with their probabilities, the most probable first."""

MAX_TOPICS = 8
_NEGLIGIBLE = 0.01


def topics_of(probabilities: Mapping[str, float]) -> Topics:
    """The most probable categories, as a session keeps them."""
    found = sorted(probabilities.items(), key=lambda pair: -pair[1])[:MAX_TOPICS]
    return tuple((name, round(p, 3)) for name, p in found if p >= _NEGLIGIBLE)


def with_topics(
    scores: CategoryScores, last_turn: Floats, earlier: Topics, persistence: float
) -> CategoryScores:
    """Join a conversation's new turn with the topics of its earlier turns.

    The category is the most probable one: where the turn alone leaves the classifier unsure, the
    conversation decides. Topics that are no categories any more count for nothing.

    Args:
        scores: The classifier's scores.
        last_turn: (labels,), likelihoods of the categories by the new turn alone.
        earlier: The topics up to the turn before.
        persistence: The probability that the category stays, in [0, 1).
    """
    known = dict(earlier)
    held = np.array([known.get(label, 0.0) for label in scores.labels])
    if persistence == 0 or held.sum() <= 0:
        return scores
    # What the topics leave out may be any category.
    count = len(scores.labels)
    held = held + max(0.0, 1.0 - held.sum()) / count
    prior = persistence * held / held.sum() + (1 - persistence) / count
    joined = last_turn * prior
    if joined.sum() <= 0:
        return scores
    joined /= joined.sum()
    best = int(joined.argmax())
    return replace(
        scores,
        probabilities=tuple(joined.tolist()),
        category=scores.labels[best],
        confidence=float(joined[best]),
    )


def carried_over(scores: CategoryScores, earlier: Topics) -> CategoryScores:
    """The scores of a turn that adds nothing of the user's, such as a tool's result."""
    known = dict(earlier)
    held = np.array([known.get(label, 0.0) for label in scores.labels])
    if held.sum() <= 0:
        return scores
    held /= held.sum()
    best = int(held.argmax())
    return replace(
        scores,
        probabilities=tuple(held.tolist()),
        category=scores.labels[best],
        confidence=float(held[best]),
    )
