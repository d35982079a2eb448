"""Medians with confidence intervals: percentile bootstrap with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 4000
_PERCENTILE_RESAMPLES = 400
_COVERED = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """Return the values for the JSON report."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def text(self, digits: int = 3) -> str:
        """`value (low to high)`."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def _resampled_medians(values: Sequence[float], seed: int) -> NDArray[np.float64]:
    known = np.asarray(values, dtype=np.float64)
    if known.size == 0:
        raise ValueError("a median needs at least one value")
    picks = np.random.default_rng(seed).integers(0, known.size, (_RESAMPLES, known.size))
    medians: NDArray[np.float64] = np.median(known[picks], axis=1)
    return medians


def _interval(value: float, resampled: NDArray[np.float64]) -> Estimate:
    edge = (1 - _COVERED) / 2
    low, high = np.quantile(resampled, (edge, 1 - edge))
    return Estimate(value, float(low), float(high))


def median(values: Sequence[float], seed: int = 1) -> Estimate:
    """The median and its interval."""
    resampled = _resampled_medians(values, seed)
    return _interval(float(np.median(values)), resampled)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile."""
    return float(np.percentile(values, percent))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The median of the pairs' ratios."""
    return median([n / d for n, d in zip(numerators, denominators, strict=True)])


def differences(minuends: Sequence[float], subtrahends: Sequence[float]) -> Estimate:
    """The median of the pairs' differences."""
    return median([m - s for m, s in zip(minuends, subtrahends, strict=True)])


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two medians whose samples are not pairs."""
    value = float(np.median(numerators) / np.median(denominators))
    return _interval(value, _resampled_medians(numerators, 1) / _resampled_medians(denominators, 2))


def _resampled_percentiles(
    values: Sequence[float], percent: float, seed: int
) -> NDArray[np.float64]:
    known = np.asarray(values, dtype=np.float64)
    chance = np.random.default_rng(seed)
    # One resample at a time: thousands of values, thousands of times, are too many at once.
    return np.array(
        [
            np.percentile(known[chance.integers(0, known.size, known.size)], percent)
            for _ in range(_PERCENTILE_RESAMPLES)
        ]
    )


def percentile_added(
    values: Sequence[float], baseline: Sequence[float], percent: float
) -> Estimate:
    """A percentile less the same one of a baseline, whose samples are not pairs."""
    value = percentile(values, percent) - percentile(baseline, percent)
    more = _resampled_percentiles(values, percent, 1)
    return _interval(value, more - _resampled_percentiles(baseline, percent, 2))


def ratio_of_added_percentiles(
    numerators: Sequence[float],
    denominators: Sequence[float],
    baseline: Sequence[float],
    percent: float,
) -> Estimate:
    """The ratio of two `percentile_added` over one baseline."""
    over = percentile(numerators, percent) - percentile(baseline, percent)
    under = percentile(denominators, percent) - percentile(baseline, percent)
    base = _resampled_percentiles(baseline, percent, 2)
    overs = _resampled_percentiles(numerators, percent, 1) - base
    unders = _resampled_percentiles(denominators, percent, 3) - base
    return _interval(over / under, overs / unders)


def mean_of_medians(groups: Sequence[Sequence[float]]) -> Estimate:
    """The geometric mean of each group's median: every group counts alike."""
    logs = [np.log(_resampled_medians(values, i + 1)) for i, values in enumerate(groups)]
    value = float(np.exp(np.mean([np.log(np.median(values)) for values in groups])))
    return _interval(value, np.exp(np.mean(logs, axis=0)))
