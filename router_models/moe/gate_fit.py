"""Computes gates in closed form: ridge regression from hidden states to experts.

For each layer W = (XᵀX + λI)⁻¹XᵀY, with X the gate's inputs on the experts' own texts and Y
which expert's text a token is from; columns normalised (DUME, training-free dynamic upcycling
of dense experts). Each expert's texts count alike, however many tokens they have, and so do
prompts and answers; `Statistics` are sums of means: adding an expert adds to them, and needs no
text of the others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.errors import ArtifactError

RIDGE = 1e-2
_FORMAT = "coe.upcycle/1"


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of one expert, for the model card."""

    name: str
    weights: str
    source: str
    licence: str
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means of x xᵀ (L, H, H) and of x (L, H) over one expert's texts, per layer."""

    second: NDArray[np.float64]
    first: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """All that gates are made of: XᵀX (L, H, H), and the columns of XᵀY by expert (L, H, E)."""

    gram: NDArray[np.float64]
    cross: NDArray[np.float64]
    origins: tuple[Origin, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the checkpoint's order."""
        return tuple(origin.name for origin in self.origins)

    @classmethod
    def empty(cls, layers: int, hidden: int) -> Statistics:
        """Return statistics of no experts."""
        return cls(np.zeros((layers, hidden, hidden)), np.zeros((layers, hidden, 0)), ())

    def added(self, origin: Origin, moments: Moments) -> Statistics:
        """Return statistics with another expert."""
        return replace(
            self,
            gram=self.gram + moments.second,
            cross=np.concatenate([self.cross, moments.first[:, :, None]], axis=2),
            origins=(*self.origins, origin),
        )

    def gates(self, *, scale: float) -> NDArray[np.float32]:
        """Compute the gates' weights (L, E, H).

        Args:
            scale: The factor of the normalised columns. It determines how similar the weights of
                several chosen experts are.
        """
        hidden = self.gram.shape[1]
        solved = np.linalg.solve(self.gram + RIDGE * np.eye(hidden), self.cross)
        norm = np.linalg.norm(solved, axis=1, keepdims=True)
        columns = scale * solved / np.maximum(norm, np.finfo(np.float64).tiny)
        return np.ascontiguousarray(columns.transpose(0, 2, 1)).astype(np.float32)


def write(statistics: Statistics, path: Path) -> None:
    """Write a safetensors file with one half of the symmetric XᵀX, and origins as metadata."""
    rows, columns = np.triu_indices(statistics.gram.shape[1])
    save_file(
        {
            "gram": np.ascontiguousarray(statistics.gram[:, rows, columns]),
            "cross": np.ascontiguousarray(statistics.cross),
        },
        path,
        metadata={
            "format": _FORMAT,
            "experts": json.dumps([asdict(origin) for origin in statistics.origins]),
        },
    )
    path.chmod(0o644)  # safetensors creates files that only the owner can read


def read(path: Path) -> Statistics:
    """Read the output of `write`.

    Raises:
        ArtifactError: The file is invalid.
    """
    try:
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ArtifactError(f"{path}: format {metadata.get('format')!r}, not {_FORMAT!r}")
            half, cross = file.get_tensor("gram"), file.get_tensor("cross")
        origins = tuple(Origin(**row) for row in json.loads(metadata["experts"]))
        layers, hidden, experts = cross.shape
        rows, columns = np.triu_indices(hidden)
        gram = np.zeros((layers, hidden, hidden))
        gram[:, rows, columns] = half
        gram[:, columns, rows] = half
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path}: can't be read: {error}") from error
    if len(origins) != experts:
        raise ArtifactError(f"{path}: {experts} columns for {len(origins)} experts")
    return Statistics(gram, cross, origins)
