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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key or a tenant may use; None: no bound.

    Requests and tokens in any 60 s, requests at once, units of cost in a calendar
    `period` (`day` or `month`, UTC).
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent: int | None = None
    budget: float | None = None
    period: str = "day"


@dataclass(frozen=True, slots=True)
class Usage:
    """What answers used: tokens of all their calls, and units of cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """On whose behalf a request runs: a tenant, and the key that it showed.

    `key` is the key's public id, empty where no key is needed. `experts`: those that
    it may ask for, None for all. `priority` in (`high`, `normal`, `low`) and `weight`
    are its share in the pools' queues. `limits` are the key's own.
    """

    name: str = "default"
    key: str = ""
    experts: frozenset[str] | None = None
    priority: str = "normal"
    weight: float = 1.0
    limits: Limits = Limits()

    def may_ask(self, expert: str) -> bool:
        """Whether it may ask for this expert."""
        return self.experts is None or expert in self.experts


NOBODY = Tenant()
