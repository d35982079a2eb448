"""From a table of outcomes to a router: posterior, factors and map. Owns the statistics.

Two stages. The first is linear in the prompt's n-grams: one output a category,
one a *factor* (the main ways in which experts' results vary together, so "how
hard, and for whom"). The second is the map: per category and recipe the mean
score, shrunk toward the recipe's overall mean, and slopes on the factors. The
second stage is fitted on first-stage outputs for rows which that stage did not
see, or it would trust them too much.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster.vq import kmeans2
from scipy.sparse.linalg import svds

from router_models.linear import (
    Corpus,
    design,
    featurize,
    fit_logistic,
    softmax,
)
from router_models.outcomes import NO_ANSWER, Table
from router_models.recipes import Played, candidates, play
from router_models.ridge import TextKernel
from service.router.features import FeatureSpec
from service.router.map import MAX_RECIPES

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


_MAX_CLUSTERS = 16
_PENALTY_FOLDS = 5
# Outputs lie within 0..1; the logits are some ten times as wide.
_CALIBRATION_SCALE = 10.0
_NEVER = 1e12
"""A penalty that leaves nothing of what it is put on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What may be tuned.

    `l2_*` are ridge penalties, `shrink_rows` pseudo-rows of the prior.
    `slope_penalties` are pairs (of the slopes shared by all categories, of each
    category's own) of which the training rows choose one.
    """

    spec: FeatureSpec = field(default_factory=FeatureSpec)
    l2_category: float = 0.2
    l2_factor: float = 4.0
    l2_calibration: float = 1e-5
    factors: int = 8
    shrink_rows: float = 60.0
    slope_penalties: tuple[tuple[float, float], ...] = (
        (_NEVER, _NEVER),
        (20.0, _NEVER),
        (20.0, 60.0),
        (10.0, 60.0),
        (5.0, 20.0),
        (5.0, 5.0),
    )
    inner_folds: int = 5
    max_recipes: int = MAX_RECIPES
    min_confidence: float = 0.3
    max_novelty: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Stage1:
    """Linear heads as fitted on some rows: α over them, and the constants added.

    The category outputs are logits once they are calibrated.
    """

    alpha_category: NDArray[np.float32]
    bias_category: Floats
    alpha_factor: NDArray[np.float32]
    bias_factor: Floats

    def calibrated(self, matrix: Floats, bias: Floats) -> Stage1:
        """With the category outputs o replaced by o·matrix + bias."""
        return Stage1(
            (self.alpha_category @ matrix).astype(np.float32),
            self.bias_category @ matrix + bias,
            self.alpha_factor,
            self.bias_factor,
        )


@dataclass(frozen=True, slots=True)
class MapFit:
    """The arrays of `service.router.map.ExpertMap` for the recipes kept (indexes `kept`)."""

    kept: Rows
    prior: Floats
    score: Floats
    count: Floats
    cost: Floats
    reach: Floats
    score_slope: Floats
    cost_slope: Floats

    def estimate(self, posterior: Floats, factors: Floats) -> tuple[Floats, Floats]:
        """Quality and cost (rows, kept recipes), as `ExpertMap.estimate` computes for one row."""
        cross = _cross(posterior, factors)
        flat = (cross.shape[1], len(self.kept))
        quality = posterior @ self.score + cross @ self.score_slope.reshape(flat)
        cost = posterior @ self.cost + cross @ self.cost_slope.reshape(flat)
        return np.clip(quality, 0, 1), np.maximum(cost, 0)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A router fitted on the rows `train` of a problem."""

    train: Rows
    stage1: Stage1
    map: MapFit


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a router expects of rows it did not see; NaN-free, (rows, all recipes).

    Recipes that the router did not keep have quality -inf.
    """

    posterior: Floats
    quality: Floats
    cost: Floats


class Problem:
    """A table with its features, categories and recipes: fitted as a whole or in folds."""

    def __init__(self, table: Table, settings: Settings) -> None:
        self.table = table
        self.settings = settings
        self.corpus: Corpus = featurize(table.prompts, settings.spec)
        self.played: Played = play(candidates(table), table)
        # Buckets are not weighted by document frequency: one kernel then serves every
        # fold without any of them having seen another's prompts.
        self.idf = np.ones(settings.spec.buckets, dtype=np.float32)
        self.design = design(self.corpus.counts, self.idf)
        self.kernel = TextKernel(self.design)
        self.given = np.array([c is not None for c in table.categories])
        self.clustered = bool(self.given.mean() < 0.5)
        if self.clustered:
            clusters = int(np.clip(len(table) // 150, 1, _MAX_CLUSTERS))
            self.labels = tuple(f"cluster-{i}" for i in range(clusters))
        else:
            self.labels = tuple(sorted({c for c in table.categories if c is not None}))
        at = {label: i for i, label in enumerate(self.labels)}
        self._category = np.array([at.get(c or "", -1) for c in table.categories])
        self.targets = _targets(table)

    def category(self, rows: Rows) -> Rows:
        """The category of each of `rows`, found from these rows alone.

        Where fewer than half of the rows have a category, clusters of their
        n-grams stand for categories. Rows without one, where most have, take
        that of the nearest centroid.
        """
        if self.clustered:
            return _clusters(self.design[rows], len(self.labels), self.settings.seed)
        found = self._category[rows].copy()
        bare = np.flatnonzero(found < 0)
        if len(bare):
            x = self.design[rows]
            member = np.eye(len(self.labels))[found] * (found >= 0)[:, None]
            centroid = np.asarray(x.T @ member)
            length = np.maximum(np.linalg.norm(centroid, axis=0), 1e-9)
            found[bare] = np.asarray(x[bare] @ (centroid / length)).argmax(axis=1)
        return found

    def fold_of(self, folds: int, salt: str) -> Rows:
        """A fold 0..folds-1 for each row; rows with the same prompt share one."""
        seed = f"{salt}/{self.settings.seed}/"
        return np.array(
            [zlib.crc32((seed + p).encode("utf-8", "replace")) % folds for p in self.table.prompts]
        )

    def fit(self, train: Rows) -> Fitted:
        """Fit both stages on the rows `train`."""
        s = self.settings
        kernel = self.kernel
        category = self.category(train)
        onehot = np.eye(len(self.labels))[category]
        factor = _factors(self.targets[train], s.factors)
        inner = self.fold_of(s.inner_folds, "inner")[train]
        outputs = np.zeros((len(train), len(self.labels)))
        unseen = np.zeros_like(factor)
        for k in range(s.inner_folds):
            inside, outside = np.flatnonzero(inner != k), np.flatnonzero(inner == k)
            if not len(inside) or not len(outside):
                continue
            stage = _stage1(kernel, train[inside], onehot[inside], factor[inside], s)
            outputs[outside], unseen[outside] = _apply(kernel, train[inside], stage, train[outside])
        matrix, bias = _calibration(outputs, onehot, s)
        stage = _stage1(kernel, train, onehot, factor, s).calibrated(matrix, bias)
        fitted_map = fit_map(
            self.played.rows(train),
            category,
            softmax(outputs @ matrix + bias),
            unseen,
            s,
        )
        return Fitted(train, stage, fitted_map)

    def predict(self, fitted: Fitted, rows: Rows) -> Predicted:
        """What `fitted` expects of `rows`."""
        outputs, factors = _apply(self.kernel, fitted.train, fitted.stage1, rows)
        posterior = softmax(outputs)
        quality, cost = fitted.map.estimate(posterior, factors)
        shape = (len(rows), len(self.played.recipes))
        full_quality, full_cost = np.full(shape, -np.inf), np.zeros(shape)
        full_quality[:, fitted.map.kept] = quality
        full_cost[:, fitted.map.kept] = cost
        return Predicted(posterior, full_quality, full_cost)

    def out_of_fold(self, folds: int) -> Predicted:
        """Predictions for every row by a router fitted on the other folds only."""
        fold = self.fold_of(folds, "outer")
        rows, recipes = len(self.table), len(self.played.recipes)
        found = Predicted(
            np.zeros((rows, len(self.labels))),
            np.full((rows, recipes), -np.inf),
            np.zeros((rows, recipes)),
        )
        for k in range(folds):
            train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            if not len(train) or not len(test):
                continue
            part = self.predict(self.fit(train), test)
            found.posterior[test] = part.posterior
            found.quality[test] = part.quality
            found.cost[test] = part.cost
        return found


def _clusters(x: sparse.csr_matrix, clusters: int, seed: int) -> Rows:
    """k-means on the rows' principal directions, scaled to length 1; (rows,)."""
    if clusters < 2 or min(x.shape) <= clusters:
        return np.zeros(x.shape[0], dtype=np.int64)
    start = np.random.default_rng(seed).normal(size=min(x.shape))
    u, s, _ = svds(x.astype(np.float64), k=min(32, min(x.shape) - 1), v0=start)
    points = u * s
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster may stay empty
        _, index = kmeans2(points, clusters, minit="++", rng=seed, iter=30)
    return np.asarray(index, dtype=np.int64)


def _targets(table: Table) -> Floats:
    """What factors are made of: all models' scores and the agreement of the cheapest pairs."""
    columns = [*table.score.T, *table.bystanders.T]
    cheap = [e for e in np.argsort(table.cost.mean(axis=0)) if table.has_answers[e]][:4]
    for a, b in itertools.combinations(cheap, 2):
        same = (table.answer[:, a] == table.answer[:, b]) & (table.answer[:, a] != NO_ANSWER)
        columns.append(same.astype(np.float64))
    found = np.stack(columns, axis=1)
    mean = np.nan_to_num(np.nanmean(found, axis=0))
    return np.where(np.isnan(found), mean, found)


def _factors(targets: Floats, count: int) -> Floats:
    """Principal components (rows, <= count) of the centred targets."""
    centred = targets - targets.mean(axis=0)
    _, _, directions = np.linalg.svd(centred.T @ centred, hermitian=True)
    return np.asarray(centred @ directions[: min(count, len(directions))].T)


def _stage1(
    kernel: TextKernel,
    rows: Rows,
    onehot: Floats,
    factor: Floats,
    settings: Settings,
) -> Stage1:
    return Stage1(
        kernel.solve(rows, onehot, settings.l2_category),
        onehot.mean(axis=0),
        kernel.solve(rows, factor, settings.l2_factor),
        factor.mean(axis=0),
    )


def _calibration(outputs: Floats, onehot: Floats, settings: Settings) -> tuple[Floats, Floats]:
    """Matrix scaling on rows that the outputs' fit did not see: logits are o·matrix + bias.

    Guo et al., 2017; a logistic regression of the labels on the outputs.
    """
    weight, bias = fit_logistic(
        sparse.csr_matrix(outputs * _CALIBRATION_SCALE), onehot, l2=settings.l2_calibration
    )
    return weight * _CALIBRATION_SCALE, bias


def _apply(kernel: TextKernel, train: Rows, stage: Stage1, rows: Rows) -> tuple[Floats, Floats]:
    alpha = np.concatenate((stage.alpha_category, stage.alpha_factor), axis=1)
    outputs = kernel.predict(train, alpha, rows)
    labels = len(stage.bias_category)
    return outputs[:, :labels] + stage.bias_category, outputs[:, labels:] + stage.bias_factor


def shrunk_cells(
    values: Floats, category: Rows, categories: int, shrink_rows: float
) -> tuple[Floats, Floats]:
    """Mean per category and column, shrunk toward the column's own mean; and counts.

    NaNs are left out. A column without any value gets 0.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    overall = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    member = np.eye(categories)[category]
    count = member.T @ known
    cells = (member.T @ filled + shrink_rows * overall) / np.maximum(count + shrink_rows, 1e-9)
    return cells, count


def select_recipes(score: Floats, cost: Floats, limit: int, singles: int = 0) -> Rows:
    """The columns on or nearest to a frontier of some category, at most `limit`.

    A recipe's regret is how much utility, at the price and in the category
    that suit it best, it lacks to the winner there. The first `singles` columns
    are kept whatever their regret: when experts fail, one that works is needed.
    """
    prices = prices_for(cost)
    regret = np.full(score.shape[1], np.inf)
    for price in prices:
        utility = score - price * cost
        regret = np.minimum(regret, (utility.max(axis=1, keepdims=True) - utility).min(axis=0))
    regret[:singles] = np.minimum(regret[:singles], -1)
    order = np.argsort(regret, kind="stable")[:limit]
    return np.sort(order[regret[order] <= MAX_REGRET])


MAX_REGRET = 0.02
"""A recipe is kept where it lacks at most this much utility to the best."""


def prices_for(cost: Floats, count: int = 160) -> Floats:
    """Prices λ from 0 up to where nothing but the cheapest is worth it, in quality per cost."""
    top = float(np.max(cost))
    if top <= 0:
        return np.zeros(1)
    return np.concatenate(([0.0], np.geomspace(1e-3, 100.0, count) / top))


def fit_map(
    played: Played, category: Rows, posterior: Floats, factors: Floats, settings: Settings
) -> MapFit:
    """The map from rows whose posterior and factors come from a stage that did not see them."""
    categories = posterior.shape[1]
    score, count = shrunk_cells(played.score, category, categories, settings.shrink_rows)
    cost, _ = shrunk_cells(played.cost, category, categories, settings.shrink_rows)
    judged = np.flatnonzero(count.sum(axis=0) > 0)
    alone = sum(played.recipes[r].kind == "single" for r in judged)  # they come first
    kept = judged[select_recipes(score[:, judged], cost[:, judged], settings.max_recipes, alone)]
    score, count, cost = score[:, kept], count[:, kept], cost[:, kept]
    reach = np.stack(
        [
            shrunk_cells(
                played.reach[:, kept, i].astype(np.float64),
                category,
                categories,
                settings.shrink_rows,
            )[0]
            for i in range(played.reach.shape[2])
        ],
        axis=2,
    )
    penalties = choose_penalties(
        played.score[:, judged[:alone]], category, posterior, factors, settings
    )
    slopes = [
        _slopes(values - posterior @ cells, posterior, factors, penalties)
        for values, cells in ((played.score[:, kept], score), (played.cost[:, kept], cost))
    ]
    return MapFit(
        kept=kept,
        prior=posterior.mean(axis=0),
        score=score,
        count=count,
        cost=cost,
        reach=reach,
        score_slope=slopes[0],
        cost_slope=slopes[1],
    )


def choose_penalties(
    score: Floats, category: Rows, posterior: Floats, factors: Floats, settings: Settings
) -> tuple[float, float]:
    """The pair of `slope_penalties` that predicts best in five folds of these rows.

    What counts is the error in the *differences* between experts (N, E) on a
    row: an error shared by all of them changes no choice.
    """
    pairs = settings.slope_penalties
    fold = np.random.default_rng(settings.seed).integers(0, _PENALTY_FOLDS, len(score))
    error = np.zeros(len(pairs))
    for k in range(_PENALTY_FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        cells, _ = shrunk_cells(
            score[inside], category[inside], posterior.shape[1], settings.shrink_rows
        )
        rest = score - posterior @ cells
        cross = _cross(posterior[outside], factors[outside])
        for i, pair in enumerate(pairs):
            slopes = _slopes(rest[inside], posterior[inside], factors[inside], pair)
            miss = rest[outside] - cross @ slopes.reshape(cross.shape[1], -1)
            known = ~np.isnan(miss)
            shared = np.where(known, miss, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
            error[i] += float(np.nansum((miss - shared[:, None]) ** 2))
    return pairs[int(error.argmin())]


def _cross(posterior: Floats, factors: Floats) -> Floats:
    """p ⊗ f of each row, (rows, C·F)."""
    return np.asarray((posterior[:, :, None] * factors[:, None, :]).reshape(len(factors), -1))


def _slopes(
    rest: Floats, posterior: Floats, factors: Floats, penalties: tuple[float, float]
) -> Floats:
    """Slopes (C, F, R) of the residual on the factors: one shared, and each category's own.

    One ridge regression over [f, p ⊗ f], the first half penalised by
    `penalties[0]`, the second by `penalties[1]`. NaNs count as no residual.
    """
    categories, count = posterior.shape[1], factors.shape[1]
    if not count:
        return np.zeros((categories, 0, rest.shape[1]))
    known = np.where(np.isnan(rest), 0.0, rest)
    cross = _cross(posterior, factors)
    x = np.concatenate((factors, cross), axis=1)
    x = x - x.mean(axis=0)
    penalty = np.repeat(penalties, (count, cross.shape[1]))
    weight = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ (known - known.mean(axis=0)))
    own = weight[count:].reshape(categories, count, -1)
    return np.asarray(own + weight[None, :count])
