"""What the router saved against always asking the same recipe. Pure.

For each request that the router decided, the ledger compares what its answer cost with what a
*baseline*, such as the best expert, would be expected to cost for the same prompt, and the expected
qualities of both. The prompt's tokens are those that were counted, and the length of the baseline's
answer is the learned one. Where the baseline itself answered, nothing is saved and nothing lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.broker.cost_model import CostModel
from service.broker.pool_state import Floats
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.recipe_steps import further_steps
from service.broker.token_prices import MICRO, micro

# What the store counts for each baseline, all of it in whole numbers that only grow.
_PREFIX = "against\n"


@dataclass(frozen=True, slots=True)
class RecipeEstimates:
    """What is expected of every recipe for one prompt, whether it is a candidate or not.

    Attributes:
        quality: (recipes,), expected quality in [0, 1].
        escalation_prob: (recipes, MAX_LATER), the probability that each later expert is called.
        possible: (recipes,), whether it may answer: its experts are able, allowed to the tenant,
            and within the request's own bounds.
    """

    quality: Floats
    escalation_prob: Floats
    possible: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Saving:
    """One request against one baseline. Costs are in units, qualities in [0, 1].

    Attributes:
        baseline: Name of the baseline.
        cost: What the request cost.
        baseline_cost: What the baseline would be expected to cost.
        quality: The expected quality of the recipe that answered.
        baseline_quality: The expected quality of the baseline.
    """

    baseline: str
    cost: float
    baseline_cost: float
    quality: float
    baseline_quality: float

    def counts(self) -> dict[str, int]:
        """What the store adds to its counts of usage."""
        return {
            f"{_PREFIX}{self.baseline}/requests": 1,
            f"{_PREFIX}{self.baseline}/cost_micro": micro(self.cost),
            f"{_PREFIX}{self.baseline}/baseline_cost_micro": micro(self.baseline_cost),
            f"{_PREFIX}{self.baseline}/quality_micro": round(self.quality * MICRO),
            f"{_PREFIX}{self.baseline}/baseline_quality_micro": round(
                self.baseline_quality * MICRO
            ),
        }


@dataclass(slots=True)
class SavingsTotal:
    """Sums over requests that were compared with one baseline.

    Attributes:
        requests: How many.
        cost: What they cost, in units.
        baseline_cost: What the baseline would be expected to cost.
        quality: Sum of the expected qualities of the recipes that answered.
        baseline_quality: Sum of the baseline's.
    """

    requests: int = 0
    cost: float = 0.0
    baseline_cost: float = 0.0
    quality: float = 0.0
    baseline_quality: float = 0.0

    def add(self, saving: Saving) -> None:
        """Add one request."""
        self.requests += 1
        self.cost += saving.cost
        self.baseline_cost += saving.baseline_cost
        self.quality += saving.quality
        self.baseline_quality += saving.baseline_quality

    def to_json(self) -> dict[str, float]:
        """Sums of costs, and means of qualities over the requests."""
        requests = max(1, self.requests)
        return {
            "requests": self.requests,
            "cost": round(self.cost, 6),
            "baseline_cost": round(self.baseline_cost, 6),
            "saved_cost": round(self.baseline_cost - self.cost, 6),
            "quality": round(self.quality / requests, 6),
            "baseline_quality": round(self.baseline_quality / requests, 6),
            "quality_gain": round((self.quality - self.baseline_quality) / requests, 6),
        }


def is_saving(count: str) -> bool:
    """Whether a count of the store, by its name, belongs to the savings ledger."""
    return count.startswith(_PREFIX)


def totals(counts: Sequence[Mapping[str, int]]) -> dict[str, SavingsTotal]:
    """The sums by baseline, from counts of the store such as those of several days."""
    found: dict[str, SavingsTotal] = {}
    for name, count in ((n, c) for some in counts for n, c in some.items() if is_saving(n)):
        baseline, _, unit = name.removeprefix(_PREFIX).rpartition("/")
        total = found.setdefault(baseline, SavingsTotal())
        attribute = unit.removesuffix("_micro")
        added = count if unit == "requests" else count / MICRO
        setattr(total, attribute, getattr(total, attribute) + added)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class _Price:
    """The expected cost of a baseline: `rest`, and `per_token` for each token of the prompt."""

    baseline: str
    quality: float
    per_token: float
    rest: float
    answered: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answered request and its baselines, until its tokens are counted."""

    quality: float
    added_tokens: float
    prompt_tokens: int
    prices: tuple[_Price, ...]

    def settle(self, prompt_tokens: int | None, cost: float) -> tuple[Saving, ...]:
        """Compare the request with each baseline.

        Args:
            prompt_tokens: Tokens of its prompt as the expert that answered counted them; None
                where they are not known, and the estimate is taken.
            cost: What all its calls cost together.
        """
        counted = self.prompt_tokens if prompt_tokens is None else prompt_tokens
        bare = max(0.0, counted - self.added_tokens)
        return tuple(
            Saving(
                price.baseline,
                cost,
                cost if price.answered else price.rest + price.per_token * bare,
                self.quality,
                price.quality,
            )
            for price in self.prices
        )


