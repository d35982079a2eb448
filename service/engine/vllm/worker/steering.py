"""Steering in the worker, where nothing is compiled: other rules for the gates of a held model.

The rules are put into each router in the place of its own, and taken out again: a model that
is not steered runs vLLM's own code, untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from service.engine.vllm.worker.gates import RoutedLayer, routed_layers

# What a router calls for its choice; an attribute of its own hides the class's.
CHOOSES = "_compute_routing"
_STEERABLE = ("CPURouter", "FusedTopKRouter")


@dataclass(frozen=True, slots=True)
class GateRule:
    """One layer's. Tensors of E: `barred` is -inf where masked and the bias elsewhere.

    boost: None where all are 1.
    """

    barred: torch.Tensor
    boost: torch.Tensor | None
    top_k: int
    top_p: float | None
    renormalize: bool

    def __call__(
        self, hidden_states: Any, router_logits: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of a router's own choice."""
        del hidden_states
        return choose(router_logits, self)

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        tensors = [one for one in (self.barred, self.boost) if one is not None]
        return sum(one.numel() * one.element_size() for one in tensors)


def choose(logits: torch.Tensor, rule: GateRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (float32) and ids (int32), (T, k): `service.moe.steering.steer` in torch.

    But for the ids that top-p leaves with weight 0: here they are the token's first choice.
    """
    probability = torch.softmax(logits.float() + rule.barred, dim=-1)
    weights, ids = torch.sort(probability, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, : rule.top_k], ids[:, : rule.top_k]
    if rule.top_p is not None:
        before = torch.cumsum(weights, dim=-1) - weights
        before[:, 0] = 0
        stays = before < rule.top_p
        weights = torch.where(stays, weights, 0.0)
        # The first choice again in the places that are left: no other expert is computed in vain.
        ids = torch.where(stays, ids, ids[:, :1])
    if rule.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if rule.boost is not None:
        weights = weights * rule.boost[ids]
    return weights.contiguous(), ids.to(torch.int32).contiguous()


@dataclass(frozen=True, slots=True)
class SteeredGates:
    """The rules of one steered expert, and the routers of its base's model that they are for."""

    rules: tuple[tuple[Any, GateRule], ...]

    @classmethod
    def of(cls, model: Any, told: Mapping[str, Any]) -> SteeredGates:
        """The rules that `told` (a `Steering` as a mapping) asks for, not yet put in.

        Raises ValueError where the model's gates are others, or can't be steered.
        """
        found = gates_of(model)
        rules = []
        for layer in told["layers"]:
            routed = gate_for(found, int(layer["layer"]), told)
            if (why := why_not(routed)) is not None:
                raise ValueError(why)
            rules.append((routed.router, rule_of(layer, told)))
        return cls(tuple(rules))

    @property
    def size_bytes(self) -> int:
        """What its rules take."""
        return sum(rule.size_bytes for _, rule in self.rules)

    def put(self) -> None:
        """From now on the routers choose by these rules. Can't fail."""
        for router, rule in self.rules:
            router.__dict__[CHOOSES] = rule

    def remove(self) -> None:
        """The routers choose as vLLM has made them. Can't fail."""
        for router, _ in self.rules:
            router.__dict__.pop(CHOOSES, None)

    def holds(self) -> bool:
        """Whether the routers choose by these rules."""
        return all(router.__dict__.get(CHOOSES) is rule for router, rule in self.rules)


def gates_of(model: Any) -> dict[int, RoutedLayer]:
    """A model's gates by layer. Raises ValueError where there are none."""
    found = {one.layer: one for one in routed_layers(model)}
    if not found:
        raise ValueError("it has no gates: it is no mixture of experts")
    return found


def gate_for(found: Mapping[int, RoutedLayer], layer: int, told: Mapping[str, Any]) -> RoutedLayer:
    """The gate of a layer, if it is as `told` says. Raises ValueError."""
    if (routed := found.get(layer)) is None:
        raise ValueError(f"layer {layer} has no gate")
    asked = (told["experts"], told["top_k"], told["renormalize"])
    has = (routed.experts, routed.top_k, routed.router.renormalize)
    if asked != has:
        raise ValueError(
            f"layer {layer} has {has[0]} experts, of which {has[1]} are chosen, "
            f"normalised: {has[2]}; the profile is for {asked[0]}, {asked[1]}, {asked[2]}"
        )
    return routed


def why_not(routed: RoutedLayer) -> str | None:
    """Why a router's choice can't be steered; None where it is by softmax and top-k alone."""
    router = routed.router
    kind = type(router).__name__
    if kind not in _STEERABLE:
        return f"layer {routed.layer} has a {kind}; steered can be a {' or a '.join(_STEERABLE)}"
    # The second is a GPU's, and knows neither groups nor a model's own code.
    if getattr(router, "use_grouped_topk", False):
        how = "in groups"
    elif router.scoring_func != "softmax":
        how = f"by {router.scoring_func}"
    elif getattr(router, "custom_routing_function", None) is not None:
        how = "by the model's own code"
    else:
        return None
    return f"layer {routed.layer} has a {kind} that chooses {how}, not by softmax and top-k"


def rule_of(layer: Mapping[str, Any], told: Mapping[str, Any]) -> GateRule:
    """One layer's rule: `layer` is a `SteeredLayer`, `told` its `Steering`, as mappings."""
    bias = torch.tensor(layer["bias"], dtype=torch.float32)
    mask = torch.tensor(layer["mask"], dtype=torch.bool)
    boost = torch.tensor(layer["boost"], dtype=torch.float32)
    return GateRule(
        bias.masked_fill(mask, float("-inf")),
        boost if bool((boost != 1).any()) else None,
        told["top_k"] if layer["top_k"] is None else int(layer["top_k"]),
        layer["top_p"],
        bool(told["renormalize"]),
    )
