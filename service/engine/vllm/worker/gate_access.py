"""The gates of a running vLLM model: its mixture-of-experts layers and their routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

# The method by which a router chooses. An instance attribute of this name overrides it.
_CHOICE = "_compute_routing"
_STEERABLE = ("CPURouter", "FusedTopKRouter")

Choice = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """One layer with a gate.

    Attributes:
        layer: The index of the decoder layer.
        experts: The number of routed experts of the layer.
        top_k: The number of routed experts that compute a token.
        router: vLLM's router of the layer.
        kernel: The name of vLLM's class that computes the routed experts.
        computes: vLLM's object of that class, where it has `apply` of modular kernels.
    """

    layer: int
    experts: int
    top_k: int
    router: BaseRouter
    kernel: str = ""
    computes: object | None = None

    @property
    def renormalize(self) -> bool:
        """Whether the weights of the chosen experts are divided by their sum."""
        return bool(self.router.renormalize)

    def watch_choices(self, callback: Callable[[torch.Tensor], None] | None) -> None:
        """Set the router's callback for each choice, int32 (tokens, k). None removes it."""
        self.router.set_capture_fn(callback)

    def unsteerable_reason(self) -> str | None:
        """Return why the router's choice can't be replaced, or None where it can.

        Only a plain softmax with top-k can be replaced.
        """
        router = self.router
        kind = type(router).__name__
        if kind not in _STEERABLE:
            steerable = " or a ".join(_STEERABLE)
            return f"layer {self.layer} has a {kind}; steered can be a {steerable}"
        # The router class on a GPU has no attributes for groups and for the model's own function.
        if getattr(router, "use_grouped_topk", False):
            how = "in groups"
        elif router.scoring_func != "softmax":
            how = f"by {router.scoring_func}"
        elif getattr(router, "custom_routing_function", None) is not None:
            how = "by the model's own code"
        else:
            return None
        return f"layer {self.layer} has a {kind} that chooses {how}, not by softmax and top-k"


def choice_of(router: BaseRouter) -> Choice:
    """Return the function by which a router chooses now."""
    choice: Choice = getattr(router, _CHOICE)
    return choice


def replace_choice(router: BaseRouter, choice: Choice) -> None:
    """Make a router choose by another function. This can't fail."""
    router.__dict__[_CHOICE] = choice


def restore_choice(router: BaseRouter) -> None:
    """Make a router choose by vLLM's own function again. This can't fail."""
    router.__dict__.pop(_CHOICE, None)


def chooses_by(router: BaseRouter, choice: Choice) -> bool:
    """Return whether a router chooses by this function."""
    return router.__dict__.get(_CHOICE) is choice


def routed_layers(model: torch.nn.Module) -> tuple[RoutedLayer, ...]:
    """Return the layers with gates, in order. A model without mixtures of experts has none.

    Raises:
        ValueError: A kernel does the routing itself, so its choice can't be read or changed.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    layers = []
    for module in model.modules():
        if not isinstance(module, MoERunner):
            continue
        layer, router, method = module.layer_id, module.router, module._quant_method
        computes = getattr(method.moe_kernel, "fused_experts", None)
        kernel = type(method if computes is None else computes).__name__
        if method.is_monolithic or not isinstance(router, BaseRouter):
            raise ValueError(
                f"layer {layer} is routed inside its kernel ({kernel}), where its choice can't be "
                "seen or changed; vllm.moe_backend: triton routes before its kernel"
            )
        experts, top_k = router.global_num_experts, router.top_k
        layers.append(RoutedLayer(layer, experts, top_k, router, kernel, computes))
    return tuple(sorted(layers, key=lambda routed: routed.layer))
