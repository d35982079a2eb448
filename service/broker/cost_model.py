"""What a call of each expert is expected to cost, and how long its answer to be. No clock, no I/O.

Lengths are moving averages per category and expert, of what was seen here; where a
category has few, its expert's average over all of them stands in, by shrinkage.

An answer that was cut, by `max_tokens` or because its client left, is a censored observation: its
natural length is not known, only that it is at least so long. It counts as long as those of the
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
from service.broker.prices import Price

_EWMA = 0.05
# So many answers of a category weigh as much as the average over all.
_SHRINK = 8.0
# Until anything was seen.
USUAL_TOKENS = 64.0
# What an answer may need, of however many tokens its client allows.
LONG_TOKENS = 512
# Whole answers of an expert whose lengths are remembered for those that were cut.
_WHOLE = 64
# An answer longer than all those is taken for so many times as long as where it was cut.
_BEYOND = 2.0


# Places in an array: a slice, or numbers.
Places = slice | NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ExpectedUsage:
    """For each expert (experts,): tokens of one answer, and spending of one call."""

    tokens: Floats
    cost: Floats


class Lengths:
    """How long answers were, by the names of experts and categories: it outlives a config.

    Attributes:
        sums: (categories, experts), fading sums of lengths; row 0 is of what has no category.
        weights: (categories, experts), of how many answers they are, faded as well.
        usual: (experts,), of each over all categories, leaning on everybody's.
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
        """Where these experts' columns are; new ones get theirs."""
        found = [self._columns.setdefault(name, len(self._columns)) for name in experts]
        more = len(self._columns) - len(self.usual)
        self.sums = np.pad(self.sums, ((0, 0), (0, more)))
        self.weights = np.pad(self.weights, ((0, 0), (0, more)))
        self.usual = np.pad(self.usual, (0, more), constant_values=USUAL_TOKENS)
        self._whole += [deque(maxlen=_WHOLE) for _ in range(more)]
        self._lean()
        # A slice is quicker to read by than as many numbers.
        return slice(0, len(found)) if found == list(range(len(found))) else np.array(found)

    def rows(self, categories: Sequence[str]) -> dict[str, int]:
        """Where these categories' rows are; new ones get theirs."""
        found = {name: self._rows.setdefault(name, 1 + len(self._rows)) for name in categories}
        more = 1 + len(self._rows) - len(self.sums)
        self.sums = np.pad(self.sums, ((0, more), (0, 0)))
        self.weights = np.pad(self.weights, ((0, more), (0, 0)))
        return found

    def forget(self, experts: Iterable[str]) -> None:
        """Nothing is known of these any more."""
        for name in experts:
            if (column := self._columns.get(name)) is not None:
                self.sums[:, column] = self.weights[:, column] = 0.0
                self._whole[column].clear()
        self._lean()

    def saw(self, expert: str, category: str, tokens: int, *, cut: bool) -> None:
        """See `CostModel.saw`."""
        column = self._columns[expert]
        length = float(tokens)
        whole = self._whole[column]
        if cut:
            longer = [one for one in whole if one > tokens]
            length = sum(longer) / len(longer) if longer else _BEYOND * tokens
            if not whole:
                length = max(length, USUAL_TOKENS)
        else:
            whole.append(tokens)
        row = self._rows.get(category, 0)
        self.sums[row, column] = (1 - _EWMA) * self.sums[row, column] + length
        self.weights[row, column] = (1 - _EWMA) * self.weights[row, column] + 1.0
        self._lean()

    def _lean(self) -> None:
        """An expert's usual length leans on everybody's until it has enough of its own."""
        sums, weights = self.sums.sum(axis=0), self.weights.sum(axis=0)
        total = weights.sum()
        self.unseen = not total > 0
        everybody = USUAL_TOKENS if self.unseen else sums.sum() / total
        self.usual = (sums + _SHRINK * everybody) / (weights + _SHRINK)


class CostModel:
    """Prices and lengths of one config's experts, by index.

    Args:
        experts: By index.
        categories: Those that prompts may be of.
        prices: Of every expert.
        lengths: What is known of lengths; of a new gateway nothing.
    """

    def __init__(
        self,
        experts: Sequence[str],
        categories: Sequence[str],
        prices: Mapping[str, Price],
        lengths: Lengths | None = None,
    ) -> None:
        self._expert = {name: i for i, name in enumerate(experts)}
        self._lengths = Lengths() if lengths is None else lengths
        self._row = self._lengths.rows(categories)
        self._columns = self._lengths.columns(experts)
        self.prices = tuple(prices[name] for name in experts)
        self._per_prompt = np.array([price.prompt for price in self.prices]) / 1e6
        self._per_answer = np.array([price.completion for price in self.prices]) / 1e6

    @property
    def per_token(self) -> Floats:
        """Cost of one token of prompt and one of answer together, (experts,)."""
        return self._per_prompt + self._per_answer

    def price(self, expert: str) -> Price:
        """Of one expert."""
        return self.prices[self._expert[expert]]

    def expect(
        self, category: str, prompt_tokens: int, most_tokens: int | None, answers: int = 1
    ) -> ExpectedUsage:
        """What an answer to a prompt of this length is expected to come to.

        Args:
            category: Of the prompt.
            prompt_tokens: Length of all prompts of the request together.
            most_tokens: The client's bound on the length of an answer.
            answers: How many answers of that length are asked for at once.
        """
        known, row, columns = self._lengths, self._row.get(category, 0), self._columns
        tokens = (known.sums[row, columns] + _SHRINK * known.usual[columns]) / (
            known.weights[row, columns] + _SHRINK
        )
        if most_tokens is not None:
            # Before any answer was seen, the bound itself is the best guess, within reason.
            tokens = (
                np.full_like(tokens, min(most_tokens, LONG_TOKENS))
                if known.unseen
                else np.minimum(tokens, most_tokens)
            )
        cost = self._per_prompt * prompt_tokens + self._per_answer * (answers * tokens)
        return ExpectedUsage(tokens, cost)

    def observe(self, expert: str, category: str, tokens: int, *, cut: bool = False) -> None:
        """Learn from one answer.

        Args:
            expert: Whose answer it was.
            category: Of the prompt; one that is not known counts for the expert only.
            tokens: Length of the answer, as far as it came.
            cut: Whether the answer would have gone on: it reached its bound, or nobody waited for
                its end.
        """
        self._lengths.saw(expert, category, tokens, cut=cut)
