"""The route plan: the candidates for one request, and what the choice among them needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats
from service.broker.recipe_catalog import Ints
from service.broker.savings import RecipeEstimates
from service.broker.selection import PrefixCacheHint
from service.broker.session_terms import SessionTerms
from service.classifier.topic_filter import Topics, topics_of
from service.types import CategoryScores


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A recipe that is no candidate for a request.

    Attributes:
        row: Its index in the catalog.
        quality: Its expected quality, in [0, 1].
        why: Why it is none.
    """

    row: int
    quality: float
    why: str


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """The candidates for one request.

    Attributes:
        rows: Indices of the recipes in the catalog, (rows,).
        quality: Expected quality of each, (rows,) in [0, 1].
        escalation_prob: The probability that each later expert of a cascade is asked,
            (rows, MAX_LATER).
        first: The first expert of the best recipe.
        category: The prompt's category; empty where the client named an expert or recipe.
        confidence: How sure the classifier is, in [0, 1].
        reason: Why these are the candidates.
        scores: The classifier's scores, where it was used.
        posterior: Probabilities of the categories, (labels,).
        allowed: (experts,), the experts that the request's own bounds allow; None allows all.
        time_price: The price of time, in quality per second of waiting.
        cost_weight: The quality that is given up to save the whole reference cost.
        reference: (experts,), weights of the experts' costs in the reference cost.
        stage: The classifier's stage that decided, see `CategoryScores`; empty where none did.
        session: The terms of the conversation's session; None without one, or where the client
            names another category or an expert.
        prefix_cache: The pool that has the conversation in its prefix cache, by its session.
        estimates: What is expected of every recipe, where the client left the choice to the router.
        skill: (experts,), expected quality of each expert alone; None where no recipe recruits.
        recruitable: (experts,), the experts that a recipe may recruit; None where none does.
    """

    rows: Ints
    quality: Floats
    escalation_prob: Floats
    first: str
    category: str
    confidence: float
    reason: str
    scores: CategoryScores | None = None
    posterior: Floats | None = None
    allowed: NDArray[np.bool_] | None = None
    time_price: float = 0.0
    cost_weight: float = 0.0
    reference: Floats | None = None
    stage: str = ""
    session: SessionTerms | None = None
    prefix_cache: PrefixCacheHint | None = None
    estimates: RecipeEstimates | None = None
    skill: Floats | None = None
    recruitable: NDArray[np.bool_] | None = None

    @property
    def topics(self) -> Topics:
        """What the conversation is about up to this turn; empty where nothing was classified."""
        if self.scores is None:
            return ()
        return topics_of(dict(zip(self.scores.labels, self.scores.probabilities, strict=True)))

    def only(self, keep: NDArray[np.bool_], reason: str | None = None) -> RoutePlan:
        """Keep some of the rows.

        Args:
            keep: (rows,), which ones.
            reason: Why the others are no candidates, for the session that holds on to one of them.
        """
        if keep.all():
            return self
        session = self.session
        if session is not None and reason is not None:
            at = session.position(self.rows)
            if at is not None and not keep[at]:
                session = replace(session, absent=reason)
        return replace(
            self,
            rows=self.rows[keep],
            quality=self.quality[keep],
            escalation_prob=self.escalation_prob[keep],
            session=session,
        )
