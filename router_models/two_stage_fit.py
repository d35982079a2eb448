"""Fits a router to a table of outcomes: posterior, factors and map. This is the first stage.

Two stages. The first is linear in the prompt's n-grams: one output a category,
one a *factor* (the main ways in which experts' results vary together, so "how
hard, and for whom"). The second is the map (`router_models.expert_map_fit`), fitted on first-stage
outputs for rows which that stage did not see, or it would trust them too much.
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

from router_models.expert_map_fit import MapFit, fit_map
from router_models.fit_settings import Settings
from router_models.head_fit import HeadFit, fit_head
from router_models.linear_models import (
    Corpus,
    design,
    featurize,
    fit_logistic,
    known_bitmap,
    novelty,
)
from router_models.outcome_reader import NO_ANSWER, Table
from router_models.recipe_replay import RecipeResults, candidates, play
from router_models.ridge_regression import TextKernel
from service.broker.reference_cost import best_shares
from service.classifier.linear_heads import log_softmax
from service.classifier.static_embedding_table import StaticTable

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


_MAX_CLUSTERS = 16
# So many of the rows that the fit did not see count as ordinary, unless they are wholly new.
_ORDINARY_SHARE = 0.995
_MOST_NOVELTY = 0.95
# Outputs lie within 0..1; the logits are some ten times as wide.
_CALIBRATION_SCALE = 10.0


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
class Fitted:
    """A router fitted on the rows `train` of a problem."""

    train: Rows
    stage1: Stage1
    map: MapFit
    known: NDArray[np.uint8]
    """The bitmap of the marks of these rows."""
    max_novelty: float
    head: HeadFit | None = None
    """The head on the static table, joined with the n-grams; None where there is none."""
    log_posterior: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """Log probabilities of these rows out of fold, (rows, labels), by all stages so far."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A router's predictions on held-out rows; without NaN, (rows, all recipes).

    Recipes that the router did not keep have quality -inf.
    """

    posterior: Floats
    quality: Floats
    cost: Floats


class Problem:
    """A table with its features, categories and recipes: fitted as a whole or in folds.

    Args:
        table: The outcomes.
        settings: Settings of the fit.
        static: The static table. With it the first stage is that of the shipped routers, n-grams
            and a head on the table. Clusters that stand for categories are those of n-grams, which
            therefore decide alone.
    """

    def __init__(self, table: Table, settings: Settings, static: StaticTable | None = None) -> None:
        self.table = table
        self.settings = settings
        self.corpus: Corpus = featurize(table.prompts, settings.spec)
        self.played: RecipeResults = play(candidates(table), table)
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
        self.static = None if self.clustered else static
        self.vectors = (
            None
            if self.static is None
            else np.stack([self.static.embed(prompt) for prompt in table.prompts])
        )

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
        strange = np.zeros(len(train))
        for k in range(s.inner_folds):
            inside, outside = np.flatnonzero(inner != k), np.flatnonzero(inner == k)
            if not len(inside) or not len(outside):
                continue
            stage = _stage1(kernel, train[inside], onehot[inside], factor[inside], s)
            outputs[outside], unseen[outside] = _apply(kernel, train[inside], stage, train[outside])
            strange[outside] = self.novelty(train[outside], self.known(train[inside]))
        matrix, bias = _calibration(outputs, onehot, s)
        stage = _stage1(kernel, train, onehot, factor, s).calibrated(matrix, bias)
        log_posterior = log_softmax(outputs @ matrix + bias)
        head: HeadFit | None = None
        if self.vectors is not None:
            head = fit_head(
                log_posterior, self.vectors[train], category, inner, np.ones(len(train))
            )
            log_posterior = head.held_out
        fitted_map = fit_map(
            self.played.rows(train),
            category,
            np.exp(log_posterior),
            unseen,
            factor,
            s,
            # Clusters know no more than the n-grams. Given categories do, and lose by doubt.
            s.trust_powers if self.clustered else (0.0,),
        )
        # Texts without spaces between words have more grams that nobody used before.
        ordinary = float(np.quantile(strange, _ORDINARY_SHARE))
        max_novelty = float(np.clip(ordinary, s.min_max_novelty, _MOST_NOVELTY))
        return Fitted(train, stage, fitted_map, self.known(train), max_novelty, head, log_posterior)

    def known(self, rows: Rows) -> NDArray[np.uint8]:
        """The bitmap of the marks of `rows`."""
        return known_bitmap([self.corpus.marks[i] for i in rows], self.settings.spec.known_bits)

    def novelty(self, rows: Rows, known: NDArray[np.uint8]) -> Floats:
        """The novelty of `rows` for this bitmap, (len(rows),)."""
        return novelty([self.corpus.marks[i] for i in rows], known)

    def predict(self, fitted: Fitted, rows: Rows) -> Predicted:
        """Return the predictions of `fitted` for `rows`."""
        outputs, factors = _apply(self.kernel, fitted.train, fitted.stage1, rows)
        log_posterior = log_softmax(outputs)
        strange = self.novelty(rows, fitted.known)
        if self.vectors is not None and fitted.head is not None:
            head, most = fitted.head.head, fitted.max_novelty
            for i, vector in enumerate(self.vectors[rows]):
                if vector.any():
                    log_posterior[i] = head.log_posterior(vector, log_posterior[i])
                strange[i] = min(strange[i], head.novelty(vector, most))
        posterior = np.exp(log_posterior)
        novel = strange > fitted.max_novelty
        quality, cost = fitted.map.estimate(posterior, factors, novel)
        shape = (len(rows), len(self.played.recipes))
        full_quality, full_cost = np.full(shape, -np.inf), np.zeros(shape)
        full_quality[:, fitted.map.kept] = quality
        full_cost[:, fitted.map.kept] = cost
        return Predicted(posterior, full_quality, full_cost)

    def out_of_fold(self, folds: int) -> Predicted:
        """Predictions for every row by a router fitted on the other folds only."""
        return self.out_of_fold_with_reference(folds)[0]

    def out_of_fold_with_reference(self, folds: int) -> tuple[Predicted, Floats]:
        """The same, and the reference cost of each row, (N,) (`service.broker.reference_cost`)."""
        reference = np.zeros(len(self.table))
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
            fitted = self.fit(train)
            part = self.predict(fitted, test)
            found.posterior[test] = part.posterior
            found.quality[test] = part.quality
            found.cost[test] = part.cost
            shares = best_shares(fitted.map.score, fitted.map.cost.mean(axis=0))
            reference[test] = part.cost[:, fitted.map.kept] @ shares
        return found, reference


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
    """Return the inputs of the factors: all scores, and the agreement of the cheapest pairs."""
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
