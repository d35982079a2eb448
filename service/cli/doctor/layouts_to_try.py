"""What `coe doctor` tries: the layouts of the weights of a config's experts, or a default one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.doctor.random_models import LLAMA, MIXTRAL, QUANTIZATIONS
from service.config import Config, VllmOptions
from service.engine.swap_proof import WeightLayout
from service.errors import CoeError
from service.models import ModelInfo, inspect_model
from service.models.expert_folders import folder_here
from service.models.model_config import read_json
from service.models.quantization_form import quantization_form
from service.pool.swap_method import layout_of

_KV_BYTES = 256 * 1024**2
_CONTEXT = 512
# vLLM's arguments that change kernels or the layout of weights. Others do not matter here.
_KEPT_ARGUMENTS = frozenset(
    {"quantization", "kv_cache_dtype", "attention_backend", "block_size", "compilation_config"}
    | {"pipeline_parallel_size", "data_parallel_size", "cudagraph_mode", "enable_prefix_caching"}
)


@dataclass(frozen=True, slots=True)
class TrialSubject:
    """One layout to try.

    Attributes:
        layout: The layout.
        config: The `config.json` of a model of this layout.
        moe_config: The same for steering, of a mixture of experts.
        options: The engine's options.
        on_cpu: Whether the engine computes on the CPU.
    """

    layout: WeightLayout
    config: Mapping[str, Any]
    moe_config: Mapping[str, Any]
    options: VllmOptions
    on_cpu: bool


def default_subject(on_gpu: bool, form: str | None = None) -> TrialSubject:
    """Return a Llama in the usual dtype of a CPU or of a GPU.

    Args:
        on_gpu: Whether its engines compute on a GPU.
        form: A form of quantised weights, one of `QUANTIZATIONS`.
    """
    # Kernels of quantised weights take no activations in float32.
    dtype = "bfloat16" if on_gpu or form is not None else "float32"
    options = VllmOptions(dtype=dtype, enforce_eager=not on_gpu)
    config = LLAMA if form is None else {**LLAMA, "quantization_config": QUANTIZATIONS[form]}
    layout = WeightLayout(
        "LlamaForCausalLM",
        options.dtype,
        quantization_form(config) or "none",
        eager=not on_gpu,
        gpus=int(on_gpu),
    )
    return TrialSubject(layout, config, MIXTRAL, trial_options(options), not on_gpu)


def subjects_of(config: Config) -> tuple[list[TrialSubject], list[str]]:
    """Find the distinct layouts of a config's experts.

    Returns:
        The subjects, and a line for each expert whose weights can't be read.
    """
    found: dict[tuple[WeightLayout, bool], TrialSubject] = {}
    unread = []
    for kind, pool in config.pools.items():
        if pool.engine != "vllm":
            continue
        for (name, *_), *_ in config.groups(kind):
            try:
                path = folder_here(config, name)
                info = inspect_model(path) if path is not None else None
                own = read_json(Path(path) / "config.json") if path is not None else {}
            except CoeError as error:
                unread.append(f"expert {name}: {error.message}")
                continue
            if not isinstance(info, ModelInfo):
                unread.append(f"expert {name}: its weights are not on this machine yet")
                continue
            options = config.vllm_of(kind, name)
            layout = layout_of(info, options, pool.gpus)
            on_cpu = pool.gpus == 0
            if (layout, on_cpu) not in found:
                moe = own if info.is_moe and info.quantization is None else MIXTRAL
                found[layout, on_cpu] = TrialSubject(
                    layout, own, moe, trial_options(options), on_cpu
                )
    return list(found.values()), unread


def trial_options(options: VllmOptions) -> VllmOptions:
    """Return a pool's options for a trial: the same kernels, and a small engine."""
    kept = {name: value for name, value in options.args.items() if name in _KEPT_ARGUMENTS}
    return options.model_copy(
        update={
            "max_model_len": _CONTEXT,
            "kv_cache_bytes": _KV_BYTES,
            "max_num_seqs": 8,
            "moe_capture": None,
            "expert_offload": None,
            "tool_call_parser": None,
            "reasoning_parser": None,
            "media_domains": (),
            "trust_remote_code": False,
            "args": kept,
        }
    )
