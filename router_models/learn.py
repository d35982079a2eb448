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
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.sparse.linalg import svds

from router_models.linear import (
    Corpus,
    design,
    featurize,
    fit_temperature,
    inverse_document_frequency,
    softmax,
)
from router_models.outcomes import NO_ANSWER, Table
from router_models.recipes import Played, candidates, play
from router_models.ridge import TextKernel
from service.router.features import FeatureSpec
from service.router.map import MAX_RECIPES

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Settings:
    """What may be tuned. `l2_*` are ridge penalties, `shrink_rows` pseudo-rows of the prior."""

    spec: FeatureSpec = field(default_factory=FeatureSpec)
    idf: bool = True
    l2_category: float = 0.2
    l2_factor: float = 4.0
    factors: int = 8
    shrink_rows: float = 40.0
    l2_slope: float = 5.0
    l2_own_slope: float = 20.0
    inner_folds: int = 5
    max_recipes: int = MAX_RECIPES
    min_confidence: float = 0.3
    max_novelty: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Stage1:
    """Linear heads as fitted on some rows: α over them, means, and what they mean."""

    alpha_category: NDArray[np.float32]
    mean_category: Floats
    alpha_factor: NDArray[np.float32]
    mean_factor: Floats
    temperature: float


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
        cross = (posterior[:, :, None] * factors[:, None, :]).reshape(len(posterior), -1)
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
        self.labels, self.category, self.given = _categories(table, self.corpus, settings)
        self.targets = _targets(table)
        self._kernels: dict[bytes, tuple[TextKernel, NDArray[np.float32]]] = {}

    def idf(self, train: Rows) -> NDArray[np.float32]:
        """Weights of the buckets; from the rows `train` alone."""
        if not self.settings.idf:
            return np.ones(self.settings.spec.buckets, dtype=np.float32)
        return inverse_document_frequency(self.corpus.counts[train])

    def kernel(self, train: Rows) -> TextKernel:
        """The text kernel of all rows under the idf of `train`; the newest is kept."""
        key = train.tobytes() if self.settings.idf else b""
        if key not in self._kernels:
            self._kernels.clear()
            idf = self.idf(train)
            self._kernels[key] = (TextKernel(design(self.corpus.counts, idf)), idf)
        return self._kernels[key][0]

    def fold_of(self, folds: int, salt: str) -> Rows:
        """A fold 0..folds-1 for each row; rows with the same prompt share one."""
        seed = f"{salt}/{self.settings.seed}/"
        return np.array(
            [zlib.crc32((seed + p).encode("utf-8", "replace")) % folds for p in self.table.prompts]
        )

    def fit(self, train: Rows) -> Fitted:
        """Fit both stages on the rows `train`."""
        s = self.settings
        kernel = self.kernel(train)
        onehot = np.eye(len(self.labels))[self.category[train]]
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
        temperature = fit_temperature(outputs, self.category[train])
        stage = _stage1(kernel, train, onehot, factor, s, temperature)
        fitted_map = fit_map(
            self.played.rows(train),
            self.category[train],
            softmax(outputs / temperature),
            unseen,
            s,
        )
        return Fitted(train, stage, fitted_map)

    def predict(self, fitted: Fitted, rows: Rows) -> Predicted:
        """What `fitted` expects of `rows`."""
        outputs, factors = _apply(self.kernel(fitted.train), fitted.train, fitted.stage1, rows)
        posterior = softmax(outputs / fitted.stage1.temperature)
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


def _categories(
    table: Table, corpus: Corpus, settings: Settings
) -> tuple[tuple[str, ...], Rows, NDArray[np.bool_]]:
    """Labels, each row's label and whether the row itself gave it.

    Where fewer than half of the rows have a category, clusters of their n-grams
    stand for categories. Rows without one, where most have, take the label of
    the nearest centroid.
    """
    given = np.array([c is not None for c in table.categories])
    idf = inverse_document_frequency(corpus.counts)
    if given.mean() >= 0.5:
        labels = tuple(sorted({c for c in table.categories if c is not None}))
        index = np.array([labels.index(c) if c is not None else 0 for c in table.categories])
        if not given.all():
            x = design(corpus.counts, idf)
            known = np.eye(len(labels))[index] * given[:, None]
            centroid = x.T @ (known / np.maximum(known.sum(axis=0), 1))
            length = np.maximum(np.linalg.norm(centroid, axis=0), 1e-9)
            nearest = np.asarray(x[~given] @ (centroid / length)).argmax(axis=1)
            index[~given] = nearest
        return labels, index, given
    x = design(corpus.counts, idf).astype(np.float64)
    clusters = int(np.clip(len(table) // 150, 1, 16))
    if clusters == 1:
        return ("all",), np.zeros(len(table), dtype=np.int64), given
    rank = min(32, min(x.shape) - 1)
    start = np.random.default_rng(settings.seed).normal(size=min(x.shape))
    u, s, _ = svds(x, k=rank, v0=start)
    points = u * s
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9)
    _, index = kmeans2(points, clusters, minit="++", seed=settings.seed, iter=30)
    used, index = np.unique(index, return_inverse=True)
    return tuple(f"cluster-{i}" for i in range(len(used))), index.astype(np.int64), given


def _targets(table: Table) -> Floats:
    """What factors are made of: experts' scores and the agreement of the cheapest pairs."""
    columns = [table.score[:, e] for e in range(len(table.experts))]
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
    temperature: float = 1.0,
) -> Stage1:
    return Stage1(
        kernel.solve(rows, onehot, settings.l2_category),
        onehot.mean(axis=0),
        kernel.solve(rows, factor, settings.l2_factor),
        factor.mean(axis=0),
        temperature,
    )


def _apply(kernel: TextKernel, train: Rows, stage: Stage1, rows: Rows) -> tuple[Floats, Floats]:
    alpha = np.concatenate((stage.alpha_category, stage.alpha_factor), axis=1)
    outputs = kernel.predict(train, alpha, rows)
    labels = len(stage.mean_category)
    return outputs[:, :labels] + stage.mean_category, outputs[:, labels:] + stage.mean_factor


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
    slopes = []
    for values, cells in ((played.score[:, kept], score), (played.cost[:, kept], cost)):
        rest = values - posterior @ cells
        slopes.append(_slopes(np.where(np.isnan(rest), 0.0, rest), posterior, factors, settings))
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


def _slopes(rest: Floats, posterior: Floats, factors: Floats, settings: Settings) -> Floats:
    """Slopes (C, F, R) of the residual on the factors: one shared, and each category's own.

    One ridge regression over [f, p ⊗ f]; the shared slope is the cheaper of the
    two, so categories differ only where the rows say so.
    """
    categories, count = posterior.shape[1], factors.shape[1]
    if not count:
        return np.zeros((categories, 0, rest.shape[1]))
    cross = (posterior[:, :, None] * factors[:, None, :]).reshape(len(factors), -1)
    x = np.concatenate((factors, cross), axis=1)
    x = x - x.mean(axis=0)
    penalty = np.concatenate(
        (np.full(count, settings.l2_slope), np.full(cross.shape[1], settings.l2_own_slope))
    )
    weight = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ (rest - rest.mean(axis=0)))
    own = weight[count:].reshape(categories, count, -1)
    return np.asarray(own + weight[None, :count])
