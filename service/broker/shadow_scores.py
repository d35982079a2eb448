"""Scores of several experts' answers to one prompt, without a known answer. Pure.

Where every answer states a final answer and more than half of them agree, those that agree are
right and the others wrong. Otherwise a judge compares each answer with the one that was served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from service.broker.answer_agreement import FinalAnswer


def scores_by_agreement(finals: Mapping[str, FinalAnswer | None]) -> dict[str, float] | None:
    """Scores by final answers.

    Args:
        finals: The final answer of each expert; None where it states none.

    Returns:
        1 for each expert of the majority and 0 for the others; None where the final answers do not
        decide.
    """
    if len(finals) < 2 or None in finals.values():
        return None
    (answer, count), *_ = Counter(finals.values()).most_common(1)
    if 2 * count <= len(finals):
        return None
    return {name: float(final == answer) for name, final in finals.items()}


def scores_by_preference(served: str, preferences: Mapping[str, float]) -> dict[str, float]:
    """Scores by a judge that compared each answer with the served one.

    Args:
        served: The expert whose answer was served.
        preferences: For each other expert the judge's preference for its answer, in [0, 1].

    Returns:
        The preferences, and for the served expert the mean of their complements.
    """
    if not preferences:
        return {}
    mean = sum(preferences.values()) / len(preferences)
    return {served: 1.0 - mean, **preferences}
