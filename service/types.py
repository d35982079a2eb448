"""Plain data that more than one package speaks of. No I/O, no behaviour to speak of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class CategoryScores:
    """The classifier's posterior over categories for one prompt.

    `labels` and `probabilities` have the same length; probabilities are
    calibrated, lie in [0, 1] and sum to 1. `category` is the label to act on:
    the most probable one, or `general` where the classifier is unsure or the
    prompt is far from anything seen in training. `confidence` is the
    probability of the most probable label. `novelty` in [0, 1] says how far
    the prompt is from anything seen (1: nothing in it was).
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    category: str
    confidence: float
    novelty: float


class Residency(StrEnum):
    """Where an expert's weights are in one pool."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"
    LOADING = "loading"
    DRAINING = "draining"
    FAILED = "failed"
