"""Corrects the expert map by outcomes from traffic, and tests whether that helps.

Outcomes from traffic say which expert did better on the same prompt, by agreement or by a judge,
and not how good it is on the scale that the map was fitted on. So each row counts by differences:
of every expert's score to the mean of the row's scores, less the same difference of the map. The
mean of these residuals in a category, shrunk by its number of rows, is added to the map. Recipes of
several experts move by the mean of their experts.

The rows are split by prompt. The candidate is corrected by one part and judged on the other: both
maps choose among the experts that have an outcome on a row, and the difference of what they chose
is resampled by prompt (paired bootstrap; Efron and Tibshirani: An Introduction to the Bootstrap,
1993).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.outcome_reader import OutcomeError
from service.types import Recipe

Floats = NDArray[np.float64]

# A category's residuals count half at so many rows.
_PRIOR_ROWS = 20.0
# Of five parts of the prompts, the map is corrected by three.
_PARTS, _CORRECTED_BY = 5, 3
_SAMPLES = 4000


@dataclass(frozen=True, slots=True)
class TrafficRow:
    """One prompt with the outcomes of at least two experts.

    Attributes:
        category: Its category.
        prompt: A hash of the prompt; rows with equal prompts stay in one part.
        scores: Score by expert, in [0, 1].
        costs: Cost by expert, in units, where it is known.
    """

    category: str
    prompt: str
    scores: Mapping[str, float]
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a corrected map did on the prompts that did not correct it.

    Attributes:
        prompts: How many.
        changed: Share of the rows on which it chooses another expert.
        gain: Mean difference in score less priced cost.
        better: Share of the bootstrap's samples in which that is above 0.
    """

    prompts: int
    changed: float
    gain: float
    better: float


def read_rows(files: Sequence[Path]) -> list[TrafficRow]:
    """Read the rows of exported outcomes with a category and at least two scores.

    Raises:
        OutcomeError: A line is no row, or none can be used.
        OSError: A file can't be read.
    """
    rows = [row for file in files for row in _rows_of(file)]
    if not rows:
        raise OutcomeError("no row has a category and the scores of at least two experts")
    return rows


