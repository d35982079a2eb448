"""What the lines of a batch cost, learned from those that have run. Pure.

A plan expects of each line and recipe a cost, by the lengths of earlier answers on its category.
The ratio of the real cost to the expected one, of line l and recipe r, is taken to be

    ρ[l, r] = m · (1 + a + z_l · b + a_r + z_l · b_r + a_k + a_kr),     k: the category of the line

m is the ratio of all answers so far, and z_l are features of the line: what is expected of it, by
recipe, which tells easy lines from hard ones. The coefficients have a normal prior with mean 0
(Lindley, Smith: Bayes Estimates for the Linear Model, 1972). It is narrow, because lengths vary
much: with a wide one, the chance of a few long answers would move the plan more than it teaches.
The noise is that of the answers around the fit. Ratios, not their logarithms, are fitted, because a
budget adds up means.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

# Prior variances: of the level of all lines, of a recipe, of a category, of a recipe on a category,
# and of all slopes together, in common and of a recipe.
_LEVEL, _RECIPE, _CATEGORY, _BOTH = 0.05, 0.0125, 0.01, 0.01
_SLOPES, _RECIPE_SLOPES = 0.05, 0.02
# The variance of one answer before any is known, how many answers that weighs as, and the least.
_NOISE, _NOISE_WEIGHT, _LEAST_NOISE = 0.5, 4.0, 1e-6
# Ratios of real to expected cost stay within these bounds.
_LEAST, _MOST = 0.05, 50.0
# The expected cost of all lines weighs as much as so many answers.
_EXPECTED_WEIGHT = 32.0
# Answers that are used, the newest ones: more cost time and teach little.
_MOST_ANSWERS = 4096


def features(quality: Floats, tokens: Floats) -> Floats:
    """Features of lines, (L, R + 1): each with mean 0 and variance 1, or 0 where all are alike.

    Args:
        quality: (L, R), expected quality of each recipe for each line.
        tokens: (L, R), expected tokens of each recipe for each line.
    """
    columns = np.column_stack([quality, np.log1p(tokens.max(axis=1, initial=0.0))])
    spread = columns.std(axis=0)
    found: Floats = (columns - columns.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)
    return found


def cost_ratios(
    given: Floats, category: Ints, recipes: int, lines: Ints, chosen: Ints, ratios: Floats
) -> Floats:
    """Predict the ratio of real to expected cost, (L, R), from the answers so far.

    Args:
        given: (L, F), features of the lines.
        category: (L,), category of each line, from 0 on.
        recipes: The number R of recipes.
        lines: (n,), lines that were answered, in the order of their answers.
        chosen: (n,), recipe of each answer.
        ratios: (n,), real cost of each answer divided by the expected one.
    """
    if not len(lines):
        return np.ones((len(given), recipes))
    lines, chosen = lines[-_MOST_ANSWERS:], chosen[-_MOST_ANSWERS:]
    seen_ratios = np.clip(ratios[-_MOST_ANSWERS:], _LEAST, _MOST)
    usual = float(seen_ratios.sum() + _EXPECTED_WEIGHT) / (len(seen_ratios) + _EXPECTED_WEIGHT)
    seen = np.unique(chosen)
    kinds = int(category.max()) + 1
    place = np.searchsorted(seen, chosen)
    design, variance = _design(given[lines], category[lines], place, len(seen), kinds)
    weight = _fitted(design, variance, seen_ratios / usual - 1.0)
    width = given.shape[1]
    common, weight = weight[: 1 + width], weight[1 + width :]
    own = weight[: len(seen) * (1 + width)].reshape(len(seen), 1 + width)
    weight = weight[own.size :]
    kind, both = weight[:kinds], weight[kinds:].reshape(len(seen), kinds)
    every = np.column_stack([np.ones(len(given)), given])
    found = np.tile((1.0 + every @ common + kind[category])[:, None], (1, recipes))
    found[:, seen] += every @ own.T + both[:, category].T
    return np.clip(usual * np.clip(found, _LEAST, None), _LEAST, _MOST)


def _fitted(design: Floats, variance: Floats, y: Floats) -> Floats:
    """The posterior mean of the coefficients, (D,), with the noise that the answers show."""
    gram, target = design.T @ design, design.T @ y
    noise = _NOISE
    weight = np.zeros(len(variance))
    for _ in range(3):
        inverse = np.linalg.inv(gram + np.diag(noise / variance))
        weight = inverse @ target
        # Coefficients that the answers determine take part of their noise away.
        free = max(len(y) - float((inverse * gram).sum()), 1.0)
        left = float(((y - design @ weight) ** 2).sum())
        noise = max(_LEAST_NOISE, (_NOISE_WEIGHT * _NOISE + left) / (_NOISE_WEIGHT + free))
    return weight


def _design(
    given: Floats, category: Ints, place: Ints, recipes: int, kinds: int
) -> tuple[Floats, Floats]:
    """The matrix of the regression, (n, D), and the prior variance of each coefficient, (D,)."""
    count, width = given.shape
    every = np.column_stack([np.ones(count), given])
    rows = np.arange(count)
    own = np.zeros((count, recipes, 1 + width))
    own[rows, place] = every
    kind = np.zeros((count, kinds))
    kind[rows, category] = 1.0
    both = np.zeros((count, recipes, kinds))
    both[rows, place, category] = 1.0
    slope, recipe_slope = _SLOPES / max(width, 1), _RECIPE_SLOPES / max(width, 1)
    variance = np.concatenate(
        [
            [_LEVEL],
            np.full(width, slope),
            np.tile([_RECIPE, *[recipe_slope] * width], recipes),
            np.full(kinds, _CATEGORY),
            np.full(recipes * kinds, _BOTH),
        ]
    )
    design = np.hstack([every, own.reshape(count, -1), kind, both.reshape(count, -1)])
    return design, variance
