"""Computes each routed expert's importance for texts, and the experts to protect.

*Importance* is EASY-EP's (Dong and others, arXiv 2504.06792): over all tokens that chose an
expert, its weight times the L2 norm of its output times the token's contribution, which is
1 − cos(h, h + r) (at least 0) for the residual stream h and what the layer's routed experts
together add to it, r: tokens that the layer hardly turns say little about its experts.

*Super experts* (Su and others, arXiv 2507.23279) give rare, extreme outputs of their
down-projection, from which the model's attention sinks come; few as they are, a model without
them falls apart. Expert e of layer l is one where its largest output is above the 99.5th
percentile of all experts', above a tenth of the largest, and l is a layer in which
massive activations form. An activation is massive by Sun and others (arXiv 2402.17762) above
100 and above 1000 times the median magnitude of its layer's. They form, we say, where such
a one stands behind the layer and is at least half as large again as any before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_models.moe.gate_recording_and_steering import (
    LayerActivations,
    RoutedLayer,
    capture_activations,
)
from service.moe.steering_profile import MoeShape

Floats = NDArray[np.float64]

_PERCENTILE = 99.5
_OF_LARGEST = 0.1
_MASSIVE = 100.0
_TIMES_MEDIAN = 1000.0
_GROWTH = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Statistics of each expert over texts; rows are layers, in the order of `layers`.

    score, peaks: (layers, experts): importance, and the largest output by magnitude.
    uses: (layers, experts): tokens that chose it. forms: (layers,): whether massive activations
    form there.
    """

    layers: tuple[int, ...]
    score: Floats
    peaks: Floats
    uses: NDArray[np.int64]
    forms: NDArray[np.bool_]

    def super_experts(self) -> dict[int, tuple[int, ...]]:
        """The experts of each layer that must not be masked; layers without any left out."""
        high = self.peaks > max(
            float(np.percentile(self.peaks, _PERCENTILE)), _OF_LARGEST * float(self.peaks.max())
        )
        found = high & self.forms[:, None]
        return {
            layer: tuple(int(e) for e in np.flatnonzero(row))
            for layer, row in zip(self.layers, found, strict=True)
            if row.any()
        }


def measure(
    model: Any, layers: list[RoutedLayer], shape: MoeShape, texts: Iterable[list[int]]
) -> Importance:
    """Run texts, given as token ids, through the model, and add up. Raises NotSteerableError."""
    at = {layer.index: i for i, layer in enumerate(layers)}
    score = np.zeros((len(layers), shape.experts))
    peaks = np.zeros_like(score)
    uses = np.zeros(score.shape, np.int64)
    forms = np.zeros(len(layers), bool)

    def see(visit: LayerActivations) -> None:
        row = at[visit.layer]
        turned = visit.before + visit.routed
        contribution = 1 - torch.nn.functional.cosine_similarity(visit.before, turned, dim=-1)
        worth = visit.weights * visit.norms * contribution.clamp(min=0)[:, None]
        ids = visit.ids.reshape(-1).numpy()
        np.add.at(score[row], ids, worth.reshape(-1).double().numpy())
        np.add.at(uses[row], ids, 1)
        np.maximum(peaks[row], visit.peaks.double().numpy(), out=peaks[row])
        size = visit.after.abs()
        largest = float(size.max())
        massive = largest > _MASSIVE and largest > _TIMES_MEDIAN * float(size.median())
        forms[row] |= massive and largest > _GROWTH * float(visit.before.abs().max())

    with capture_activations(model, layers, shape, see), torch.no_grad():
        for ids in texts:
            model.model(input_ids=torch.tensor([ids]), use_cache=False)
    return Importance(tuple(layer.index for layer in layers), score, peaks, uses, forms)


def keep_best(
    score: Floats, keep: float, *, least: int, protected: Iterable[int] = ()
) -> NDArray[np.bool_]:
    """Which experts of a layer stay, (experts,): protected ones, then the best by `score`.

    A share `keep` of them, rounded up, at least `least`, and all protected ones. Equal
    ones: the lower number first.
    """
    count = max(int(np.ceil(keep * len(score) - 1e-9)), least)
    stay = np.zeros(len(score), bool)
    stay[list(protected)] = True
    for expert in np.argsort(-score, kind="stable"):
        if stay.sum() >= count:
            break
        stay[expert] = True
    return stay
