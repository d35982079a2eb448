"""Checks a config's options for mixtures of experts against its models.

`service.config.moe_options` checks everything that needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from service.config import Config, VllmOptions
from service.errors import ConfigError
from service.models.lora_adapters import AdapterInfo
from service.models.model_inspection import ModelInfo, MoeInfo

# vLLM's backends for unquantised weights. vLLM refuses to start with other backends.
_UNQUANTIZED = (
    "auto",
    "triton",
    "batched_triton",
    "flashinfer_trtllm",
    "flashinfer_cutlass",
    "aiter",
)


def check_kernels(
    config: Config, kind: str, inspect: Callable[[str], ModelInfo | AdapterInfo]
) -> tuple[str, ...]:
    """Check a pool's options against its models.

    Args:
        config: The config.
        kind: The pool's name in the config.
        inspect: A function that reads an expert's folder.

    Returns:
        A line for each mixture of experts.

    Raises:
        ConfigError: An option does not fit a model.
    """
    pool = config.pools[kind]
    lines = []
    dense = []
    for name in config.local_experts(kind):
        if config.experts[name].model is None:
            continue
        info = inspect(name)
        if not isinstance(info, ModelInfo):
            continue  # the memory plan reports this error
        options = config.vllm_of(kind, name)
        if info.moe is None:
            dense.append(name)
            _check_dense(config, kind, name, info)
        else:
            own = config.experts[name].vllm
            at = f"experts.{name}" if own.moe_backend is not None else f"pools.{kind}"
            _check_backend(at, name, info, options)
            at = f"experts.{name}" if own.tuned_config_folder is not None else f"pools.{kind}"
            _check_tuned(at, name, info.moe, options)
            _check_spread(f"pools.{kind}.vllm", name, info.moe, options)
            lines.append(_kernel_summary(name, info.moe, options))
    for field, default in (("moe_backend", "auto"), ("tuned_config_folder", None)):
        if not lines and dense and getattr(pool.vllm, field) != default:
            raise ConfigError(
                f"pools.{kind}.vllm.{field}: none of its models is a mixture of experts"
            )
    return tuple(lines)


def _check_dense(config: Config, kind: str, name: str, info: ModelInfo) -> None:
    for field, value in config.experts[name].vllm:
        if value is not None:
            raise ConfigError(
                f"experts.{name}.vllm.{field}: {info.architecture} is no mixture of experts"
            )
    if config.pools[kind].vllm.enable_expert_parallel:
        raise ConfigError(
            f"pools.{kind}.vllm.enable_expert_parallel: {name!r} ({info.architecture}) is no "
            "mixture of experts; give it a pool of its own"
        )


def _check_backend(at: str, name: str, info: ModelInfo, options: VllmOptions) -> None:
    if info.quantization is None and options.moe_backend not in _UNQUANTIZED:
        raise ConfigError(
            f"{at}.vllm.moe_backend: {options.moe_backend} is for quantised weights, and those of "
            f"{name!r} are not; allowed: {', '.join(_UNQUANTIZED)}"
        )


def _check_tuned(at: str, name: str, moe: MoeInfo, options: VllmOptions) -> None:
    if options.tuned_config_folder is None:
        return
    where = f"{at}.vllm.tuned_config_folder"
    folder = Path(options.tuned_config_folder)
    if not folder.is_dir():
        raise ConfigError(f"{where}: {folder}: no such folder")
    files = sorted(folder.glob("*.json"))
    for file in files:
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            batches = {key for key in table if key != "triton_version"}
            sound = bool(batches) and all(key.isdecimal() for key in batches)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {file} can't be read: {error}") from None
        if not sound:
            raise ConfigError(f"{where}: {file} holds no configs by number of tokens")
    if moe.expert_intermediate_size is None:
        return
    # vLLM looks up its tuned configs by the number of experts on a device and their width there.
    devices = options.tensor_parallel_size
    if options.enable_expert_parallel:
        copies = options.eplb_config.num_redundant_experts
        experts, width = (moe.experts + copies) // devices, moe.expert_intermediate_size
    else:
        experts, width = moe.experts, moe.expert_intermediate_size // devices
    wanted = f"E={experts},N={width},device_name="
    if not any(file.name.startswith(wanted) for file in files):
        raise ConfigError(
            f"{where}: {folder} has nothing for {name!r}: there is no {wanted}….json in it"
        )


def _check_spread(where: str, name: str, moe: MoeInfo, options: VllmOptions) -> None:
    if not options.enable_expert_parallel:
        return
    devices, copies = options.tensor_parallel_size, options.eplb_config.num_redundant_experts
    if moe.experts < devices:
        raise ConfigError(
            f"{where}.enable_expert_parallel: {name!r} has {moe.experts} experts in a layer, fewer "
            f"than the {devices} GPUs"
        )
    if options.enable_eplb and (moe.experts + copies) % devices:
        fitting = -moe.experts % devices
        raise ConfigError(
            f"{where}.eplb_config.num_redundant_experts: {moe.experts} experts of {name!r} and "
            f"{copies} copies can't be spread evenly over {devices} GPUs; possible: {fitting}, "
            f"{fitting + devices}, …"
        )
    if copies > moe.experts * (devices - 1):
        raise ConfigError(
            f"{where}.eplb_config.num_redundant_experts: {copies} copies are more than "
            f"{moe.experts} experts on {devices} GPUs can have"
        )
    if options.expert_placement_strategy == "round_robin" and moe.groups < 2:
        raise ConfigError(
            f"{where}.expert_placement_strategy: round_robin is for models with groups of "
            f"experts, and {name!r} has none"
        )


def _kernel_summary(name: str, moe: MoeInfo, options: VllmOptions) -> str:
    parts = [
        f"{name}: {moe.experts} routed experts, {moe.experts_per_token} for a token",
        f"moe_backend {options.moe_backend}",
    ]
    if options.tuned_config_folder is not None:
        parts.append(f"tuned configs in {options.tuned_config_folder}")
    if options.enable_expert_parallel:
        spread = f"spread over {options.tensor_parallel_size} GPUs"
        if options.enable_eplb:
            spread += f" by load, {options.eplb_config.num_redundant_experts} copies"
        else:
            spread += f", {options.expert_placement_strategy}"
        parts.append(spread)
    return "; ".join(parts)
