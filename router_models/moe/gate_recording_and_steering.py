"""Hooks into the gates of a transformers model: find, record and steer them.

The hooks check every assumption about a model's class. A router must choose as
`service.moe.steering_profile.steer` does, the experts' outputs must equal the outputs computed here
expert by expert, and their sum must be added to the residual stream. A model that computes its
layers in another way is refused by the name of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import ArtifactError
from service.moe.steering_profile import LayerSteering, MoeShape, steer

_CLOSE = 2e-2
"""Relative to the largest value: bfloat16 keeps eight bits, and sums come in another order."""
_TIPPED = 0.05


class NotSteerableError(ArtifactError):
    """The experts of a model can't be inspected. The message names the model's class."""

    code = "not_steerable"


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """The activations of one layer for T tokens.

    before: the residual stream that the routed experts add to, (T, hidden). routed: what they
    add, (T, hidden). weights, ids: (T, k). norms: of each chosen expert's output, (T, k).
    peaks: each expert's largest output by magnitude, (experts,), 0 where it was not chosen.
    after: the residual stream behind the layer, (T, hidden).
    """

    layer: int
    before: Tensor
    routed: Tensor
    weights: Tensor
    ids: Tensor
    norms: Tensor
    peaks: Tensor
    after: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RoutedLayer:
    """A decoder layer with a gate: its modules in the running model."""

    index: int
    decoder: Any
    block: Any
    router: Any
    experts: Any

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, as they are in memory."""
        return sum(
            int(tensor[0].numel()) * int(tensor.element_size())
            for tensor in (self.experts.gate_up_proj, self.experts.down_proj)
        )


def find_routed(model: Any, shape: MoeShape) -> list[RoutedLayer]:
    """Find the layers of `shape` in a causal language model.

    Raises:
        NotSteerableError: The model computes its layers in another way.
    """
    decoders = getattr(getattr(model, "model", None), "layers", None)
    if decoders is None or max(shape.layers) >= len(decoders):
        raise _refused(model, "its decoder layers are not where they are looked for")
    found = []
    for index in shape.layers:
        decoder = decoders[index]
        inside = [
            (block, experts)
            for block in decoder.modules()
            for experts in block.children()
            if _holds_experts(experts, shape)
        ]
        if len(inside) != 1:
            raise _refused(
                model, f"layer {index} has no experts in one tensor (gate_up_proj and down_proj)"
            )
        block, experts = inside[0]
        routers = [
            child
            for name, child in block.named_children()
            if name in ("gate", "router")
            and tuple(getattr(getattr(child, "weight", None), "shape", ()))[:1] == (shape.experts,)
        ]
        if len(routers) != 1:
            raise _refused(model, f"layer {index} has no gate beside its experts")
        found.append(RoutedLayer(index, decoder, block, routers[0], experts))
    return found


