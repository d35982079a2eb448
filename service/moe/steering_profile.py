"""Steering profiles: small files that change which routed experts a model's gates choose.

A profile belongs to one base, which the digest of its gates identifies. It is plain data: for each
layer a mask, an additive bias on the logits, a boost of the weights, another top-k, a top-p rule,
and null experts. `steer` defines their meaning; the implementations in engines are tested against
it.

Experts switched off or boosted at inference follow MoTE and RICE, experts pruned for a domain
follow EASY-EP and PreMoe, fewer experts for a confident gate follow the top-p rule of dynamic
routing, and null experts follow AdaMoE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as dump_tensors

from service.errors import InvalidProfileError
from service.moe.gate_shapes import MoeShape, moe_shape, why_not_steerable

__all__ = [
    "LayerSteering",
    "MoeShape",
    "SteeringProfile",
    "check_profile",
    "moe_shape",
    "read_profile",
    "steer",
    "why_not_steerable",
    "write_profile",
]

FORMAT = "coe.steering/1"
# This bound keeps a wrong path from filling the memory. No model comes near it.
_MAX_BYTES = 64 << 20
_DTYPES = {"mask": "uint8", "bias": "float32", "boost": "float32"}
_SCALARS = {"top_k": "int32", "top_p": "float32", "null": "float32"}


@dataclass(frozen=True, slots=True, eq=False)
class LayerSteering:
    """The changes to one layer's gate with E routed experts.

    Attributes:
        mask: True for experts that may not be chosen, bool (E,).
        bias: The values added to the logits before the choice, float32 (E,).
        boost: The factors of chosen experts' weights, float32 (E,). They apply after the
            normalisation, and the result is not normalised again.
        top_k: The number of chosen experts. None means the model's own number.
        top_p: The rule keeps the fewest chosen experts whose probabilities (over all unmasked
            experts) sum to at least this value, and gives the others weight 0. None keeps all.
        null: The logit of null experts, which compute nothing, as many as experts are chosen.
            A chosen expert with a smaller logit, bias included, loses its place to one of them and
            has weight 0. A token may lose all. None means that there are none.
    """

    mask: NDArray[np.bool_]
    bias: NDArray[np.float32]
    boost: NDArray[np.float32]
    top_k: int | None = None
    top_p: float | None = None
    null: float | None = None

    @classmethod
    def of(
        cls,
        experts: int,
        *,
        mask: Any = None,
        bias: Any = None,
        boost: Any = None,
        top_k: int | None = None,
        top_p: float | None = None,
        null: float | None = None,
    ) -> LayerSteering:
        """Build a layer's changes. Omitted arguments change nothing."""
        return cls(
            np.zeros(experts, bool) if mask is None else np.asarray(mask, bool),
            np.zeros(experts, np.float32) if bias is None else np.asarray(bias, np.float32),
            np.ones(experts, np.float32) if boost is None else np.asarray(boost, np.float32),
            top_k,
            top_p,
            null,
        )

    @property
    def is_neutral(self) -> bool:
        """Whether the layer is unchanged."""
        return (
            not self.mask.any()
            and not self.bias.any()
            and bool((self.boost == 1).all())
            and self.top_k is None
            and self.top_p is None
            and self.null is None
        )


@dataclass(frozen=True, slots=True, eq=False)
class SteeringProfile:
    """A steering profile: the changes by layer, for the base that `shape` describes.

    Attributes:
        protected: By layer, the experts that must never be masked, because all tokens need them.
        about: A description for readers.
    """

    shape: MoeShape
    layers: Mapping[int, LayerSteering]
    protected: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    about: str = ""


