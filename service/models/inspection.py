"""Owns looking at a model folder without loading it.

Reads `config.json` and the headers of the safetensors files: all that config
checks and memory planning ask for. Imports no torch, runs no code of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.tensorfile import DTYPE_BITS, TensorInfo, read_header

_INDEX = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}


@dataclass(frozen=True, slots=True)
class MoeInfo:
    """FFN experts of a mixture-of-experts model, in `groups` from which a gate chooses first."""

    experts: int
    experts_per_token: int
    expert_intermediate_size: int | None
    groups: int = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A folder of full weights, as its config and file headers describe it.

    `parameters` counts what is stored, so tied embeddings once. `dtype` is that
    of most stored elements. `family` is equal for two models exactly if a running engine of one
    can hold the other's weights: same architecture and sizes, same tensor
    names, shapes and dtypes, same quantisation.
    """

    path: Path
    architecture: str
    model_type: str
    dtype: str
    quantization: str | None
    parameters: int
    active_parameters: int
    weight_bytes: int
    max_context_tokens: int
    hidden_size: int
    intermediate_size: int | None
    layers: int
    attention_heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    tied_embeddings: bool
    moe: MoeInfo | None
    needs_custom_code: bool
    family: str

    @property
    def is_moe(self) -> bool:
        return self.moe is not None

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of key and value for one token of context, over all layers, unsharded."""
        return 2 * self.layers * self.kv_heads * self.head_size * element_bytes


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA adapter folder in PEFT's format."""

    path: Path
    base: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    parameters: int
    weight_bytes: int


def inspect_model(path: Path) -> ModelInfo | AdapterInfo:
    """What is in a model or adapter folder; `ModelStoreError` if it is not whole."""
    path = Path(path)
    if not path.is_dir():
        raise ModelStoreError(f"{path}: no such folder")
    if (path / _ADAPTER_CONFIG).is_file():
        return _inspect_adapter(path)
    if (path / "config.json").is_file():
        return _inspect_full(path)
    raise ModelStoreError(
        f"{path}: neither config.json (full weights) nor {_ADAPTER_CONFIG} (LoRA) in it"
    )


def _inspect_full(path: Path) -> ModelInfo:
    where = path / "config.json"
    config = _read_json(where)
    # Models that also see or hear keep the language model's sizes one level down.
    text = config.get("text_config")
    sizes: dict[str, Any] = {**config, **text} if isinstance(text, dict) else config
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelStoreError(f"{where}: 'architectures' is missing; it names the model's class")
    tensors = _read_weights(path)
    hidden_size = _integer(sizes, where, "hidden_size", "n_embd", "d_model")
    heads = _integer(sizes, where, "num_attention_heads", "n_head")
    layers = _integer(sizes, where, "num_hidden_layers", "n_layer")
    quantization = _quantization(config)
    moe = _moe(sizes)
    parameters = sum(_parameters(tensor) for tensor in tensors.values())
    return ModelInfo(
        path=path,
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        dtype=_main_dtype(tensors),
        quantization=quantization,
        parameters=parameters,
        active_parameters=_active_parameters(tensors, parameters, moe),
        weight_bytes=sum(tensor.data_bytes for tensor in tensors.values()),
        max_context_tokens=_integer(
            sizes, where, "max_position_embeddings", "n_positions", "max_seq_len"
        ),
        hidden_size=hidden_size,
        intermediate_size=_optional(sizes, "intermediate_size", "n_inner", "ffn_dim"),
        layers=layers,
        attention_heads=heads,
        kv_heads=_optional(sizes, "num_key_value_heads") or heads,
        head_size=_optional(sizes, "head_dim") or hidden_size // heads,
        vocab_size=_integer(sizes, where, "vocab_size"),
        tied_embeddings=bool(sizes.get("tie_word_embeddings", False)),
        moe=moe,
        needs_custom_code="auto_map" in config,
        family=_family(config, tensors, quantization),
    )


