"""Steering without graphs: the gates of a held model get rules at each swap.

A rule replaces a router's own choice and is removed at the next swap. Where it may drop choices of
single tokens, the layer's kernel computes only the kept choices meanwhile. A model without steering
runs vLLM's own code unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from service.engine.vllm.worker.gate_access import (
    RoutedLayer,
    chooses_by,
    replace_choice,
    restore_choice,
    routed_layers,
)
from service.engine.vllm.worker.kept_choices import (
    Apply,
    computes_by,
    kept_choices,
    replace_apply,
    restore_apply,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter


@dataclass(frozen=True, slots=True)
class GateRule:
    """The rule of one gate with E routed experts.

    Attributes:
        barred: The biases of the experts, float32 (E,). A masked expert has -inf.
        boost: The factors of the experts' weights, float32 (E,), or None where all are 1.
        top_k: The number of experts that compute a token.
        top_p: Only the first experts whose probabilities reach this sum compute a token.
        renormalize: Whether the weights are divided by their sum.
        null: The logit of null experts, to which chosen experts with smaller logits lose their
            places, or None.
    """

    barred: torch.Tensor
    boost: torch.Tensor | None
    top_k: int
    top_p: float | None
    renormalize: bool
    null: float | None = None

    def __call__(
        self, hidden_states: object, router_logits: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts in place of a router. Return weights and ids, each (tokens, k)."""
        return choose(router_logits, self)

    @property
    def may_drop(self) -> bool:
        """Whether some of a token's places may have the weight 0."""
        silent = self.boost is not None and bool((self.boost == 0).any())
        return self.top_p is not None or self.null is not None or silent

    @property
    def size_bytes(self) -> int:
        """The bytes of the rule's tensors."""
        tensors = [tensor for tensor in (self.barred, self.boost) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def choose(logits: torch.Tensor, rule: GateRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose routed experts as `service.moe.steering_profile.steer` does, in torch.

    Only the ids that top-p or null experts leave with weight 0 differ. Here they repeat the token's
    first choice.

    Args:
        logits: The gate's logits, (T, E).
        rule: The rule of the gate.

    Returns:
        Weights (float32) and ids (int32), each (T, k).
    """
    steered = logits.float() + rule.barred
    probability = torch.softmax(steered, dim=-1)
    weights, ids = torch.sort(probability, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, : rule.top_k], ids[:, : rule.top_k]
    if rule.top_p is not None:
        before = torch.cumsum(weights, dim=-1) - weights
        before[:, 0] = 0
        weights, ids = _drop(weights, ids, before < rule.top_p)
    if rule.null is not None:
        weights, ids = _drop(weights, ids, steered.gather(1, ids) >= rule.null)
    if rule.renormalize:
        # Where null experts took all places, the sum is 0.
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    if rule.boost is not None:
        weights = weights * rule.boost[ids]
    return weights.contiguous(), ids.to(torch.int32).contiguous()


def _drop(
    weights: torch.Tensor, ids: torch.Tensor, stays: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give places the weight 0 and the first choice, which a small batch computes anyhow."""
    return torch.where(stays, weights, 0.0), torch.where(stays, ids, ids[:, :1])


@dataclass(frozen=True, slots=True)
class SteeredGates:
    """The rules of one steered expert, for the gates of the base's model.

    Attributes:
        rules: Each rule with its router.
        kernels: The kernels of the layers in which choices may be dropped, each with the function
            that computes the kept choices.
    """

    rules: tuple[tuple[BaseRouter, GateRule], ...]
    kernels: tuple[tuple[object, Apply], ...] = ()

    @classmethod
    def of(cls, model: torch.nn.Module, steering: Mapping[str, Any]) -> SteeredGates:
        """Make the rules of a steered expert, without installing them.

        Args:
            model: The base's model.
            steering: A `Steering` as a mapping.

        Raises:
            ValueError: The model's gates differ from those in `steering`, or can't be steered.
        """
        gates = gates_of(model)
        device = next(model.parameters()).device
        rules = []
        kernels = []
        for layer in steering["layers"]:
            routed = gate_for(gates, int(layer["layer"]), steering)
            if (reason := routed.unsteerable_reason()) is not None:
                raise ValueError(reason)
            rule = rule_of(layer, steering)
            rules.append((routed.router, rule))
            kept = kept_choices(routed.computes, routed.experts, device) if rule.may_drop else None
            if kept is not None:
                kernels.append((routed.computes, kept))
        return cls(tuple(rules), tuple(kernels))

    @property
    def size_bytes(self) -> int:
        """The bytes of the rules."""
        return sum(rule.size_bytes for _, rule in self.rules)

    def install(self) -> None:
        """Make the routers choose by these rules. This can't fail."""
        for router, rule in self.rules:
            replace_choice(router, rule)
        for kernel, kept in self.kernels:
            replace_apply(kernel, kept)

    def remove(self) -> None:
        """Restore the routers' own choice. This can't fail."""
        for router, _ in self.rules:
            restore_choice(router)
        for kernel, _ in self.kernels:
            restore_apply(kernel)

    def verify(self) -> bool:
        """Return whether the routers choose by these rules."""
        return all(chooses_by(router, rule) for router, rule in self.rules) and all(
            computes_by(kernel, kept) for kernel, kept in self.kernels
        )


def gates_of(model: torch.nn.Module) -> dict[int, RoutedLayer]:
    """Return a model's gates by layer.

    Raises:
        ValueError: The model has no gates.
    """
    gates = {routed.layer: routed for routed in routed_layers(model)}
    if not gates:
        raise ValueError("it has no gates: it is no mixture of experts")
    return gates


def gate_for(
    gates: Mapping[int, RoutedLayer], layer: int, steering: Mapping[str, Any]
) -> RoutedLayer:
    """Return the gate of a layer.

    Raises:
        ValueError: The layer has no gate, or its gate differs from the gates in `steering`.
    """
    if (routed := gates.get(layer)) is None:
        raise ValueError(f"layer {layer} has no gate")
    expected = (steering["experts"], steering["top_k"], steering["renormalize"])
    found = (routed.experts, routed.top_k, routed.renormalize)
    if expected != found:
        raise ValueError(
            f"layer {layer} has {found[0]} experts, of which {found[1]} are chosen, "
            f"normalised: {found[2]}; the profile is for {expected[0]}, {expected[1]}, "
            f"{expected[2]}"
        )
    return routed


def rule_of(layer: Mapping[str, Any], steering: Mapping[str, Any]) -> GateRule:
    """Make the rule of one layer from a `SteeredLayer` and its `Steering`, both as mappings."""
    bias = torch.tensor(layer["bias"], dtype=torch.float32)
    mask = torch.tensor(layer["mask"], dtype=torch.bool)
    boost = torch.tensor(layer["boost"], dtype=torch.float32)
    return GateRule(
        bias.masked_fill(mask, float("-inf")),
        boost if bool((boost != 1).any()) else None,
        steering["top_k"] if layer["top_k"] is None else int(layer["top_k"]),
        layer["top_p"],
        bool(steering["renormalize"]),
        layer.get("null"),
    )