def steer(
    logits: NDArray[Any], layer: LayerSteering, shape: MoeShape
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Choose experts by steered gates. This function defines steering.

    Args:
        logits: The gate's logits, (T, E).
        layer: The changes of the layer.
        shape: The gates of the model.

    Returns:
        The weights and ids of the chosen experts, each (T, k). The most probable expert comes
        first, and the lower id comes first among equal logits.
    """
    k = layer.top_k if layer.top_k is not None else shape.top_k
    steered = logits.astype(np.float32) + layer.bias
    steered = np.where(layer.mask, np.float32(-np.inf), steered)
    odds = np.exp(steered - steered.max(axis=-1, keepdims=True))
    probability = odds / odds.sum(axis=-1, keepdims=True)
    ids = np.argsort(-probability, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(probability, ids, axis=-1)
    if layer.top_p is not None:
        before = np.cumsum(weights, axis=-1) - weights
        before[:, 0] = 0
        weights = np.where(before < layer.top_p, weights, np.float32(0))
    if layer.null is not None:
        chosen = np.take_along_axis(steered, ids, axis=-1)
        weights = np.where(chosen >= np.float32(layer.null), weights, np.float32(0))
    if shape.renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / np.where(total > 0, total, np.float32(1))
    return (weights * layer.boost[ids]).astype(np.float32), ids.astype(np.int32)


def check_profile(profile: SteeringProfile, shape: MoeShape) -> None:
    """Check a profile against a base.

    Raises:
        InvalidProfileError: The profile does not fit. The message names the layer and the numbers.
    """
    _check_base(profile.shape, shape)
    for layer, settings in sorted(profile.layers.items()):
        if layer not in shape.layers:
            raise InvalidProfileError(
                f"layer {layer}: the model has gates in layers {_spans(shape.layers)} only"
            )
        _check_layer(f"layer {layer}", settings, shape)
    for layer, experts in sorted(profile.protected.items()):
        wrong = [expert for expert in experts if not 0 <= expert < shape.experts]
        if layer not in shape.layers or wrong:
            what = f"expert {wrong[0]}" if wrong else "the layer"
            raise InvalidProfileError(
                f"layer {layer}: {what} is protected and not there: the model has experts 0 to "
                f"{shape.experts - 1} in layers {_spans(shape.layers)}"
            )
        if layer in profile.layers:
            masked = [expert for expert in experts if profile.layers[layer].mask[expert]]
            if masked:
                raise InvalidProfileError(
                    f"layer {layer}: expert {masked[0]} is protected and can't be masked"
                )


def _check_base(mine: MoeShape, base: MoeShape) -> None:
    for what, expected, actual in (
        ("experts", mine.experts, base.experts),
        ("layers with a gate", len(mine.layers), len(base.layers)),
        ("experts per token", mine.top_k, base.top_k),
    ):
        if expected != actual:
            raise InvalidProfileError(
                f"it is for another base, of {expected} {what}; this one has {actual}"
            )
    if mine.layers != base.layers:
        raise InvalidProfileError(
            f"it is for another base, with gates in layers {_spans(mine.layers)}; this one has "
            f"them in layers {_spans(base.layers)}"
        )
    if mine.gates != base.gates:
        raise InvalidProfileError(
            f"it is for another base, with gates of sha256 {mine.gates[:12]}…; this one's are "
            f"{base.gates[:12]}…"
        )
    if mine.renormalize != base.renormalize:
        raise InvalidProfileError(
            "it is for another base, whose weights are "
            f"{'' if mine.renormalize else 'not '}normalised; this one's are "
            f"{'' if base.renormalize else 'not '}normalised"
        )


def _check_layer(where: str, layer: LayerSteering, shape: MoeShape) -> None:
    for name in _DTYPES:
        tensor = getattr(layer, name)
        if tensor.shape != (shape.experts,):
            raise InvalidProfileError(
                f"{where}: {name} has shape {tensor.shape}, and the model {shape.experts} experts"
            )
        if not np.isfinite(tensor).all():
            raise InvalidProfileError(
                f"{where}: {name} of expert {int(np.argmin(np.isfinite(tensor)))} is no finite "
                "number"
            )
    if (layer.boost < 0).any():
        worst = int(layer.boost.argmin())
        raise InvalidProfileError(
            f"{where}: boost of expert {worst} is {layer.boost[worst]:g}; it must be at least 0"
        )
    k = shape.top_k if layer.top_k is None else layer.top_k
    if not 1 <= k <= shape.experts:
        raise InvalidProfileError(f"{where}: top_k is {k}; allowed: 1 to {shape.experts}")
    left = int((~layer.mask).sum())
    if left == 0:
        raise InvalidProfileError(f"{where}: all {shape.experts} experts are masked")
    if left < k:
        raise InvalidProfileError(
            f"{where}: {left} of {shape.experts} experts are not masked, and {k} are chosen for "
            "each token"
        )
    if layer.top_p is not None and not 0 < layer.top_p <= 1:
        raise InvalidProfileError(f"{where}: top_p is {layer.top_p:g}; allowed: above 0, at most 1")
    if layer.null is not None and not np.isfinite(layer.null):
        raise InvalidProfileError(f"{where}: null is {layer.null:g}; it must be a finite number")


def _spans(layers: tuple[int, ...]) -> str:
    """Format indices for readers, such as `0-3, 5`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"


# --- the file


def write_profile(profile: SteeringProfile, path: Path | str) -> None:
    """Write a profile atomically as safetensors. Changes without effect are left out."""
    tensors: dict[str, NDArray[Any]] = {}
    for index, layer in sorted(profile.layers.items()):
        where = f"layers.{index}"
        if layer.mask.any():
            tensors[f"{where}.mask"] = layer.mask.astype(np.uint8)
        if layer.bias.any():
            tensors[f"{where}.bias"] = layer.bias.astype(np.float32)
        if (layer.boost != 1).any():
            tensors[f"{where}.boost"] = layer.boost.astype(np.float32)
        if layer.top_k is not None:
            tensors[f"{where}.top_k"] = np.array(layer.top_k, np.int32)
        if layer.top_p is not None:
            tensors[f"{where}.top_p"] = np.array(layer.top_p, np.float32)
        if layer.null is not None:
            tensors[f"{where}.null"] = np.array(layer.null, np.float32)
    metadata = {
        "format": FORMAT,
        "shape": json.dumps(asdict(profile.shape)),
        "protected": json.dumps(
            {str(layer): list(experts) for layer, experts in profile.protected.items()}
        ),
        "about": profile.about,
    }
    path = Path(path)
    new = path.with_name(path.name + ".new")
    new.write_bytes(dump_tensors(tensors, metadata))
    new.replace(path)


def read_profile(path: Path | str) -> SteeringProfile:
    """Read a profile. `check_profile` checks whether it fits a base.

    Raises:
        InvalidProfileError: The file is invalid. The message names the file.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidProfileError(f"{path}: larger than {_MAX_BYTES >> 20} MiB: no profile")
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except OSError as error:
        raise InvalidProfileError(f"{path}: can't be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InvalidProfileError(f"{path}: not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise InvalidProfileError(
            f"{path}: its format is {metadata.get('format')!r}; a profile's is {FORMAT!r}"
        )
    try:
        shape, protected = _shape_and_protected(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidProfileError(f"{path}: its metadata is damaged: {error}") from None
    parts: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        begin, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        dtype = _DTYPES.get(part) or _SCALARS.get(part)
        if begin != "layers" or not index.isdecimal() or dtype is None:
            raise InvalidProfileError(f"{path}: {name!r} is no part of a profile")
        if tensor.dtype != dtype or (part in _SCALARS and tensor.shape != ()):
            raise InvalidProfileError(
                f"{path}: layer {index}: {part} is {tensor.dtype} {tensor.shape}; it must be "
                f"{dtype}{' ()' if part in _SCALARS else ''}"
            )
        value = tensor if part in _DTYPES else tensor.item()
        parts.setdefault(int(index), {})[part] = value
    layers = {index: LayerSteering.of(shape.experts, **parts[index]) for index in sorted(parts)}
    return SteeringProfile(shape, layers, protected, metadata.get("about", ""))


def _shape_and_protected(
    metadata: Mapping[str, str],
) -> tuple[MoeShape, dict[int, tuple[int, ...]]]:
    shape = json.loads(metadata["shape"])
    protected = json.loads(metadata.get("protected", "{}"))
    experts, top_k = int(shape["experts"]), int(shape["top_k"])
    if not 1 <= experts <= 1 << 16:
        raise ValueError(f"{experts} experts")
    return (
        MoeShape(
            tuple(int(layer) for layer in shape["layers"]),
            experts,
            top_k,
            bool(shape["renormalize"]),
            str(shape["gates"]),
        ),
        {int(layer): tuple(int(id_) for id_ in ids) for layer, ids in protected.items()},
    )
