"""Where a running vLLM model routes tokens: its mixture-of-experts layers and their routers.

What begins with `service.engine.vllm.engine` is all that imports vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """One layer that routes: the decoder layer's index, and vLLM's router in it.

    `experts`: routed experts of the layer; `top_k`: how many of them a token gets. `kernel`:
    the class of vLLM's that computes them.
    """

    layer: int
    experts: int
    top_k: int
    router: Any
    kernel: str = ""


def routed_layers(model: Any) -> tuple[RoutedLayer, ...]:
    """The layers that route, in order; none where the model is no mixture of experts.

    Raises ValueError where a kernel routes by itself: nobody can see or change its choice.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    found = []
    for module in model.modules():
        if not isinstance(module, MoERunner):
            continue
        layer, router, method = module.layer_id, module.router, module._quant_method
        computes = getattr(method.moe_kernel, "fused_experts", method)
        kernel = type(computes).__name__
        if method.is_monolithic or not isinstance(router, BaseRouter):
            raise ValueError(
                f"layer {layer} is routed inside its kernel ({kernel}), where its choice can't be "
                "seen or changed; vllm.moe_backend: triton routes before its kernel"
            )
        found.append(RoutedLayer(layer, router.global_num_experts, router.top_k, router, kernel))
    return tuple(sorted(found, key=lambda one: one.layer))