@contextmanager
def steer_gates(
    layers: list[RoutedLayer], steering: Mapping[int, LayerSteering], shape: MoeShape
) -> Iterator[None]:
    """Steer the gates of `layers` within the context; other gates stay as they are."""
    hooks = [
        layer.router.register_forward_hook(_steering_hook(steering[layer.index], shape))
        for layer in layers
        if layer.index in steering
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def capture_choices(
    layers: list[RoutedLayer], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `see(layer, ids, weights)` with each gate's choices, (T, k) each, within the context."""

    def hook(index: int) -> Callable[..., None]:
        def told(_: Any, given: tuple[Any, ...]) -> None:
            see(index, given[1], given[2])

        return told

    hooks = [
        layer.experts.register_forward_pre_hook(hook(layer.index), with_kwargs=False)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def capture_logits(
    layers: list[RoutedLayer], see: Callable[[int, NDArray[np.float32]], None]
) -> Iterator[None]:
    """Call `see(layer, logits)` with each gate's logits, (T, experts), within the context."""

    def hook(layer: RoutedLayer) -> Callable[..., None]:
        def told(router: Any, given: tuple[Any, ...]) -> None:
            see(layer.index, _logits(router, given[0]))

        return told

    hooks = [layer.router.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def capture_activations(
    model: Any, layers: list[RoutedLayer], shape: MoeShape, see: Callable[[LayerActivations], None]
) -> Iterator[None]:
    """Call `see` with each layer's activations within the context.

    Raises NotSteerableError if the model computes its layers in another way (see the module).
    """
    hooks = [hook for layer in layers for hook in _install_hooks(model, layer, shape, see)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _install_hooks(
    model: Any, layer: RoutedLayer, shape: MoeShape, see: Callable[[LayerActivations], None]
) -> list[Any]:
    seen: dict[str, Any] = {}

    def routed(_: Any, given: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        index, weights = out[_ids_at(out)], out[1]
        _check_gate(model, layer, given[0], index, weights, shape)

    def experts(_: Any, given: tuple[Any, ...], out: Tensor) -> None:
        inputs, ids, weights = given
        norms, peaks, total = _one_by_one(layer.experts, inputs, ids, weights)
        if not _close(total, out.reshape(total.shape)):
            raise _refused(model, f"layer {layer.index}: its experts are no gated FFNs")
        seen.update(routed=total, weights=weights, ids=ids, norms=norms, peaks=peaks)

    def block(_: Any, given: tuple[Any, ...], out: Any) -> None:
        seen["block"] = _flat(out)

    def decoder(_: Any, given: tuple[Any, ...], out: Any) -> None:
        after = _flat(out)
        # Some families scale what they add.
        scale = float(getattr(layer.decoder, "residual_multiplier", 1.0))
        before = seen["before"]
        if not _close(before + scale * seen["block"], after):
            raise _refused(
                model, f"layer {layer.index} does not add its experts' output to what came before"
            )
        see(
            LayerActivations(
                layer.index,
                before,
                scale * seen["routed"],
                seen["weights"].float(),
                seen["ids"],
                seen["norms"],
                seen["peaks"],
                after,
            )
        )
        seen.clear()

    def norm(_: Any, given: tuple[Any, ...]) -> None:
        seen["before"] = _flat(given[0])

    before = getattr(layer.decoder, "post_attention_layernorm", None)
    if before is None:
        raise _refused(model, f"layer {layer.index} has no norm between attention and experts")
    return [
        before.register_forward_pre_hook(norm),
        layer.router.register_forward_hook(routed),
        layer.experts.register_forward_hook(experts),
        layer.block.register_forward_hook(block),
        layer.decoder.register_forward_hook(decoder),
    ]


def _steering_hook(layer: LayerSteering, shape: MoeShape) -> Callable[..., Any]:
    def hook(router: Any, given: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
        weights, ids = steer(_logits(router, given[0]), layer, shape)
        changed = list(out)
        changed[1] = torch.from_numpy(weights).to(out[1])
        at = _ids_at(out)
        changed[at] = torch.from_numpy(ids).to(out[at])
        return tuple(changed)

    return hook


def _check_gate(
    model: Any, layer: RoutedLayer, given: Tensor, ids: Tensor, weights: Tensor, shape: MoeShape
) -> None:
    """Check that an unsteered gate chooses as `service.moe.steering_profile` defines it."""
    logits = _logits(layer.router, given)
    ours = steer(logits, LayerSteering.of(shape.experts), shape)
    if tuple(ids.shape) != ours[1].shape:
        raise _refused(model, f"layer {layer.index}: its gate chooses another number of experts")
    spread = np.zeros((2, *logits.shape), np.float32)
    # The comparison is by expert, because equally probable experts may come in any order.
    theirs = (weights.float().cpu().numpy(), ids.cpu().numpy())
    for row, (weight, index) in zip(spread, (ours, theirs), strict=True):
        np.put_along_axis(row, index.astype(np.int64), weight, axis=-1)
    # Rounding may tip the balance between two experts for a token now and then.
    off = np.abs(spread[0] - spread[1]).max(axis=-1) > _CLOSE
    if off.mean() > _TIPPED:
        raise _refused(model, f"layer {layer.index}: its gate does not choose by softmax and top-k")


def _logits(router: Any, given: Tensor) -> NDArray[np.float32]:
    inputs = given.reshape(-1, given.shape[-1])
    logits = torch.nn.functional.linear(inputs, router.weight, getattr(router, "bias", None))
    found: NDArray[np.float32] = logits.float().cpu().numpy()
    return found


def _ids_at(out: tuple[Any, ...]) -> int:
    """Return the index of the chosen experts in a gate's output: first or last."""
    return 0 if not out[0].is_floating_point() else 2


def _one_by_one(
    experts: Any, inputs: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert's own output: norms (T, k), peaks (E,); and the weighted sum (T, hidden)."""
    norms = torch.zeros(ids.shape, dtype=torch.float32)
    peaks = torch.zeros(experts.gate_up_proj.shape[0], dtype=torch.float32)
    total = torch.zeros(inputs.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, place = torch.where(ids == expert)
        both = torch.nn.functional.linear(inputs[token], experts.gate_up_proj[expert])
        gate, up = both.chunk(2, dim=-1)
        own = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        own = own.float()
        norms[token, place] = own.norm(dim=-1)
        peaks[expert] = own.abs().max()
        total.index_add_(0, token, own * weights[token, place, None].float())
    return norms, peaks, total


def _holds_experts(module: Any, shape: MoeShape) -> bool:
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return (
        isinstance(up, Tensor)
        and isinstance(down, Tensor)
        and up.dim() == 3
        and down.dim() == 3
        and up.shape == (shape.experts, 2 * down.shape[2], down.shape[1])
        and hasattr(module, "act_fn")
    )


def _flat(out: Any) -> Tensor:
    """A module's first output as (tokens, hidden), float32."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _close(first: Tensor, second: Tensor) -> bool:
    worst = float((first.float() - second.float()).abs().max())
    return worst <= _CLOSE * max(1e-6, float(second.float().abs().max()))


def _refused(model: Any, why: str) -> NotSteerableError:
    return NotSteerableError(f"{type(model).__name__}: {why}; no profile can be learned for it")
