"""Inspects a model folder without loading it.

It reads `config.json` and the headers of the safetensors files, which is enough for config checks
and memory planning. It runs no code of the model. It imports torch only if a config leaves sizes to
its architecture's defaults.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.lora_adapters import CONFIG_NAME as ADAPTER_CONFIG
from service.models.lora_adapters import AdapterInfo, inspect_adapter
from service.models.model_config import (
    CONTEXT,
    HEADS,
    HIDDEN_SIZE,
    LAYERS,
    VOCABULARY,
    KvLayout,
    integer,
    kv_layout,
    language_sizes,
    optional_integer,
    read_json,
)
from service.models.quantization_form import quantization_facts, quantization_form
from service.models.safetensors_headers import DTYPE_BITS, TensorInfo, main_dtype, read_header
from service.models.tokenizer_files import has_chat_template, has_tokenizer

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")


@dataclass(frozen=True, slots=True)
class MoeInfo:
    """The FFN experts of a mixture of experts. A gate may first choose among `groups` of them."""

    experts: int
    experts_per_token: int
    expert_intermediate_size: int | None
    groups: int = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A folder of full weights, as its config and file headers describe it.

    `parameters` counts stored elements, so tied embeddings count once. `dtype` is the dtype of most
    stored elements. Two models have the same `family` exactly if an engine of either model can hold
    the other's weights. They then have the same architecture and sizes, the same tensor names,
    shapes and dtypes as an engine loads them, and the same form of quantisation.
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
    has_tokenizer: bool = True
    has_chat_template: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Tensor → its shape, as stored."""
    second_copies: tuple[str, ...] = ()
    """Files with the same weights once more, which an engine would read, as no index forbids it."""
    kv: KvLayout | None = None
    quantization_form: str | None = None
    """The method with its bits, groups and exceptions, where weights are stored quantised."""
    compute_dtype: str = ""
    """The dtype that layers compute in where nothing else is said."""
    changed_layer_bytes: int = 0
    """Stored bytes of the largest layer that vLLM changes after loading; 0 if it changes none."""

    @property
    def is_moe(self) -> bool:
        return self.moe is not None

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Return the bytes of keys and values for one token of context, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * element_bytes

    def least_kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Return the least bytes of the KV cache for a request. Layers with a window need less."""
        if self.kv is None:
            return tokens * self.kv_bytes_per_token(element_bytes)
        return self.kv.least_bytes(tokens, element_bytes)


def inspect_model(path: Path) -> ModelInfo | AdapterInfo:
    """Inspect a model or adapter folder.

    Raises:
        ModelStoreError: The folder is incomplete.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelStoreError(f"{path}: no such folder")
    if (path / ADAPTER_CONFIG).is_file():
        return inspect_adapter(path)
    if (path / "config.json").is_file():
        return _inspect_full(path)
    hint = ""
    if (snapshot := hub_snapshot(path)) is not None:
        hint = f"; it is the hub client's folder of a model, whose files are in {snapshot}"
    elif any(path.glob("models--*")):
        hint = "; it is the hub client's cache: name one model's folder in it, models--ORG--NAME"
    raise ModelStoreError(
        f"{path}: neither config.json (full weights) nor {ADAPTER_CONFIG} (LoRA) in it{hint}"
    )


def hub_snapshot(path: Path) -> Path | None:
    """Return the snapshot of a model's folder in the hub client's cache, or None.

    The folder holds `blobs`, `refs` and `snapshots/<commit>`. The snapshot is the commit that
    `refs/main` names, or else the only one.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return None
    try:
        main = snapshots / (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        found = [item for item in snapshots.iterdir() if item.is_dir()]
        return found[0] if len(found) == 1 else None
    return main if main.parent == snapshots and main.is_dir() else None


def _inspect_full(path: Path) -> ModelInfo:
    where = path / "config.json"
    config = read_json(where)
    sizes = language_sizes(config)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelStoreError(f"{where}: 'architectures' is missing; it names the model's class")
    tensors = _read_weights(path)
    hidden_size = integer(sizes, where, *HIDDEN_SIZE)
    heads = integer(sizes, where, *HEADS)
    layers = integer(sizes, where, *LAYERS)
    kv_heads = optional_integer(sizes, "num_key_value_heads") or heads
    head_size = optional_integer(sizes, "head_dim") or hidden_size // heads
    quantization = _quantization(config)
    moe = _moe(sizes)
    parameters = sum(_parameters(tensor) for tensor in tensors.values())
    return ModelInfo(
        path=path,
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        dtype=main_dtype(tensors),
        quantization=quantization,
        parameters=parameters,
        active_parameters=_active_parameters(tensors, parameters, moe),
        weight_bytes=sum(tensor.data_bytes for tensor in tensors.values()),
        max_context_tokens=integer(sizes, where, *CONTEXT),
        hidden_size=hidden_size,
        intermediate_size=optional_integer(sizes, "intermediate_size", "n_inner", "ffn_dim"),
        layers=layers,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=integer(sizes, where, *VOCABULARY),
        tied_embeddings=bool(sizes.get("tie_word_embeddings", False)),
        moe=moe,
        needs_custom_code="auto_map" in config,
        family=_family(config, tensors, quantization),
        has_tokenizer=has_tokenizer(path),
        has_chat_template=has_chat_template(path),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        second_copies=_second_copies(path),
        kv=kv_layout(sizes, layers, kv_heads, head_size),
        quantization_form=quantization_form(config),
        compute_dtype=_compute_dtype(config, sizes, tensors, quantization),
        changed_layer_bytes=_changed_layer_bytes(tensors.values(), quantization is not None),
    )


def _changed_layer_bytes(tensors: Iterable[TensorInfo], is_quantised: bool) -> int:
    """Return the bytes of the largest layer whose weights vLLM changes after it has loaded them.

    These are the routed experts of one layer together, and quantised matrices. vLLM joins some of
    the matrices that have one parent (queries, keys and values), so that all of these count as one
    layer.
    """
    layers: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {}
    changed: set[tuple[str, ...]] = set()
    for tensor in tensors:
        *module, value = tensor.name.split(".")
        where = tuple(module)
        if routed := "experts" in where:
            where = where[: where.index("experts") + 1]
        parts = layers.setdefault(where[:-1], {})
        parts[where] = parts.get(where, 0) + tensor.data_bytes
        if routed or (is_quantised and value not in ("weight", "bias")):
            changed.add(where)
    return max(
        (sum(size for part, size in parts.items() if part in changed) for parts in layers.values()),
        default=0,
    )


def _read_weights(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of full weights in the files that an engine loads."""
    if (path / _INDEX).is_file():
        weight_map = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelStoreError(f"{path / _INDEX}: 'weight_map' is missing or empty")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelStoreError(f"{path / _INDEX}: {shard!r} is no file name")
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
        files = _weight_files(path)
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