def _rows_of(file: Path) -> Iterator[TrafficRow]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            data: Any = json.loads(line)
            outcomes: Mapping[str, Any] = data["outcomes"]
            scores = {name: float(outcome["score"]) for name, outcome in outcomes.items()}
            costs = {
                name: float(outcome["cost"])
                for name, outcome in outcomes.items()
                if outcome.get("cost") is not None
            }
            category = data.get("category")
            prompt = data.get("prompt_hash") or data.get("prompt") or data["id"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OutcomeError(f"{file}:{number}: not a row of exported outcomes") from None
        if not all(0 <= score <= 1 for score in scores.values()):
            raise OutcomeError(f"{file}:{number}: a score is not in [0, 1]")
        if isinstance(category, str) and len(scores) > 1:
            yield TrafficRow(category, str(prompt), scores, costs)


def split(
    rows: Sequence[TrafficRow], rng: np.random.Generator
) -> tuple[list[TrafficRow], list[TrafficRow]]:
    """The rows that correct the map, and those that judge it; a prompt is in one of them only."""
    prompts = sorted({row.prompt for row in rows})
    part = rng.permutation(len(prompts)) % _PARTS
    judging = {prompt for prompt, at in zip(prompts, part, strict=True) if at >= _CORRECTED_BY}
    return (
        [row for row in rows if row.prompt not in judging],
        [row for row in rows if row.prompt in judging],
    )


class MapColumns:
    """The rows and columns of a map by their names.

    Args:
        categories: Its categories.
        recipes: Its recipes.
    """

    def __init__(self, categories: Sequence[str], recipes: Sequence[Recipe]) -> None:
        self._row = {name: i for i, name in enumerate(categories)}
        self._column = {r.members[0]: i for i, r in enumerate(recipes) if r.kind == "single"}
        self._recipes = tuple(recipes)

    def usable(self, rows: Sequence[TrafficRow]) -> list[TrafficRow]:
        """The rows of known categories with at least two known experts, those alone."""
        found = []
        for row in rows:
            scores = {name: s for name, s in row.scores.items() if name in self._column}
            if row.category in self._row and len(scores) > 1:
                found.append(TrafficRow(row.category, row.prompt, scores, row.costs))
        return found

    def correction(self, score: Floats, rows: Sequence[TrafficRow]) -> tuple[Floats, Floats]:
        """What is to be added to a map by these rows.

        Args:
            score: (categories, recipes), the map.
            rows: Usable rows.

        Returns:
            (categories, recipes), and (recipes,) over all categories together.
        """
        sums, counts = np.zeros_like(score), np.zeros_like(score)
        for row in rows:
            at, columns = self._row[row.category], [self._column[name] for name in row.scores]
            scores = np.array([*row.scores.values()])
            believed = score[at, columns]
            sums[at, columns] += (scores - scores.mean()) - (believed - believed.mean())
            counts[at, columns] += 1.0
        alone = sums / (counts + _PRIOR_ROWS)
        overall = sums.sum(axis=0) / (counts.sum(axis=0) + _PRIOR_ROWS)
        return self._of_recipes(alone), self._of_recipes(overall[None])[0]

    def _of_recipes(self, alone: Floats) -> Floats:
        """Corrections of all recipes by those of single experts, (categories, recipes)."""
        found = np.zeros_like(alone)
        for i, recipe in enumerate(self._recipes):
            columns = [self._column[name] for name in recipe.experts if name in self._column]
            if columns:
                found[:, i] = alone[:, columns].mean(axis=1)
        return found

    def choices(
        self, score: Floats, rows: Sequence[TrafficRow], cost: Mapping[str, float], price: float
    ) -> list[str]:
        """The expert that a map chooses on each row, at a price of cost."""
        found = []
        for row in rows:
            at = self._row[row.category]
            found.append(
                max(
                    sorted(row.scores),
                    key=lambda name: score[at, self._column[name]] - price * cost.get(name, 0.0),
                )
            )
        return found

    def judge(
        self,
        present: Floats,
        candidate: Floats,
        rows: Sequence[TrafficRow],
        cost: Mapping[str, float],
        cost_weight: float,
        rng: np.random.Generator,
    ) -> Judgement:
        """Compare two maps on rows that corrected neither.

        Args:
            present: (categories, recipes), the present map.
            candidate: (categories, recipes), the other one.
            rows: Usable rows.
            cost: Mean cost by expert.
            cost_weight: Quality that is given up to save the whole cost of the dearest expert.
            rng: Draws the samples.
        """
        price = cost_weight / max(cost.values(), default=0.0) if any(cost.values()) else 0.0
        before = self.choices(present, rows, cost, price)
        after = self.choices(candidate, rows, cost, price)

        def worth(row: TrafficRow, name: str) -> float:
            return row.scores[name] - price * row.costs.get(name, cost.get(name, 0.0))

        by_prompt: dict[str, list[float]] = {}
        for row, old, new in zip(rows, before, after, strict=True):
            by_prompt.setdefault(row.prompt, []).append(worth(row, new) - worth(row, old))
        gains = np.array([np.mean(values) for values in by_prompt.values()])
        if not len(gains):
            return Judgement(0, 0.0, 0.0, 0.0)
        better = 0
        for _ in range(_SAMPLES):
            better += bool(gains[rng.integers(len(gains), size=len(gains))].mean() > 1e-12)
        return Judgement(
            len(gains),
            float(np.mean([old != new for old, new in zip(before, after, strict=True)])),
            float(gains.mean()),
            better / _SAMPLES,
        )


def mean_costs(rows: Sequence[TrafficRow]) -> dict[str, float]:
    """The mean of the known costs by expert."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, cost in row.costs.items():
            found.setdefault(name, []).append(cost)
    return {name: float(np.mean(costs)) for name, costs in found.items()}
