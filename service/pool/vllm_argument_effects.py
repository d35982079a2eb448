"""What vLLM's own arguments (`pools.KIND.vllm.args`) change in a pool's memory and swaps. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.config import Config, PoolConfig
from service.errors import ConfigError, ModelStoreError
from service.models import AdapterInfo, ModelInfo

_GIB = 1024**3
_WIDE = {"float16": 2, "bfloat16": 2}
# Weights that another format or place of weights would keep from being exchanged.
_WEIGHTS = (
    "quantization",
    "quantization_config",
    "offload_backend",
    "cpu_offload_gb",
    "cpu_offload_params",
    "offload_group_size",
    "offload_params",
)
_NO_EFFECT_ON_CPU = {
    "cpu_offload_gb": "on CPU the weights are in host memory anyhow",
    "kv_offloading_size": "on CPU the KV cache is in host memory anyhow; set vllm.kv_cache_bytes",
    "gpu_memory_utilization": "on CPU vllm.kv_cache_bytes decides",
}
# Formats into which vLLM quantises weights while it loads them.
_ONLINE = ("fp8", "mxfp8", "mxfp4", "int8_", "nvfp4_")
_ONLY_ROUTED = ("int8_", "nvfp4_")


def check_arguments(config: Config, kind: str) -> None:
    """Check that a pool's swaps are possible with its engines' arguments.

    Raises:
        ConfigError: Names the argument and the reason.
    """
    pool = config.pools[kind]
    where = f"pools.{kind}.vllm.args"
    if (why := _swapped_in_place(config, kind)) is not None:
        for name in _blocking(pool.vllm.args):
            raise ConfigError(
                f"{where}.{name}: {why} take the weights of others while the engine runs, which "
                "is not possible with this argument; "
                "use experts with full weights of their own and swap.method respawn"
            )
    if pool.gpus == 0:
        for name, why in _NO_EFFECT_ON_CPU.items():
            given = pool.vllm.args.get(name)
            if given and (name != "gpu_memory_utilization" or pool.vllm.kv_cache_bytes is not None):
                raise ConfigError(f"{where}.{name}: it has no effect: {why}")


def _swapped_in_place(config: Config, kind: str) -> str | None:
    """Return which experts of a pool use the engines of others while these run, or None."""
    pool = config.pools[kind]
    forms = {config.experts[name].form for name in config.local_experts(kind)}
    if "merged" in forms:
        return "merged experts"
    if "steered" in forms:
        return "virtual experts"
    in_place = pool.swap.method == "inplace" or (pool.swap.method == "auto" and pool.gpus == 0)
    if in_place and pool.slots is not None and pool.slots < len(config.groups(kind)):
        return "experts that are swapped in place"
    return None


def _blocking(args: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments that keep weights of a running engine from being exchanged."""
    yield from (name for name in _WEIGHTS if args.get(name))
    yield from (
        name for name in ("pipeline_parallel_size", "data_parallel_size") if args.get(name, 1) > 1
    )
    # Blocks outside the engine would answer for the weights that were swapped out.
    if args.get("kv_offloading_size"):
        yield "kv_offloading_size"
    draft = args.get("speculative_config")
    if draft and draft.get("method") not in ("ngram", "ngram_gpu", "suffix"):
        yield "speculative_config"


def kv_element_bytes(pool: PoolConfig, element_bytes: int) -> int:
    """Return the bytes of an element of the KV cache. Formats below a byte count as one."""
    given = pool.vllm.args.get("kv_cache_dtype", "auto")
    return element_bytes if given == "auto" else _WIDE.get(given, 1)


def loaded_bytes(pool: PoolConfig, info: ModelInfo, weight_bytes: int) -> int:
    """Return the bytes of a model's weights in an engine, of `weight_bytes` without quantisation.

    vLLM quantises matrices while it loads them, but not embeddings and the output layer, and in
    some formats only routed experts. Formats below a byte count as one.
    """
    form = pool.vllm.args.get("quantization", "")
    if not form.startswith(_ONLINE) or info.quantization is not None or not info.parameters:
        return weight_bytes
    element = weight_bytes / info.parameters
    matrices = sum(
        shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
        for name, shape in info.shapes.items()
        if len(shape) in (2, 3)
        and "embed" not in name
        and "lm_head" not in name
        and (".experts." in name or not form.startswith(_ONLY_ROUTED))
    )
    return round(weight_bytes - matrices * max(0.0, element - 1))


def offloaded_bytes(pool: PoolConfig, weight_bytes: int) -> int:
    """Return the bytes of an engine's weights that vLLM keeps in host memory instead of its GPUs.

    `cpu_offload_gb` counts GiB for each GPU.
    """
    if pool.gpus == 0:
        return 0
    given = float(pool.vllm.args.get("cpu_offload_gb", 0))
    return min(weight_bytes, round(given * _GIB) * pool.vllm.engine_gpus)


def kv_offload_bytes(pool: PoolConfig) -> int:
    """Return the bytes of host memory for blocks of an engine's KV cache."""
    return round(float(pool.vllm.args.get("kv_offloading_size", 0)) * _GIB)


def share_bytes(pool: PoolConfig) -> int | None:
    """Return the bytes of GPU memory that vLLM takes for one engine, or None where it is unknown.

    The GPUs of a replica have `memory_bytes` together.
    """
    share = pool.vllm.args.get("gpu_memory_utilization")
    if share is None or pool.gpus == 0 or pool.vllm.kv_cache_bytes is not None:
        return None
    return None if pool.memory_bytes is None else int(share * pool.memory_bytes)


def draft_bytes(
    pool: PoolConfig,
    kind: str,
    inspect_folder: Callable[[Path], ModelInfo | AdapterInfo],
    weights_of: Callable[[ModelInfo], int],
) -> int:
    """Return the bytes of the model that drafts tokens for an engine.

    Args:
        pool: The pool.
        kind: Its name in the config.
        inspect_folder: A function that reads a model's folder.
        weights_of: A function that computes the bytes of a model's weights in memory.

    Raises:
        ConfigError: The folder holds no model.
    """
    folder = pool.vllm.args.get("speculative_config", {}).get("model")
    if folder is None:
        return 0
    where = f"pools.{kind}.vllm.args.speculative_config.model"
    try:
        info = inspect_folder(Path(folder))
    except ModelStoreError as error:
        raise ConfigError(f"{where}: {error.message}") from None
    if not isinstance(info, ModelInfo):
        raise ConfigError(f"{where}: this folder holds an adapter, not a model")
    if info.needs_custom_code and not pool.vllm.trust_remote_code:
        raise ConfigError(f"{where}: this model brings its own code, which is not run")
    return weights_of(info)


def argument_warnings(config: Config, kind: str) -> Iterator[str]:
    """Yield a line for each argument that may not work as expected."""
    if "hf_overrides" in config.pools[kind].vllm.args:
        yield (
            f"pools.{kind}.vllm.args.hf_overrides: the memory plan and the checks of contexts read "
            "the models' config.json without these changes"
        )