def _inspect_adapter(path: Path) -> AdapterInfo:
    where = path / _ADAPTER_CONFIG
    config = _read_json(where)
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelStoreError(
            f"{where}: peft_type {config['peft_type']!r} is not supported, only 'LORA'"
        )
    if not (path / _ADAPTER_WEIGHTS).is_file():
        raise ModelStoreError(f"{path}: {_ADAPTER_WEIGHTS} is missing")
    tensors = read_header(path / _ADAPTER_WEIGHTS)
    if not tensors:
        raise ModelStoreError(f"{path / _ADAPTER_WEIGHTS}: no tensors in it")
    rank = _integer(config, where, "r")
    for tensor in tensors.values():
        if ".lora_A." in tensor.name and tensor.shape[0] != rank:
            raise ModelStoreError(
                f"{path}: {tensor.name} has rank {tensor.shape[0]}, {_ADAPTER_CONFIG} says {rank}"
            )
    targets = config.get("target_modules") or ()
    return AdapterInfo(
        path=path,
        base=config.get("base_model_name_or_path"),
        rank=rank,
        alpha=float(config.get("lora_alpha", rank)),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        dtype=_main_dtype(tensors),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        weight_bytes=sum(tensor.data_bytes for tensor in tensors.values()),
    )


def _read_weights(path: Path) -> dict[str, TensorInfo]:
    if (path / _INDEX).is_file():
        weight_map = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelStoreError(f"{path / _INDEX}: 'weight_map' is missing")
        shards = sorted({str(shard) for shard in weight_map.values()})
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ModelStoreError(
                f"{path}: {len(missing)} of {len(shards)} weight files are missing, "
                f"first {missing[0]}"
            )
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            tensors.update(read_header(path / shard))
        absent = sorted(set(weight_map) - set(tensors))
        if absent:
            raise ModelStoreError(f"{path}: tensor {absent[0]!r} is in the index and in no file")
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            other = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
            hint = f" ({other[0]} can run code and is not loaded)" if other else ""
            raise ModelStoreError(f"{path}: no safetensors weights in it{hint}")
        tensors = {}
        for file in files:
            tensors.update(read_header(file))
    if not tensors:
        raise ModelStoreError(f"{path}: its safetensors files hold no tensors")
    return tensors


def _main_dtype(tensors: dict[str, TensorInfo]) -> str:
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += tensor.elements
    most = elements.most_common(1)[0][0]
    return _DTYPE_NAMES.get(most, most.lower())


def _parameters(tensor: TensorInfo) -> int:
    """Elements, with packed four-bit weights counted as what they stand for."""
    if tensor.name.endswith((".qweight", ".weight_packed")) and tensor.dtype in {"I32", "U8"}:
        return tensor.elements * DTYPE_BITS[tensor.dtype] // 4
    if tensor.name.endswith((".scales", ".qzeros", ".g_idx", "_scale", "_shape", "_scale_inv")):
        return 0
    return tensor.elements


def _active_parameters(tensors: dict[str, TensorInfo], parameters: int, moe: MoeInfo | None) -> int:
    """Parameters that one token passes through: all but the FFN experts not chosen for it."""
    if moe is None:
        return parameters
    in_experts = sum(
        _parameters(tensor) for tensor in tensors.values() if ".experts." in tensor.name
    )
    return parameters - in_experts + in_experts * moe.experts_per_token // moe.experts


def _moe(sizes: dict[str, Any]) -> MoeInfo | None:
    experts = _optional(
        sizes, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    )
    if experts is None or experts < 2:
        return None
    return MoeInfo(
        experts=experts,
        experts_per_token=_optional(sizes, "num_experts_per_tok", "num_experts_per_token", "top_k")
        or 1,
        expert_intermediate_size=_optional(sizes, "moe_intermediate_size", "intermediate_size"),
        groups=_optional(sizes, "n_group") or 1,
    )


def _quantization(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    return str(found.get("quant_method", "unknown"))


_NOT_OF_THE_FAMILY = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "_model_name_or_path"}
)
"""Config keys that an engine does not build its layers from."""


def _family(
    config: dict[str, Any], tensors: dict[str, TensorInfo], quantization: str | None
) -> str:
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_FAMILY}
    digest.update(json.dumps([kept, quantization], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\n".encode())
    return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelStoreError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelStoreError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelStoreError(f"{path}: must hold a JSON object")
    return data


def _optional(sizes: dict[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = sizes.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return int(value)
    return None


def _integer(sizes: dict[str, Any], where: Path, *keys: str) -> int:
    value = _optional(sizes, *keys)
    if value is None or value < 1:
        raise ModelStoreError(f"{where}: {keys[0]!r} is missing or not a positive number")
    return value
