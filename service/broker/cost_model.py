"""Expected length and cost of each expert's answers. Pure.

Lengths are moving averages per category and expert. A category with few answers is shrunk to its
expert's average over all categories.

An answer that was cut, by `max_tokens` or because its client left, is a censored observation: only
a lower bound of its natural length is known. It counts as long as those of the
expert's whole answers that are longer, on average: its mass is redistributed to the right (Efron:
The Two Sample Problem with Censored Data, 1967).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats
from service.broker.recipe_steps import TEMPLATE_TOKENS, StepFigures
from service.broker.token_prices import Price

_EWMA = 0.05
# The average over all categories weighs as much as so many answers.
_SHRINK = 8.0
# Expected length before any observation.
USUAL_TOKENS = 64.0
# Expected length of an answer before any observation, at most.
LONG_TOKENS = 512
# Whole answers of an expert whose lengths are remembered for those that were cut.
_WHOLE = 64
# Factor of the length at the cut, where no whole answer is longer.
_BEYOND = 2.0


# Columns of an array: a slice, or indices.
Places = slice | NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ExpectedUsage:
    """For each expert (experts,): tokens of one answer, and spending of one call.

    `steps` is what it writes and reads in the steps of deliberations and recruits; None where the
    config has none.
    """

    tokens: Floats
    cost: Floats
    steps: StepFigures | None = None


class Lengths:
    """Lengths of answers by names of experts and categories. It outlives a config.

    Attributes:
        sums: (categories, experts), decayed sums of lengths; row 0 is for prompts without category.
        weights: (categories, experts), decayed numbers of answers.
        usual: (experts,), average over all categories, shrunk to that of all experts.
        unseen: Whether no answer was seen yet.
    """

    def __init__(self) -> None:
        self._columns: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self.sums = np.zeros((1, 0))
        self.weights = np.zeros((1, 0))
        self.usual = np.zeros(0)
        self.unseen = True
        self._whole: list[deque[int]] = []

    def columns(self, experts: Sequence[str]) -> Places:
        """Columns of these experts; new experts get new columns."""
        found = [self._columns.setdefault(name, len(self._columns)) for name in experts]
        more = len(self._columns) - len(self.usual)
        self.sums = np.pad(self.sums, ((0, 0), (0, more)))
        self.weights = np.pad(self.weights, ((0, 0), (0, more)))
        self.usual = np.pad(self.usual, (0, more), constant_values=USUAL_TOKENS)
        self._whole += [deque(maxlen=_WHOLE) for _ in range(more)]
        self._shrink()
        # Reading by a slice is faster than by indices.
        return slice(0, len(found)) if found == list(range(len(found))) else np.array(found)

    def rows(self, categories: Sequence[str]) -> dict[str, int]:
        """Rows of these categories; new categories get new rows."""
        found = {name: self._rows.setdefault(name, 1 + len(self._rows)) for name in categories}
        more = 1 + len(self._rows) - len(self.sums)
        self.sums = np.pad(self.sums, ((0, more), (0, 0)))
        self.weights = np.pad(self.weights, ((0, more), (0, 0)))
        return found

    def forget(self, experts: Iterable[str]) -> None:
        """Delete the observations of these experts."""
        for name in experts:
            if (column := self._columns.get(name)) is not None:
                self.sums[:, column] = self.weights[:, column] = 0.0
                self._whole[column].clear()
        self._shrink()

    def observe(self, expert: str, category: str, tokens: int, *, cut: bool) -> None:
        """Add the length of one answer; `cut`: it would have gone on."""
        column = self._columns[expert]
        length = float(tokens)
        whole = self._whole[column]
        if cut:
            longer = [other for other in whole if other > tokens]
            length = sum(longer) / len(longer) if longer else _BEYOND * tokens
            if not whole:
                length = max(length, USUAL_TOKENS)
        else:
            whole.append(tokens)
        row = self._rows.get(category, 0)
        self.sums[row, column] = (1 - _EWMA) * self.sums[row, column] + length
        self.weights[row, column] = (1 - _EWMA) * self.weights[row, column] + 1.0
        self._shrink()

    def _shrink(self) -> None:
        """Shrink the usual length of experts with few answers to the average of all."""
        sums, weights = self.sums.sum(axis=0), self.weights.sum(axis=0)
        total = weights.sum()
        self.unseen = not total > 0
        everybody = USUAL_TOKENS if self.unseen else sums.sum() / total
        self.usual = (sums + _SHRINK * everybody) / (weights + _SHRINK)


@dataclass(frozen=True, slots=True)
class PriorTokens:
    """What is known of each expert's tokens before this gateway has seen an answer.

    Attributes:
        answer: (1 + categories, experts), recorded lengths of answers; NaN where none were. Row 0
            is for prompts without category.
        added: (experts,), tokens that the chat template adds to a prompt.
        most: (experts,), the bound of an answer where the request has none; infinite without one.
    """

    answer: Floats
    added: Floats
    most: Floats

    @classmethod
    def nothing(cls, categories: int, experts: int) -> PriorTokens:
        """Nothing is known."""
        return cls(
            np.full((1 + categories, experts), np.nan), np.zeros(experts), np.full(experts, np.inf)
        )


class CostModel:
    """Prices and lengths of one config's experts, by index.

    Args:
        experts: By index.
        categories: Categories of prompts.
        prices: Price of every expert.
        lengths: Observed lengths; a new gateway has none.
        prior: What is known before any observation; None knows nothing.
        reviews: Observed lengths of reviews; None where no recipe has steps.
        most_review_tokens: The greatest bound of a review.
    """

    def __init__(
        self,
        experts: Sequence[str],
        categories: Sequence[str],
        prices: Mapping[str, Price],
        lengths: Lengths | None = None,
        prior: PriorTokens | None = None,
        reviews: Lengths | None = None,
        most_review_tokens: float = np.inf,
    ) -> None:
        self._reviews = reviews
        self._most_review_tokens = most_review_tokens
        if reviews is not None:
            self._review_row = reviews.rows(categories)
            self._review_columns = reviews.columns(experts)
        self._expert = {name: i for i, name in enumerate(experts)}
        self._lengths = Lengths() if lengths is None else lengths
        self._row = self._lengths.rows(categories)
        self._columns = self._lengths.columns(experts)
        self.prices = tuple(prices[name] for name in experts)
        self._per_prompt = np.array([price.prompt for price in self.prices]) / 1e6
        self._per_answer = np.array([price.completion for price in self.prices]) / 1e6
        known = prior or PriorTokens.nothing(len(categories), len(experts))
        self._prior_row = {category: 1 + row for row, category in enumerate(categories)}
        self._recorded = known.answer
        self._unrecorded = np.isnan(known.answer)
        self._most = known.most
        self._template_cost = self._per_prompt * known.added

    @property
    def per_token(self) -> Floats:
        """Cost of one token of prompt and one of answer together, (experts,)."""
        return self._per_prompt + self._per_answer

    def price(self, expert: str) -> Price:
        """The price of one expert."""
        return self.prices[self._expert[expert]]

    def floor(self, prompt_tokens: int | Floats, answers: int) -> Floats:
        """(experts,), the cost of a prompt of this length and one token for each answer.

        Args:
            prompt_tokens: Length of all prompts together, the same for all experts or (experts,).
            answers: How many answers are asked for.
        """
        return self._per_prompt * prompt_tokens + self._per_answer * answers

    def expect(
        self,
        category: str,
        prompt_tokens: int | Floats,
        most_tokens: int | None,
        answers: int = 1,
        saved_tokens: Floats | None = None,
    ) -> ExpectedUsage:
        """Expected tokens and cost of an answer to a prompt of this length.

        Args:
            category: Category of the prompt.
            prompt_tokens: Length of all prompts of the request together, the same for all experts
                or (experts,).
            most_tokens: The client's bound on the length of an answer.
            answers: How many answers of that length are asked for at once.
            saved_tokens: (experts,), by how much each answer is shorter than usual; None for 0.
        """
        known, row, columns = self._lengths, self._row.get(category, 0), self._columns
        prior_row = self._prior_row.get(category, 0)
        unrecorded = self._unrecorded[prior_row]
        usual = np.where(unrecorded, known.usual[columns], self._recorded[prior_row])
        if most_tokens is not None and known.unseen:
            # Before any answer was seen, the bound itself is the best guess, within reason.
            usual[unrecorded] = LONG_TOKENS
        tokens = (known.sums[row, columns] + _SHRINK * usual) / (
            known.weights[row, columns] + _SHRINK
        )
        if saved_tokens is not None:
            tokens = np.maximum(tokens - saved_tokens, 1.0)
        np.minimum(tokens, self._most if most_tokens is None else most_tokens, out=tokens)
        cost = self._per_prompt * prompt_tokens + self._per_answer * (answers * tokens)
        cost += self._template_cost
        steps = None
        if self._reviews is not None:
            steps = self._steps(self._reviews, category, prompt_tokens, tokens)
        return ExpectedUsage(tokens, cost, steps)

    def _steps(
        self, known: Lengths, category: str, prompt_tokens: int | Floats, tokens: Floats
    ) -> StepFigures:
        columns = self._review_columns
        usual = known.usual[columns]
        row = self._review_row.get(category, 0)
        reviews = (known.sums[row, columns] + _SHRINK * usual) / (
            known.weights[row, columns] + _SHRINK
        )
        reviews = np.minimum(reviews, self._most_review_tokens)
        cost = self._per_prompt * (prompt_tokens + TEMPLATE_TOKENS) + self._per_answer * reviews
        return StepFigures(tokens, reviews, cost + self._template_cost, self._per_prompt)

    def observe(self, expert: str, category: str, tokens: int, *, cut: bool = False) -> None:
        """Learn from one answer.

        Args:
            expert: The expert that answered.
            category: Category of the prompt; an unknown one counts for the expert only.
            tokens: Length of the answer, as far as it came.
            cut: Whether the answer would have gone on: it reached its bound, or its client left.
        """
        self._lengths.observe(expert, category, tokens, cut=cut)

    def observe_review(self, expert: str, category: str, tokens: int, *, cut: bool = False) -> None:
        """Learn from the length of one review; the arguments are those of `observe`."""
        if self._reviews is not None:
            self._reviews.observe(expert, category, tokens, cut=cut)
