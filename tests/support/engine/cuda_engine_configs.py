"""`python -m tests.support.engine.cuda_engine_configs FOLDER`: engine configs of shipped configs.

For each engine of each shipped config with GPUs, one line of JSON: what vLLM makes of the arguments
that its pool would start it with, on the GPU that PRETENDED_GPU names. Model folders hold a
`config.json` with the sizes of the public model, and no weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.engine import cuda_platform  # isort: skip  # before anything of vLLM

import torch
import transformers
import vllm.config.vllm
from vllm.engine.arg_utils import AsyncEngineArgs

from service.config import Config, load_config
from service.engine.gpu_share import GpuShare
from service.engine.vllm import async_llm_handle as handle
from service.pool.gpu_memory_plan import gpu_groups, utilization
from service.pool.memory_plan import slots_of

ROOT = Path(__file__).parents[3]
SHIPPED = ("gpu-24gb.yaml", "node-8x80gb.yaml", "compose-gpu.yaml")
_MISTRAL = {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768}
# The sizes that each model's publisher states in its config.json.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "microsoft/Phi-3-mini-4k-instruct": (
        "Phi3",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "vocab_size": 32064,
        },
    ),
    "mistralai/Mathstral-7B-v0.1": ("Mistral", {**_MISTRAL, "vocab_size": 32768}),
    "mistralai/Mistral-7B-Instruct-v0.2": ("Mistral", {**_MISTRAL, "sliding_window": None}),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("Mixtral", {**_MISTRAL, "num_local_experts": 8}),
    "01-ai/Yi-6B-Chat": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 11008,
            "vocab_size": 64000,
            "max_position_embeddings": 4096,
        },
    ),
    "smollm2-135m-instruct": (
        "Llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
        },
    ),
}
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_BYTES = json.loads((ROOT / "router_models/artifacts/public@1/sizes.json").read_text())


def _folder(root: Path, model: str) -> Path:
    folder = root / model.replace("/", "--")
    if not folder.exists():
        name, changes = MODELS[model]
        made = getattr(transformers, f"{name}Config")(**{**_SIZES, **changes})
        made.architectures = [f"{name}ForCausalLM"]
        made.dtype = torch.bfloat16
        made.save_pretrained(folder)
    return folder


def _engine(config: Config, kind: str, expert: str, root: Path) -> dict[str, Any]:
    """The facts of one engine's config that a pool would start on this GPU."""
    pool = config.pools[kind]
    slots = slots_of(config, kind)
    groups = gpu_groups(pool, slots)
    weights = _BYTES.get(expert, 300_000_000) // pool.vllm.engine_gpus
    card_bytes = cuda_platform.MEMORY_MIB << 20
    share = utilization(pool, weights, -(-slots // len(groups)), 0, card_bytes)
    settings = handle.LaunchSettings(
        model=str(_folder(root, str(config.experts[expert].model))),
        served_name=expert,
        options=config.vllm_of(kind, expert),
        on_cpu=False,
        enforce_eager=True,  # compiling names kernels that are not here
        sleep=pool.swap.method == "sleep",
        gpu_share=GpuShare(share, groups[0] if len(groups) > 1 else ()),
    )
    made = AsyncEngineArgs.from_cli_args(handle._frontend_args(settings)).create_engine_config()
    return {
        "device": made.device_config.device_type,
        "tensor_parallel_size": made.parallel_config.tensor_parallel_size,
        "share": made.cache_config.gpu_memory_utilization,
        "weights_fit": weights < share * card_bytes,
        "sleeps": made.model_config.enable_sleep_mode,
        "second_runner": made.use_v2_model_runner,
        "max_model_len": made.model_config.max_model_len,
    }


def main() -> None:
    """Print a line for each engine; one that fails is a line with the reason."""
    vllm.config.vllm.HAS_TRITON = True  # as in the CUDA build
    root = Path(sys.argv[1])
    for name in SHIPPED:
        config = load_config(ROOT / "deploy" / "config" / name)
        for kind, pool in config.pools.items():
            if pool.gpus == 0:
                continue
            for unit in config.units(kind):
                told: dict[str, Any] = {"config": name, "pool": kind, "expert": unit[0]}
                try:
                    told |= _engine(config, kind, unit[0], root)
                except Exception as error:
                    told["failed"] = f"{type(error).__name__}: {error}"[:500]
                print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
