"""Small random models of a given architecture, for trials of an engine.

transformers makes them from the architecture's own config class. No code of a model folder runs.
Their tokens are the bytes and two more. Where a config has quantised weights, the matrices are
quantised (`quantised_weights`), and a second folder has the exact values that they stand for.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.doctor.quantised_weights import QuantizedForm, form_of

BOS, EOS = 256, 257
_VOCABULARY = 512
_CONTEXT = 1024
_MOST_LAYERS = 8
_NOISE = (1 << 20) + 7
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_DROPPED = ("auto_map", "_name_or_path", "transformers_version")
_SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
# Matrices that need larger random values: a gate should prefer some experts clearly.
_GATE_SCALE, _HEAD_SCALE = 3.0, 2.0

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


# The forms of weights that people run on small GPUs, as their config.json says it.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "channel",
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    },
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 128,
                    "symmetric": True,
                    "dynamic": False,
                },
            }
        },
    },
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The size of a random model: least width, layers, and the FFN's width over the model's."""

    hidden: int
    layers: int
    widening: int


SMALL = ModelSize(256, 2, 2)
# Large enough for bytes per second to mean something: about 0.1 GB in float32, 1 GB in bfloat16.
CPU_SIZE = ModelSize(512, 6, 4)
GPU_SIZE = ModelSize(2048, 8, 4)


def small_config(config: Mapping[str, Any], size: ModelSize, gpus: int = 1) -> dict[str, Any]:
    """Shrink a model's config. Heads keep their size, and layers their kinds. Pure.

    Args:
        config: The content of a `config.json`.
        size: The size to make.
        gpus: The number of GPUs that share the attention heads.

    Raises:
        ValueError: The config has no plain sizes of a decoder, or its weights are quantised in a
            form that this release does not make.
    """
    form = form_of(config)
    missing = [name for name in ("hidden_size", "num_attention_heads") if name not in config]
    if missing:
        raise ValueError(f"its config.json has no {missing[0]} at its top, as text decoders have")
    made = {name: value for name, value in config.items() if name not in _DROPPED}
    old_heads = int(config["num_attention_heads"])
    head_size = config.get("head_dim") or int(config["hidden_size"]) // old_heads
    heads = max(2, math.ceil(size.hidden / head_size))
    # Query heads that share a head of keys, as long as that leaves more than one such head.
    share = max(1, old_heads // int(config.get("num_key_value_heads") or old_heads))
    step = math.lcm(gpus, share) if share < heads else gpus
    if form is not None:
        # The sizes of all matrices go into whole groups of scales.
        step = math.lcm(step, form.multiple // math.gcd(form.multiple, int(head_size)))
        if share < heads:
            step = math.lcm(step, share * form.multiple // math.gcd(form.multiple, int(head_size)))
    heads = math.ceil(heads / step) * step
    hidden = heads * head_size
    made |= {
        **_SPECIAL,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _CONTEXT,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "num_hidden_layers": _layers(config, size.layers),
    }
    if config.get("num_key_value_heads") is not None:
        made["num_key_value_heads"] = max(1, heads // share)
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(config.get(name), int):
            made[name] = size.widening * hidden
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(config.get(name), int):
            made[name] = hidden
    for name in _EXPERTS:
        if isinstance(config.get(name), int):
            made[name] = min(8, config[name])
    if isinstance(config.get("layer_types"), list):
        made["layer_types"] = config["layer_types"][: made["num_hidden_layers"]]
    if isinstance(config.get("max_window_layers"), int):
        made["max_window_layers"] = min(config["max_window_layers"], made["num_hidden_layers"])
    return made


def _layers(config: Mapping[str, Any], least: int) -> int:
    """Return a number of layers that has every kind of layer, as far as a few layers can."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not kinds:
        return least
    needed = next(i for i in range(1, len(kinds) + 1) if {*kinds[:i]} == {*kinds})
    return min(len(kinds), _MOST_LAYERS, max(least, needed))


def write_random_model(folder: Path, config: Mapping[str, Any], dtype: str, seed: int) -> int:
    """Write a random model and its tokenizer to a new folder.

    Args:
        folder: The folder.
        config: The content of its `config.json`, as `small_config` makes it.
        dtype: The dtype of its weights.
        seed: Different seeds make different weights.

    Returns:
        The bytes of its weights.

    Raises:
        ValueError: transformers does not know the architecture, it has no such model, or its
            matrices do not go into the groups of its quantisation.
        OSError: The folder can't be written.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    form = form_of(config)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    for name in ("torch_dtype", "dtype", "quantization_config"):
        fields.pop(name, None)
    made = AutoConfig.for_model(config["model_type"], **fields)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed))
    tied = bool(config.get("tie_word_embeddings", False))
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # Matrices begin elsewhere in the same noise, because drawing a gigabyte takes long.
            scaled = noise.roll(number * 7919) * _scale(name, tuple(weight.shape), tied)
            times = -(-weight.numel() // _NOISE)
            weight.copy_(scaled.repeat(times)[: weight.numel()].view(weight.shape))
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    if form is not None:
        _quantise(folder, form, config["quantization_config"])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def exact_folder(folder: Path) -> Path:
    """Return the folder of the exact values of a model's weights, of which it may be the folder."""
    exact = folder.with_name(f"{folder.name}-exact")
    return exact if exact.is_dir() else folder


def _quantise(folder: Path, form: QuantizedForm, quantization: Mapping[str, Any]) -> None:
    """Quantise a model's files in place, and write their exact values to a folder beside it."""
    import torch
    from safetensors.torch import load_file, save_file

    exact = folder.with_name(f"{folder.name}-exact")
    shutil.copytree(folder, exact)
    found = False
    for file in sorted(folder.glob("*.safetensors")):
        stored: dict[str, torch.Tensor] = {}
        values: dict[str, torch.Tensor] = {}
        for name, weight in load_file(file).items():
            values[name] = weight.float()
            if form.takes(name, weight):
                found = True
                made, values[name] = form.quantise(name, weight)
                stored |= made
            else:
                stored[name] = weight
        save_file(stored, file, metadata={"format": "pt"})
        contiguous = {name: value.contiguous() for name, value in values.items()}
        save_file(contiguous, exact / file.name, metadata={"format": "pt"})
    if not found:
        raise ValueError("its layers have no matrices that could be quantised")
    for path in folder.glob("*.index.json"):
        path.unlink()  # it names the matrices of the unquantised model
    where = folder / "config.json"
    config = json.loads(where.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    where.write_text(json.dumps(config), encoding="utf-8")


def _scale(name: str, shape: tuple[int, ...], tied: bool) -> float:
    """Return the standard deviation of a matrix's random values."""
    plain = float(shape[-1] ** -0.5)
    if "embed" in name:
        return _HEAD_SCALE * plain if tied else 1.0
    if "lm_head" in name:
        return _HEAD_SCALE * plain
    return _GATE_SCALE * plain if name.endswith("gate.weight") else plain


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of which every byte is a token; 256 begins a text, and 257 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|start|>", "<|end|>"]
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(letters[-2:])
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