def _second_copies(path: Path) -> tuple[str, ...]:
    if (path / _INDEX).is_file():
        return ()
    used = set(_weight_files(path))
    return tuple(file.name for file in sorted(path.glob("*.safetensors")) if file not in used)


def is_second_copy(name: str, names: Collection[str]) -> bool:
    """Return whether this file is a second copy of weights that other files hold.

    Mistral's repositories have copies named `consolidated*`, with other tensor names.
    """
    if not (name.startswith("consolidated") and name.endswith((".safetensors", ".index.json"))):
        return False
    return any(
        other.endswith(".safetensors") and not other.startswith("consolidated") for other in names
    )


def _weight_files(path: Path) -> list[Path]:
    """Return the files that hold each weight once, without an index.

    Repositories may hold a second copy beside the shards: Mistral's `consolidated*`, whose tensors
    have other names, or a single `model.safetensors`.

    Raises:
        ModelStoreError: There are no weights, or the files do not form one model.
    """
    found = sorted(path.glob("*.safetensors"))
    names = [file.name for file in found]
    files = [file for file in found if not is_second_copy(file.name, names)]
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    for file in files:
        if (match := _SHARD.fullmatch(file.name)) is not None:
            set_of = (match["stem"], int(match["count"]))
            shards.setdefault(set_of, {})[int(match["number"])] = file
    if not shards:
        return files
    if len(shards) > 1:
        sets = ", ".join(sorted(f"{stem} in {count} parts" for stem, count in shards))
        raise ModelStoreError(f"{path}: several sets of shards and no {_INDEX}: {sets}")
    (((stem, count), numbered),) = shards.items()
    missing = [number for number in range(1, min(count, 10_000) + 1) if number not in numbered]
    if missing:
        raise ModelStoreError(
            f"{path}: {len(missing)} of {count} weight files are missing, "
            f"first {stem}-{missing[0]:05d}-of-{count:05d}.safetensors"
        )
    return list(numbered.values())


def _parameters(tensor: TensorInfo) -> int:
    """Return the number of elements. Packed four-bit weights count unpacked."""
    if tensor.name.endswith((".qweight", ".weight_packed")) and tensor.dtype in {"I32", "U8"}:
        return tensor.elements * DTYPE_BITS[tensor.dtype] // 4
    if tensor.name.endswith((".scales", ".qzeros", ".g_idx", "_scale", "_shape", "_scale_inv")):
        return 0
    return tensor.elements


def _active_parameters(tensors: dict[str, TensorInfo], parameters: int, moe: MoeInfo | None) -> int:
    """Return the parameters that one token uses: all except the FFN experts not chosen for it."""
    if moe is None:
        return parameters
    in_experts = sum(
        _parameters(tensor) for tensor in tensors.values() if ".experts." in tensor.name
    )
    return parameters - in_experts + in_experts * moe.experts_per_token // moe.experts


def _moe(sizes: dict[str, Any]) -> MoeInfo | None:
    experts = optional_integer(
        sizes, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    )
    if experts is None or experts < 2:
        return None
    return MoeInfo(
        experts=experts,
        experts_per_token=optional_integer(
            sizes, "num_experts_per_tok", "num_experts_per_token", "top_k"
        )
        or 1,
        expert_intermediate_size=optional_integer(
            sizes, "moe_intermediate_size", "intermediate_size"
        ),
        groups=optional_integer(sizes, "n_group") or 1,
    )


def _quantization(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    return str(found.get("quant_method", "unknown"))


def _compute_dtype(
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    quantization: str | None,
) -> str:
    """Return the dtype of activations: that of the weights, unless they are quantised."""
    stored = main_dtype(tensors)
    if quantization is None:
        return stored
    for given in (config, sizes):
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := given.get(key), str):
                return name
    return stored


_NOT_OF_THE_FAMILY = frozenset(
    {"quantization_config"}
    | {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "_model_name_or_path"}
)
"""Config keys that an engine does not build its layers from, or that count in another form."""
# vLLM does not load the order of GPTQ's columns.
_NEVER_LOADED = (".g_idx",)


def _family(
    config: dict[str, Any], tensors: dict[str, TensorInfo], quantization: str | None
) -> str:
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_FAMILY}
    facts = quantization_facts(config) if quantization is not None else None
    digest.update(json.dumps([kept, facts], sort_keys=True).encode())
    for name in sorted(tensors):
        if quantization is not None and name.endswith(_NEVER_LOADED):
            continue
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\n".encode())
    return digest.hexdigest()[:16]
