"""The worker's access to the internals of vLLM's models: layers, packed weights and batches.

`gates` is the counterpart for mixtures of experts, and `loading` and `packing` are the counterparts
for vLLM's loader. `tests/project/test_vllm_surface.py` lists all names of vLLM that they use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# Classes that compute with weights as the loader leaves them, and with inputs of the same dtype.
PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
# Classes that change the weights once after loading (layouts, scales), and keep nothing elsewhere
# that `model_state` can't see. Each was read in the release of vLLM that is installed.
PROCESSED_METHODS = (
    "AutoAWQLinearMethod",
    "AutoAWQMarlinLinearMethod",
    "AutoAWQMoEMethod",
    "AutoGPTQLinearMethod",
    "AutoGPTQMoEMethod",
    "CompressedTensorsLinearMethod",
    "CompressedTensorsW8A8Fp8MoEMethod",
    "CompressedTensorsW8A8Int8MoEMethod",
    "CompressedTensorsWNA16MoEMethod",
    "Fp8LinearMethod",
    "Fp8MoEMethod",
    "UnquantizedFusedMoEMethod",
)


def named_layers(config: VllmConfig) -> dict[str, torch.nn.Module]:
    """Return the layers that vLLM looks up by name in a forward pass. The dict is not a copy."""
    layers: dict[str, torch.nn.Module] = config.compilation_config.static_forward_context
    return layers


def world_size(config: VllmConfig) -> int:
    """Return the number of workers of the engine."""
    return int(config.parallel_config.world_size)


def is_attention(layer: torch.nn.Module) -> bool:
    """Return whether a layer holds a part of the KV cache."""
    return hasattr(layer, "kv_cache")


def weight_method(module: torch.nn.Module) -> str | None:
    """Return the name of the class that computes with a layer's weights; None without weights."""
    method = getattr(module, "quant_method", None)
    return None if method is None else type(method).__name__


def is_plain(model: torch.nn.Module) -> bool:
    """Return whether the kernels use all weights of a model as the loader leaves them."""
    return all(
        method is None or method in PLAIN_METHODS
        for module in model.modules()
        if not is_attention(module)
        for method in [weight_method(module)]
    )


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return vLLM's linear layers of a model, in order."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "quant_method") and hasattr(module, "input_size")
    ]


def linear_input_size(module: torch.nn.Module) -> int:
    """Return the input size of this rank's part of a linear layer."""
    return int(getattr(module, "input_size_per_partition", module.input_size))


def linear_output(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer's output, (rows, output size), with the engine's own kernel."""
    output: torch.Tensor = module.quant_method.apply(module, rows)
    return output


def packed_weight(module: torch.nn.Module) -> object | None:
    """Return a layer's weight as packed for vLLM's CPU kernels, or None."""
    packed: object | None = getattr(module, "cpu_linear", None)
    return packed


def share_packed_weight(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Make `target` compute with the packed weight of `source`, if `source` has one."""
    if hasattr(source, "cpu_linear"):
        target.cpu_linear = source.cpu_linear


def has_batch(runner: GPUModelRunner) -> bool:
    """Return whether a model runner tells which tokens of a step belong to which request."""
    return hasattr(runner, "input_batch") or hasattr(runner, "execute_model_state")


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The requests of one step.

    Attributes:
        request_ids: vLLM's ids of the requests.
        bounds: The index of each request's first token in the step, and the token count.
    """

    request_ids: list[str]
    bounds: list[int]


def step_batch(runner: GPUModelRunner) -> StepBatch | None:
    """Return the batch of the step that has just been computed.

    vLLM's second model runner, the default on GPUs, has it only until it samples the tokens.

    Returns:
        The batch, or None where the runner has none now.
    """
    if hasattr(runner, "input_batch"):
        batch = runner.input_batch
        starts = runner.query_start_loc.np
    else:
        if runner.execute_model_state is None:
            return None
        batch = runner.execute_model_state.input_batch
        starts = batch.query_start_loc_np
    count = int(batch.num_reqs)
    return StepBatch(list(batch.req_ids[:count]), starts[: count + 1].tolist())


def scheduled_tokens(scheduler_output: Any) -> int:
    """Return the number of tokens of a scheduled step."""
    return int(scheduler_output.total_num_scheduled_tokens)
