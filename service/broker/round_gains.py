"""What further rounds of deliberations gain, learned from the rounds that are held. Pure.

Nobody tells a gateway which answer was right. The reviewers of a round do tell how they compare the
answers, and that is taken as the probability that the leading one is right: `leader_belief` of
`service/broker/deliberation.py`. A round with the belief q before it leaves the doubt 1 − q. If the
leading answer is then another one, with the belief q', it has put q' − (1 − q') = 2q' − 1 right:
what the new leader is believed more than the one that it replaces. If it is the same, the
round has gained nothing. The gain of a recipe, the share of the doubt that a round puts right, has
the posterior

    Beta(w·g + Σ gained, w·(1 − g) + Σ (doubt − gained))

whose prior is the gain g of the config with the weight w. Old rounds fade. A round is held or not
by a draw from it (Thompson: On the Likelihood that One Unknown Probability Exceeds Another, 1933),
so that rounds that look worthless are tried again now and then. By the mean, a few unlucky ones
would end all further rounds, and with them all learning.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from service.types import Recipe

# The config's gain weighs as much as rounds with so much doubt.
_PRIOR = 8.0
# What one round leaves of the weight of those before.
_KEPT = 0.995


@dataclass(frozen=True, slots=True)
class HeldRound:
    """What a further round has shown.

    Attributes:
        before: The belief in the leading answer before the round, in [0, 1].
        after: The belief in the leading answer after it, in [0, 1].
        changed: Whether another answer leads.
    """

    before: float
    after: float
    changed: bool

    @property
    def doubt(self) -> float:
        """The probability that the answer before was wrong."""
        return 1.0 - self.before

    @property
    def gained(self) -> float:
        """The part of the doubt that the round put right."""
        return min(self.doubt, max(0.0, 2 * self.after - 1)) if self.changed else 0.0


class RoundGains:
    """Gains of further rounds by recipe. It outlives a config."""

    def __init__(self) -> None:
        # Recipe → what rounds gained and what they did not, in units of doubt.
        self._seen: dict[Recipe, tuple[float, float]] = {}

    def observe(self, recipe: Recipe, held: HeldRound) -> None:
        """Learn from a further round of a deliberation."""
        gained, missed = self._seen.get(recipe, (0.0, 0.0))
        self._seen[recipe] = (
            _KEPT * gained + held.gained,
            _KEPT * missed + held.doubt - held.gained,
        )

    def mean(self, recipe: Recipe) -> float:
        """The expected gain of a further round, in [0, 1]."""
        gained, missed = self._posterior(recipe)
        return gained / (gained + missed)

    def draw(self, recipe: Recipe, rng: random.Random) -> float:
        """Draw the gain of a further round from its posterior.

        A recipe whose config says 0 or 1 has this gain until a round has shown another one.
        """
        gained, missed = self._posterior(recipe)
        if gained <= 0.0 or missed <= 0.0:
            return self.mean(recipe)
        return rng.betavariate(gained, missed)

    def forget(self, experts: Collection[str]) -> None:
        """Delete what was learned of the recipes that use any of these experts."""
        self._seen = {
            recipe: seen
            for recipe, seen in self._seen.items()
            if not any(name in experts for name in recipe.experts)
        }

    def _posterior(self, recipe: Recipe) -> tuple[float, float]:
        assert recipe.deliberation is not None
        prior = recipe.deliberation.gain
        gained, missed = self._seen.get(recipe, (0.0, 0.0))
        return _PRIOR * prior + gained, _PRIOR * (1.0 - prior) + missed
