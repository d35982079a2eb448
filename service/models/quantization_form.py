"""The form of quantised weights, as a `config.json` describes it. Pure.

Two models of one form have the same layers, kernels and layout of weights. Fields that describe how
the weights were found, or by which program, are no part of the form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Fields of `quantization_config` that say how weights were made, by all methods.
_HOW = frozenset(
    {"version", "quantization_status", "global_compression_ratio", "dataset", "tokenizer"}
    | {"batch_size", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups"}
    | {"meta", "quantizer", "model_name_or_path", "model_file_base_name", "model_seqlen"}
    | {"pad_token_id", "module_name_preceding_first_block", "use_cuda_fp16", "max_input_length"}
    | {"cache_block_outputs", "exllama_config", "use_exllama", "disable_exllama", "do_fuse"}
    | {"fuse_max_seq_len", "modules_to_fuse", "iters", "nsamples", "seqlen", "lr", "minmax_lr"}
    | {"enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage"}
    | {"gradient_accumulate_steps"}
    | {"block_name_to_quantize", "autoround_version", "observer", "observer_kwargs", "amp"}
)
# For AWQ, `version` is the layout of the packed weights.
_ALWAYS = {"awq": frozenset({"version"})}


def quantization_facts(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what kernels and layouts follow from in a config's quantisation; None without one."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return None
    method = str(given.get("quant_method", "unknown"))
    kept = _kept(given, _HOW - _ALWAYS.get(method, frozenset()))
    return {**kept, "quant_method": method}


def quantization_form(config: Mapping[str, Any]) -> str | None:
    """Return a short name of a form, the same for equal forms and no others; None without one."""
    facts = quantization_facts(config)
    if facts is None:
        return None
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]
    bits, group = facts.get("bits"), facts.get("group_size", facts.get("q_group_size"))
    parts = [facts["quant_method"]]
    if isinstance(bits, int):
        parts.append(f"{bits} bits")
    if isinstance(group, int):
        parts.append(f"groups of {group}" if group > 0 else "whole rows")
    if isinstance(facts.get("weight_block_size"), list):
        parts.append("blocks")
    if isinstance(facts.get("format"), str):
        parts.append(facts["format"])
    return f"{', '.join(parts)} ({digest})"


def _kept(value: Any, dropped: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _kept(item, dropped)
            for name, item in value.items()
            if name not in dropped and item is not None
        }
    if isinstance(value, list | tuple):
        return [_kept(item, dropped) for item in value]
    return value
