"""Ridge regression on hashed n-grams for many targets at once, with a text kernel.

Saunders, Gammerman and Vovk, "Ridge Regression Learning Algorithm in Dual
Variables", 1998: with X the design matrix (each row of length √2, see
`linear.design`, here scaled to 1) the weights are Xᵀα with (XXᵀ + l2·I)α = Y −
mean(Y). Up to some thousand rows XXᵀ is made once and serves every fold; above
that the same system is solved by conjugate gradients without it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# The kernel of 9,000 rows takes 324 MB in float32.
MAX_DENSE_ROWS = 9000
_BLOCK_COLUMNS = 4096
_MAX_STEPS = 200
_TOLERANCE = 1e-4


class TextKernel:
    """Solves ridge systems over subsets of the rows of one design matrix."""

    def __init__(self, x: sparse.csr_matrix) -> None:
        """`x` (rows, buckets), rows of length √2 at most."""
        self.x = (x / np.float32(np.sqrt(2))).astype(np.float32).tocsr()
        self._gram = _gram(self.x) if self.x.shape[0] <= MAX_DENSE_ROWS else None

    def solve(self, rows: Rows, target: Floats, l2: float) -> NDArray[np.float32]:
        """α (len(rows), targets) of ridge regressions onto the centred `target`."""
        centred = (target - target.mean(axis=0)).astype(np.float32)
        if self._gram is not None:
            system = self._gram[np.ix_(rows, rows)]
            system[np.diag_indices_from(system)] += np.float32(l2)
            factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
            return np.asarray(cho_solve(factor, centred, check_finite=False), dtype=np.float32)
        return self._iterate(self.x[rows], centred, l2)

    def predict(self, train: Rows, alpha: NDArray[np.float32], test: Rows) -> Floats:
        """Predictions for the rows `test`, without the targets' means; (len(test), targets)."""
        if self._gram is not None:
            return np.asarray(self._gram[np.ix_(test, train)] @ alpha, dtype=np.float64)
        return np.asarray(self.x[test] @ (self.x[train].T @ alpha), dtype=np.float64)

    def weight(self, train: Rows, alpha: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights (buckets, targets) for rows of length √2, as `linear.design` gives."""
        return np.asarray(self.x[train].T @ alpha / np.sqrt(2), dtype=np.float32)

    @staticmethod
    def _iterate(
        x: sparse.csr_matrix, target: NDArray[np.float32], l2: float
    ) -> NDArray[np.float32]:
        """Conjugate gradients for all targets side by side (Hestenes and Stiefel, 1952)."""
        back = x.T.tocsr()
        alpha = np.zeros_like(target)
        residual = target.copy()
        step = residual.copy()
        size = (residual * residual).sum(axis=0)
        stop = np.maximum(size * _TOLERANCE**2, 1e-12)
        for _ in range(_MAX_STEPS):
            image = x @ (back @ step) + np.float32(l2) * step
            rate = size / np.maximum((step * image).sum(axis=0), 1e-30)
            alpha += rate * step
            residual -= rate * image
            fresh = (residual * residual).sum(axis=0)
            if (fresh <= stop).all():
                break
            step = residual + fresh / np.maximum(size, 1e-30) * step
            size = fresh
        return alpha


def _gram(x: sparse.csr_matrix) -> NDArray[np.float32]:
    columns = x.tocsc()
    gram = np.zeros((x.shape[0], x.shape[0]), dtype=np.float32)
    for start in range(0, x.shape[1], _BLOCK_COLUMNS):
        block = columns[:, start : start + _BLOCK_COLUMNS]
        # A gram that one row alone has adds to the diagonal only; most buckets are shared.
        dense = block[:, np.diff(block.indptr) > 0].toarray()
        gram += dense @ dense.T
    return gram
