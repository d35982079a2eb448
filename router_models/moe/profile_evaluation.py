"""Evaluates a profile on texts: its quality loss, and the weights that it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_models.experts.evaluate import RowScore, compare
from router_models.moe.gate_recording_and_steering import RoutedLayer, capture_choices, steer_gates
from router_models.moe.profile_text_reader import Text
from service.moe.steering_profile import MoeShape, SteeringProfile

BATCHES = (1, 8, 32)
"""Tokens that are decoded side by side, for which reads are counted."""
_DRAWS = 64
_SEED = 0


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """Bits per byte on some texts. `lost` > 0: steering made it worse; its standard error."""

    texts: int
    bytes: int
    unsteered: float
    steered: float
    lost: float
    lost_error: float


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """The weights that a batch of the domain's tokens reads, without and with a profile.

    Numbers of experts are means over layers and batches; bytes are those of all layers' expert
    weights as stored.
    """

    batch: int
    experts_unsteered: float
    experts_steered: float
    bytes_unsteered: float
    bytes_steered: float


@dataclass(frozen=True, slots=True)
class Savings:
    """What a profile saves on texts.

    reads: the weights that are read, by the size of a batch. dropped: the share of the base's
    choices that are not made, in the mean of all layers and tokens.
    """

    reads: tuple[ExpertReads, ...]
    dropped: float


class Judged:
    """A model with and without a profile."""

    def __init__(
        self, model: Any, layers: list[RoutedLayer], shape: MoeShape, profile: SteeringProfile
    ) -> None:
        self._model = model
        self._layers = layers
        self._shape = shape
        self._profile = profile

    def loss(self, texts: Sequence[Text]) -> QualityLoss:
        plain = self._scores(texts)
        with steer_gates(self._layers, self._profile.layers, self._shape):
            changed = self._scores(texts)
        comparison = compare("domain", plain, changed, seed=_SEED)
        return QualityLoss(
            texts=len(texts),
            bytes=sum(row.bytes for row in plain),
            unsteered=comparison.base,
            steered=comparison.tuned,
            lost=-comparison.gain,
            lost_error=comparison.gain_error,
        )

    def savings(self, texts: Sequence[Text]) -> Savings:
        plain = self._choices(texts)
        with steer_gates(self._layers, self._profile.layers, self._shape):
            changed = self._choices(texts)
        size = sum(layer.expert_bytes for layer in self._layers)
        counted = []
        for batch in BATCHES:
            needed = [distinct(chose, self._shape.experts, batch) for chose in (plain, changed)]
            counted.append(ExpertReads(batch, *needed, *(size * experts for experts in needed)))
        return Savings(tuple(counted), 1 - float((changed >= 0).sum() / (plain >= 0).sum()))

    def _scores(self, texts: Sequence[Text]) -> list[RowScore]:
        scores = []
        with torch.no_grad():
            for i, text in enumerate(texts):
                ids = torch.tensor([text.ids])
                logits = self._model(input_ids=ids, use_cache=False).logits[0].float()
                nats = torch.nn.functional.cross_entropy(
                    logits[text.given - 1 : -1], ids[0, text.given :], reduction="sum"
                )
                scores.append(RowScore(str(i), float(nats) / math.log(2), text.size, False))
        return scores

    def _choices(self, texts: Sequence[Text]) -> NDArray[np.int64]:
        """(layers, tokens, k): what was chosen for each token; -1 where a choice was dropped."""
        seen: dict[int, list[NDArray[np.int64]]] = {layer.index: [] for layer in self._layers}

        def see(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
            kept = torch.where(weights > 0, ids, -1)
            seen[layer].append(kept.numpy().astype(np.int64))

        with capture_choices(self._layers, see), torch.no_grad():
            for text in texts:
                self._model.model(input_ids=torch.tensor([text.ids]), use_cache=False)
        return np.stack([np.concatenate(parts) for parts in seen.values()])


def distinct(choices: NDArray[np.int64], experts: int, batch: int) -> float:
    """Experts that `batch` tokens need of a layer, in the mean; choices are (layers, tokens, k).

    A choice of -1 needs none. The tokens are drawn at random: those of a decoded batch come from
    different requests.
    """
    draw = np.random.default_rng(_SEED)
    at = draw.integers(0, choices.shape[1], (_DRAWS, batch))
    used = np.zeros((choices.shape[0], _DRAWS, experts + 1), bool)
    together = choices[:, at].reshape(choices.shape[0], _DRAWS, -1)
    np.put_along_axis(used, together, True, axis=-1)  # of -1 the last column, which is nobody's
    return float(used[..., :experts].sum(axis=-1).mean())
