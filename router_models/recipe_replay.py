"""Replays recipes on recorded outcomes, and chooses the recipes to try.

Costs count every call of a recipe. Two experts agree if their recorded answers are equal. An expert
without an answer to a prompt agrees with no other expert. Experts without recorded answers take
part in no cascade and no vote.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_models.outcome_reader import NO_ANSWER, Table
from service.types import MAX_LATER, Recipe

Floats = NDArray[np.float64]

# With more experts than this, pairs and triples are made of the most promising only.
MAX_COMBINED_EXPERTS = 9
# Chains of four are tried only below this, they grow with the fourth power.
MAX_CHAINED_EXPERTS = 7
# An expert that leaves fewer prompts than this without an answer needs no fallback.
_MIN_SILENT = 0.005


@dataclass(frozen=True, slots=True)
class RecipeResults:
    """The results of R recipes on N recorded rows.

    `score` and `cost` (N, R), NaN where an expert it needed is missing from the
    row; `reach` (N, R, MAX_LATER): 1 where that later expert was asked.
    """

    recipes: tuple[Recipe, ...]
    score: Floats
    cost: Floats
    reach: NDArray[np.float32]

    def take(self, columns: Sequence[int]) -> RecipeResults:
        """Only these recipes, in this order."""
        at = list(columns)
        return RecipeResults(
            tuple(self.recipes[i] for i in at),
            self.score[:, at],
            self.cost[:, at],
            self.reach[:, at],
        )

    def rows(self, rows: NDArray[np.int64]) -> RecipeResults:
        """Only these rows, in this order."""
        return RecipeResults(self.recipes, self.score[rows], self.cost[rows], self.reach[rows])


def candidates(table: Table) -> list[Recipe]:
    """Every recipe worth trying on this table: singles, cascades and votes.

    Cascades escalate to someone dearer than their cheapest member. A vote of
    three with the last deciding gives the same answer as the cascade of its
    first two, which may save the third call: so votes are of three cheap
    experts where speed counts, and the fit keeps them only if they win.
    """
    recipes = [Recipe("single", (name,)) for name in table.experts]
    usable = _combinable(table)
    cost = {name: float(table.cost[:, e].mean()) for e, name in enumerate(table.experts)}
    silent = {
        name: float((table.answer[:, e] == NO_ANSWER)[~np.isnan(table.score[:, e])].mean())
        for e, name in enumerate(table.experts)
        if name in usable
    }
    for a, c in itertools.permutations(usable, 2):
        if silent[a] >= _MIN_SILENT:
            recipes.append(Recipe("cascade", (a,), (c,)))
    chained = len(usable) <= MAX_CHAINED_EXPERTS
    for a, b in itertools.combinations(sorted(usable, key=lambda name: cost[name]), 2):
        for c in usable:
            if c in (a, b) or cost[c] < cost[a]:
                continue
            recipes.append(Recipe("cascade", (a, b), (c,)))
            for d in usable if chained else ():
                if d not in (a, b, c) and cost[d] >= cost[b]:
                    recipes.append(Recipe("cascade", (a, b), (c, d)))
    for trio in itertools.combinations(sorted(usable, key=lambda name: cost[name]), 3):
        recipes.append(Recipe("vote", trio))
    return recipes


def _combinable(table: Table) -> list[str]:
    """Experts with answers; of too many the ones on or nearest to the frontier of singles."""
    known = [e for e in range(len(table.experts)) if table.has_answers[e]]
    if len(known) > MAX_COMBINED_EXPERTS:
        score = np.nanmean(table.score[:, known], axis=0)
        cost = table.cost[:, known].mean(axis=0)
        # How much better the best expert of no higher cost is.
        behind = [
            float(max(score[cost <= cost[i]].max() - score[i], 0.0)) for i in range(len(known))
        ]
        best = sorted(range(len(known)), key=lambda i: (behind[i], cost[i]))
        known = sorted(known[i] for i in best[:MAX_COMBINED_EXPERTS])
    return [table.experts[e] for e in known]


def play(recipes: Sequence[Recipe], table: Table) -> RecipeResults:
    """Score, cost and reach of every recipe on every row of the table."""
    at = {name: e for e, name in enumerate(table.experts)}
    rows, count = len(table), len(recipes)
    score = np.full((rows, count), np.nan)
    cost = np.full((rows, count), np.nan)
    reach = np.zeros((rows, count, MAX_LATER), dtype=np.float32)
    for r, recipe in enumerate(recipes):
        experts = [at[name] for name in recipe.experts]
        if recipe.kind == "single":
            e = experts[0]
            score[:, r] = table.score[:, e]
            cost[:, r] = np.where(np.isnan(table.score[:, e]), np.nan, table.cost[:, e])
        elif recipe.kind == "vote":
            score[:, r], cost[:, r] = _vote(experts, table)
        else:
            score[:, r], cost[:, r], called = _cascade(experts, len(recipe.members), table)
            reach[:, r, : called.shape[1]] = called
    return RecipeResults(tuple(recipes), score, cost, reach)


def _cascade(experts: list[int], together: int, table: Table) -> tuple[Floats, Floats, Floats]:
    answer, score = table.answer[:, experts], table.score[:, experts]
    rows = np.arange(len(table))
    cost = table.cost[:, experts[:together]].sum(axis=1)
    missing = np.isnan(score[:, :together]).any(axis=1)
    # The position in `experts` whose answer is taken; -1 while undecided.
    taken = np.full(len(table), -1)
    first = answer[:, 0]
    agreed = (first != NO_ANSWER) & (answer[:, :together] == first[:, None]).all(axis=1)
    taken[agreed] = 0
    called = np.zeros((len(table), len(experts) - together))
    for i in range(together, len(experts)):
        open_ = taken < 0
        called[:, i - together] = open_
        cost = cost + open_ * table.cost[:, experts[i]]
        missing |= open_ & np.isnan(score[:, i])
        gave = answer[:, i] != NO_ANSWER
        agrees = gave & (answer[:, :i] == answer[:, i : i + 1]).any(axis=1)
        # The last one's answer is sent as it stands, readable or not.
        taken[open_ & (agrees | (i == len(experts) - 1))] = i
    found = score[rows, taken]
    return np.where(missing, np.nan, found), np.where(missing, np.nan, cost), called


def _vote(experts: list[int], table: Table) -> tuple[Floats, Floats]:
    answer, score = table.answer[:, experts], table.score[:, experts]
    size = len(experts)
    given = answer != NO_ANSWER
    votes = ((answer[:, :, None] == answer[:, None, :]) & given[:, :, None]).sum(axis=2)
    # The most votes; among equals the last member that gave an answer.
    rank = votes * (2 * size) + given * size + np.arange(size)
    winner = rank.argmax(axis=1)
    found = score[np.arange(len(table)), winner]
    missing = np.isnan(score).any(axis=1)
    cost = np.where(missing, np.nan, table.cost[:, experts].sum(axis=1))
    return np.where(missing, np.nan, found), cost
