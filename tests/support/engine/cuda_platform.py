"""vLLM's CUDA classes without a GPU, from the CPU build of vLLM. For a process of its own.

It is imported before anything of vLLM. Models are then built and loaded as for a GPU (layers,
attention backend, loaders), in the CPU's memory. Nothing can be computed that needs a kernel.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.engine.cuda_cards import CARDS

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Compiled parts that the CPU build lacks. They are named by imports, and never called here.
for _name in (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
):
    sys.modules[_name] = types.ModuleType(_name)
_OPS = torch.library.Library("_C", "FRAGMENT")


def _at_least(least: int) -> Callable[[int], bool]:
    def supports(capability: int) -> bool:
        return capability >= least

    return supports


# By operation, the least capability of a GPU that has it.
for _name, _least in {
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_fp4": 100,
    "cutlass_group_gemm_supported": 90,
}.items():
    _OPS.define(f"{_name}(int c) -> bool")
    _OPS.impl(_name, _at_least(_least), "CompositeExplicitAutograd")
for _name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "mul_and_silu"):
    _OPS.define(f"{_name}(Tensor! out, Tensor x) -> ()")


def _repacked(
    packed: torch.Tensor, size_k: int, size_n: int, bits: int, is_8bit: bool
) -> torch.Tensor:
    """In place of Marlin's kernel: its shape, and every value of the input elsewhere."""
    return packed.flatten().flip(0).reshape(size_k // 16, size_n * bits // 2)


def _prepacked(packed: torch.Tensor, *_: object) -> torch.Tensor:
    """In place of Machete's kernel, whose output has the strides of its input."""
    return packed.flip(0)


for _name in ("gptq_marlin_repack", "awq_marlin_repack"):
    _OPS.define(f"{_name}(Tensor w, SymInt k, SymInt n, int bits, bool is_8bit) -> Tensor")
    _OPS.impl(_name, _repacked, "CompositeExplicitAutograd")
_OPS.define(
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type_id, ScalarType? s_type) -> Tensor"
)
_OPS.impl("machete_prepack_B", _prepacked, "CompositeExplicitAutograd")

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import NonNvmlCudaPlatform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402

CARD = os.environ.get("PRETENDED_GPU", "NVIDIA H200")
_CAPABILITY, MEMORY_MIB = CARDS[CARD]
_FACTS: dict[str, Callable[..., Any]] = {
    "get_device_capability": lambda cls, device_id=0: DeviceCapability(*_CAPABILITY),
    "get_device_name": lambda cls, device_id=0: CARD,
    "get_device_total_memory": lambda cls, device_id=0: MEMORY_MIB * 2**20,
    "is_fully_connected": lambda cls, ids: True,
    "device_count": lambda cls: 8,
    "is_cumem_allocator_available": lambda cls: True,
}
for _name, _fact in _FACTS.items():
    setattr(NonNvmlCudaPlatform, _name, classmethod(_fact))
vllm.platforms._current_platform = NonNvmlCudaPlatform()

from vllm import _custom_ops  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402


def _quantised(weight: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the kernel that quantises weights while they are loaded."""
    return weight.to(torch.float8_e4m3fn), torch.ones(1)


_custom_ops.scaled_fp8_quant = _quantised
_ready = False


def engine_config(folder: Path, **more: Any) -> Any:
    """An engine's whole config. It is eager, because compiling names kernels that are not here."""
    plain = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
    plain |= {"kv_cache_memory_bytes": 2**30, "load_format": "safetensors"}
    return AsyncEngineArgs(model=str(folder), **{**plain, **more}).create_engine_config()


def loaded_model(config: Any, rendezvous: Path) -> Any:
    """The model as vLLM's own loader makes it for a GPU, in the CPU's memory."""
    global _ready
    from vllm.model_executor.model_loader import get_model_loader

    torch.accelerator.empty_cache = lambda *_: None
    torch.accelerator.max_memory_allocated = lambda *_: 0
    config.load_config.device = "cpu"
    with set_current_vllm_config(config):
        if not _ready:
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel(1, 1, backend="gloo")
            _ready = True
        loader = get_model_loader(config.load_config)
        return loader.load_model(vllm_config=config, model_config=config.model_config)
