"""Plain data that more than one package speaks of. No I/O, no behaviour to speak of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, cast

Kind = Literal["single", "cascade", "vote"]

MAX_LATER = 3
"""Longest chain of experts that a cascade may ask one after another."""


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
    are its share in the pools' queues. `limits` are the key's own. `cache_salt`: what keeps its
    prompts apart from others' in an engine's prefix cache; empty where that is shared.
    """

    name: str = "default"
    key: str = ""
    experts: frozenset[str] | None = None
    priority: str = "normal"
    weight: float = 1.0
    limits: Limits = Limits()
    cache_salt: str = ""

    def may_ask(self, expert: str) -> bool:
        """Whether it may ask for this expert."""
        return self.experts is None or expert in self.experts


NOBODY = Tenant()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to make an answer.

    `single`: the one member answers. `cascade`: the members are asked together; if they
    agree (one member: if its tokens' mean probability is at least `sure`, or where that
    is 0, if it gives a final answer at all), that is the answer; else those of `later`
    are asked in turn, each one's answer taken if it agrees with one before, the last
    one's in any case (or the newest earlier answer where the last one fails). `vote`:
    all members are asked together; the answer most of them give, the last member's where
    none has most.
    """

    kind: Kind
    members: tuple[str, ...]
    later: tuple[str, ...] = ()
    sure: float = 0.0

    def __post_init__(self) -> None:
        experts = self.members + self.later
        fits = {
            "single": len(self.members) == 1 and not self.later,
            "cascade": len(self.members) >= 1 and 1 <= len(self.later) <= MAX_LATER,
            "vote": len(self.members) >= 3 and not self.later,
        }
        if not fits.get(self.kind, False) or len(set(experts)) != len(experts):
            raise ValueError(f"no such recipe: {self.kind} of {self.members} then {self.later}")

    @property
    def experts(self) -> tuple[str, ...]:
        """Everyone who may be asked, in the order of asking."""
        return self.members + self.later

    @property
    def name(self) -> str:
        """Readable and unique: `a`, `cascade([a, b] → c)`, `vote([a, b, c])`."""
        if self.kind == "single":
            return self.members[0]
        inner = ", ".join(self.members)
        sure = f" at {self.sure:g}" if self.sure else ""
        return f"{self.kind}([{inner}]{sure}{''.join(f' → {e}' for e in self.later)})"

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        told = {"kind": self.kind, "members": list(self.members), "later": list(self.later)}
        return {**told, "sure": self.sure} if self.sure else told

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """From a manifest. Raises ValueError, TypeError or KeyError where it is none."""
        return cls(
            cast(Kind, data["kind"]),
            tuple(str(e) for e in data["members"]),
            tuple(str(e) for e in data["later"]),
            float(data.get("sure", 0.0)),
        )