class SavingsModel:
    """Knows what each baseline would be expected to cost and to be worth.

    Args:
        catalog: The recipes.
        cost_model: The prices and learned lengths of experts.
        against: Names of the baselines, each an expert or a recipe's entry in `named`.
        named: The catalog's index of every recipe that can be named.
    """

    def __init__(
        self,
        catalog: RecipeCatalog,
        cost_model: CostModel,
        against: Sequence[str],
        named: Mapping[str, int],
    ) -> None:
        self._catalog = catalog
        self._cost_model = cost_model
        self._against = tuple((name, named[name]) for name in against)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines."""
        return tuple(name for name, _ in self._against)

    def compare(
        self,
        row: int,
        expert: str,
        estimates: RecipeEstimates,
        *,
        category: str,
        prompt_tokens: int,
        most_tokens: int | None,
        answers: int,
        added_tokens: Floats | int,
        max_cost: float | None,
    ) -> Comparison | None:
        """Compare an answered request with the baselines that could have answered it.

        Args:
            row: The recipe that answered.
            expert: The expert whose answer went to the client.
            estimates: What was expected of every recipe.
            category: Category of the prompt.
            prompt_tokens: Estimated tokens of the prompt.
            most_tokens: The client's bound on the length of an answer.
            answers: How many answers were asked for at once.
            added_tokens: Tokens that each expert's own system prompt adds, (experts,).
            max_cost: The client's bound on the cost of its request.

        Returns:
            The comparison; None where no baseline could have answered.
        """
        if not self._against:
            return None
        catalog, experts = self._catalog, self._catalog.experts
        added = np.broadcast_to(np.asarray(added_tokens, dtype=np.float64), (len(experts),))
        per_token = self._cost_model.floor(1, 0)
        rest = self._cost_model.expect(category, added, most_tokens, answers).cost
        prices = []
        for name, at in self._against:
            if not estimates.possible[at]:
                continue
            calls = np.zeros(len(experts) + 1)
            np.add.at(calls, catalog.members[at], 1.0)
            np.add.at(calls, catalog.later[at], estimates.escalation_prob[at])
            calls = calls[:-1]
            if catalog.deliberates[at]:
                calls *= further_steps(estimates.escalation_prob[at : at + 1])[0]
            price = _Price(
                name,
                float(estimates.quality[at]),
                float(calls @ per_token),
                float(calls @ rest),
                at == row,
            )
            if max_cost is None or price.rest + price.per_token * prompt_tokens <= max_cost:
                prices.append(price)
        if not prices:
            return None
        own = float(added[catalog.index[expert]])
        quality = float(estimates.quality[row])
        return Comparison(quality, own, prompt_tokens + round(own), tuple(prices))


def best_baseline(by_category: Floats, able: NDArray[np.bool_]) -> int | None:
    """The recipe with the best mean quality over the categories; None if none is able.

    Args:
        by_category: (categories, recipes), expected quality.
        able: (recipes,), whether the recipe can answer ordinary prompts at all.
    """
    if not able.any() or not by_category.size:
        return None
    return int(np.where(able, by_category.mean(axis=0), -np.inf).argmax())
