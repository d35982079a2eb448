"""The worker's access to the insides of vLLM's models: their layers, packed weights and batches.

`gates` is the counterpart for mixtures of experts, `loading` and `packing` for vLLM's loader. Each
name of vLLM's that they depend on stands in `tests/project/test_vllm_surface.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def named_layers(config: VllmConfig) -> dict[str, torch.nn.Module]:
    """The layers that vLLM finds by name in a forward pass. Changes of the dict take effect."""
    layers: dict[str, torch.nn.Module] = config.compilation_config.static_forward_context
    return layers


def world_size(config: VllmConfig) -> int:
    """Workers of the engine."""
    return int(config.parallel_config.world_size)


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether a layer holds a part of the KV cache."""
    return hasattr(layer, "kv_cache")


def weight_method(module: torch.nn.Module) -> str | None:
    """Name of the class by which vLLM computes with a layer's weights; None: it has no weights."""
    method = getattr(module, "quant_method", None)
    return None if method is None else type(method).__name__


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return vLLM's linear layers of a model, in order."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "quant_method") and hasattr(module, "input_size")
    ]


def linear_input_size(module: torch.nn.Module) -> int:
    """Length of the vectors that this rank's part of a linear layer takes."""
    return int(getattr(module, "input_size_per_partition", module.input_size))


def linear_output(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A linear layer's output, (rows, output size), by the kernel that the engine uses."""
    output: torch.Tensor = module.quant_method.apply(module, rows)
    return output


def packed_weight(module: torch.nn.Module) -> object | None:
    """A layer's weight in the form of vLLM's CPU kernels, if it was packed."""
    packed: object | None = getattr(module, "cpu_linear", None)
    return packed


def share_packed_weight(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Have one layer compute with the packed weight of another, if that has one."""
    if hasattr(source, "cpu_linear"):
        target.cpu_linear = source.cpu_linear


def has_batch(runner: GPUModelRunner) -> bool:
    """Whether a model runner tells which tokens of a step belong to which request."""
    return hasattr(runner, "input_batch")


def batch_request_ids(runner: GPUModelRunner) -> list[str]:
    """Return vLLM's ids of the requests in the current step."""
    ids: list[str] = runner.input_batch.req_ids
    return ids


def batch_bounds(runner: GPUModelRunner) -> list[int]:
    """First token of each request in the current step, and after them the number of tokens."""
    bounds: list[int] = runner.query_start_loc.np[: runner.input_batch.num_reqs + 1].tolist()
    return bounds


def scheduled_tokens(scheduler_output: Any) -> int:
    """Tokens of the step that a scheduler has ordered."""
    return int(scheduler_output.total_num_scheduled_tokens)
