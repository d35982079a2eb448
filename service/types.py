"""Data classes that several packages share. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, cast

Kind = Literal["single", "cascade", "vote", "deliberate", "recruit"]

BATCH = "batch"
"""The priority of a batch's lines, below all that people can have."""

MAX_LATER = 3
"""Most experts that a cascade may ask one after another."""
MAX_ROUNDS = MAX_LATER
"""Most rounds of a deliberation: reviews, and then each further round, are its later steps."""


@dataclass(frozen=True, slots=True)
class CategoryScores:
    """The classifier's posterior over categories for one prompt.

    `labels` and `probabilities` have the same length; probabilities are
    calibrated, lie in [0, 1] and sum to 1. `category` is the label to act on:
    the most probable one, or `general` where the classifier is unsure or the
    prompt is far from anything seen in training. `confidence` is the
    probability of the most probable label. `novelty` in [0, 1] says how far
    the prompt is from anything seen (1: nothing in it was). `stage` is the stage
    that decided: `ngrams`, `static` (n-grams and the static table), `encoder`, or
    `general` where all of them were unsure.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    category: str
    confidence: float
    novelty: float
    stage: str = "ngrams"


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
    """Limits of a key or a tenant; None: no bound.

    Attributes:
        requests_per_min: Requests in any 60 s.
        tokens_per_min: Tokens in any 60 s.
        concurrent: Requests at once.
        budget: Units of cost in one `period`.
        period: A calendar period in UTC: `day` or `month`.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent: int | None = None
    budget: float | None = None
    period: str = "day"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all calls of a request, and their cost in units."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """The tenant of a request, with the attributes of its key.

    Attributes:
        name: Name of the tenant.
        key: Public id of the key; empty where no key is needed.
        experts: Experts that it may use; None: all.
        priority: `high`, `normal` or `low`, in the pools' queues; `batch` for lines of batches.
        weight: Its share in the pools' queues.
        limits: The key's own limits.
        cache_salt: Separates its prompts from others' in an engine's prefix cache; empty where the
            cache is shared.
    """

    name: str = "default"
    key: str = ""
    experts: frozenset[str] | None = None
    priority: str = "normal"
    weight: float = 1.0
    limits: Limits = Limits()
    cache_salt: str = ""

    def may_ask(self, expert: str) -> bool:
        """Whether it may use this expert."""
        return self.experts is None or expert in self.experts


NOBODY = Tenant()


@dataclass(frozen=True, slots=True)
class Deliberation:
    """How the members of a deliberation review each other.

    Attributes:
        rounds: The most rounds.
        votes: What a reviewer may spend in a round; v votes cost v².
        gain: The share of wrong answers that another round puts right, in [0, 1], before it is
            learned.
        review_tokens: The bound of a review.
        review: The template of the prompt for reviewers.
        revise: The template of what members are told in a further round.
    """

    rounds: int
    votes: float
    gain: float
    review_tokens: int
    review: str
    revise: str


@dataclass(frozen=True, slots=True)
class Recruitment:
    """How experts are recruited for a prompt.

    Attributes:
        k: How many experts answer.
        aggregator: The expert that makes one answer of theirs; None takes the best one for the
            prompt.
        prompt: The template of the aggregator's prompt.
    """

    k: int
    aggregator: str | None
    prompt: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to make an answer.

    `single`: the one member answers. `cascade`: the members are asked together; if they
    agree (one member: if its tokens' mean probability is at least `sure`, or where that
    is 0, if it gives a final answer at all), that is the answer; else those of `later`
    are asked in turn, each one's answer taken if it agrees with one before, the last
    one's in any case (or the newest earlier answer where the last one fails). `vote`:
    all members are asked together; the answer most of them give, the last member's where
    none has most. `deliberate`: all members answer, review each other's answers, and vote.
    `recruit`: the best of the members for a prompt answer, and an aggregator makes one
    answer of theirs.
    """

    kind: Kind
    members: tuple[str, ...]
    later: tuple[str, ...] = ()
    sure: float = 0.0
    deliberation: Deliberation | None = None
    recruitment: Recruitment | None = None

    def __post_init__(self) -> None:
        experts = self.members + self.later
        if (self.kind == "deliberate") != (self.deliberation is not None) or (
            self.kind == "recruit"
        ) != (self.recruitment is not None):
            raise ValueError(f"invalid recipe: {self.kind} lacks its settings, or has another's")
        fits = {
            "single": len(self.members) == 1 and not self.later,
            "cascade": len(self.members) >= 1 and 1 <= len(self.later) <= MAX_LATER,
            "vote": len(self.members) >= 3 and not self.later,
            "deliberate": len(self.members) >= 3 and not self.later,
            "recruit": len(self.members) >= 2 and not self.later,
        }
        if not fits.get(self.kind, False) or len(set(experts)) != len(experts):
            raise ValueError(f"invalid recipe: {self.kind} of {self.members} then {self.later}")

    @property
    def experts(self) -> tuple[str, ...]:
        """All experts that may be asked, in that order."""
        recruitment = self.recruitment
        if recruitment is not None and recruitment.aggregator not in (None, *self.members):
            return (*self.members, str(recruitment.aggregator))
        return self.members + self.later

    @property
    def required(self) -> tuple[str, ...]:
        """The experts without which the recipe can't answer: all, but for those to choose from."""
        if self.recruitment is None:
            return self.experts
        aggregator = self.recruitment.aggregator
        return () if aggregator is None else (aggregator,)

    @property
    def steps(self) -> int:
        """How many steps may follow the first answers, each with a learned probability.

        Those of a cascade are its later experts. Those of a deliberation are the first reviews, and
        then each further round. That of a recruit is the aggregator.
        """
        if self.recruitment is not None:
            return 1
        return self.deliberation.rounds if self.deliberation is not None else len(self.later)

    @property
    def name(self) -> str:
        """Readable, and unique but for settings: `a`, `cascade([a, b] → c)`, `vote([a, b, c])`."""
        if self.kind == "single":
            return self.members[0]
        inner = ", ".join(self.members)
        if self.recruitment is not None:
            aggregator = self.recruitment.aggregator or "best"
            # A tenant may be allowed some of the experts, and must not see the others' names.
            digest = hashlib.blake2s(inner.encode(), digest_size=2).hexdigest()
            return f"recruit({self.recruitment.k} of {len(self.members)}, {digest} → {aggregator})"
        sure = f" at {self.sure:g}" if self.sure else ""
        return f"{self.kind}([{inner}]{sure}{''.join(f' → {e}' for e in self.later)})"

    @property
    def ascii_name(self) -> str:
        """The name in ASCII, for response headers."""
        return self.name.replace("→", "->")

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        fields = {"kind": self.kind, "members": list(self.members), "later": list(self.later)}
        return {**fields, "sure": self.sure} if self.sure else fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Parse from a manifest. Raises ValueError, TypeError or KeyError."""
        return cls(
            cast(Kind, data["kind"]),
            tuple(str(e) for e in data["members"]),
            tuple(str(e) for e in data["later"]),
            float(data.get("sure", 0.0)),
        )
