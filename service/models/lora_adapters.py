"""LoRA adapters in PEFT's format: inspects their folders, and checks what engines can serve."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.model_config import integer, read_json
from service.models.safetensors_headers import TensorInfo, main_dtype, read_header

CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The variants of PEFT that neither vLLM nor a merge can serve, with their meanings.
_UNSERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that were trained whole, beside the adapter",
    "lora_bias": "a bias beside the adapter",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "a base with repeated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "tokens that were trained beside the adapter",
}
# Initialisations that keep the base's weights. The others (PiSSA, OLoRA, CorDA, LoftQ) need a
# different base from the base on disk.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# Keys that vLLM serves correctly beside the base, and that a merge does not support.
FOLLOWED = ("rank_pattern", "alpha_pattern", "fan_in_fan_out")
# Keys that do not change the effect of a saved adapter, such as its author and its training.
_NEUTRAL = frozenset(
    {
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>A\.weight|B\.weight|embedding_A|embedding_B)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(?P<layer>\d+)\.")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA adapter folder in PEFT's format.

    Attributes:
        rank: The largest rank of its modules.
        shapes: By module, the (rows, columns) of the weight that the module adds to.
        not_merged: The keys of its config that `form: merged` does not support.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    parameters: int
    weight_bytes: int
    not_merged: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)


def inspect_adapter(path: Path) -> AdapterInfo:
    """Inspect an adapter's folder.

    Raises:
        ModelStoreError: No engine could serve the adapter.
    """
    where = path / CONFIG_NAME
    config = read_json(where)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelStoreError(f"{where}: peft_type {kind!r} is not supported, only 'LORA'")
    refuse_variants(config, where)
    if not (path / _WEIGHTS_NAME).is_file():
        raise ModelStoreError(f"{path}: {_WEIGHTS_NAME} is missing")
    tensors = read_header(path / _WEIGHTS_NAME)
    if not tensors:
        raise ModelStoreError(f"{path / _WEIGHTS_NAME}: no tensors in it")
    rank = integer(config, where, "r")
    ranks = _pattern_ranks(config, where)
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 2**53:
        raise ModelStoreError(f"{where}: 'lora_alpha' is missing or not a number")
    targets = config.get("target_modules")
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelStoreError(f"{where}: 'target_modules' is missing or not a list of names")
    base = config.get("base_model_name_or_path")
    return AdapterInfo(
        path=path,
        base=base if isinstance(base, str) else None,
        rank=max(rank, *ranks) if ranks else rank,
        alpha=float(alpha),
        target_modules=tuple(sorted(targets)),
        dtype=main_dtype(tensors),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        weight_bytes=sum(tensor.data_bytes for tensor in tensors.values()),
        not_merged=keys_not_merged(config),
        shapes=_shapes(path, tensors, {rank, *ranks}),
    )


def find_misfit(adapter: AdapterInfo, base: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why an adapter does not fit a base with weights of these shapes, or None.

    Weights are matched by name. If a multimodal model has other prefixes, they are matched by the
    part from the layer on. Modules without any weight in the base are left to the engine, because
    architectures fuse and rename some.
    """
    by_tail: dict[str, set[tuple[int, ...]]] = {}
    layers = -1
    for name, shape in base.items():
        if (found := _LAYER.search(name)) is not None:
            layers = max(layers, int(found["layer"]))
            by_tail.setdefault(name[found.start() :].lstrip("."), set()).add(shape)
    for module, shape in adapter.shapes.items():
        found = _LAYER.search(module)
        if found is not None and int(found["layer"]) > layers >= 0:
            return f"it changes {module}, and the base has {layers + 1} layers"
        weight = module + ".weight"
        tail = weight[found.start() :].lstrip(".") if found is not None else weight
        shapes = {base[weight]} if weight in base else by_tail.get(tail, set())
        # Some architectures keep their weights as (columns, rows).
        if shapes and not shapes & {shape, shape[::-1]}:
            has = " or ".join(_shape(item) for item in sorted(shapes))
            return f"it changes {module} of {_shape(shape)}, and the base's has {has}"
    return None


def name_another_base(adapter: AdapterInfo, source: str) -> str | None:
    """Return the adapter's own base if both are names of the hub and differ.

    The owner is not compared, because the hub has many copies of models.
    """
    named = adapter.base
    if named is None or named.count("/") != 1 or source.count("/") != 1:
        return None
    if named.startswith((".", "/", "~")) or source.startswith((".", "/", "~")):
        return None
    of_adapter = named.split("/")[1].lower()
    of_base = source.partition("@")[0].split("/")[1].lower()
    return named if of_adapter != of_base else None


def keys_not_merged(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return keys of an adapter's config that merging does not support.

    A key of a newer PEFT may change the arithmetic, which merging computes itself.
    """
    known = _NEUTRAL | _UNSERVED.keys()
    return tuple(name for name in config if config[name] and name not in known)


def refuse_variants(config: Mapping[str, Any], where: Path) -> None:
    """Check that an adapter computes plain LoRA.

    Raises:
        ModelStoreError: The adapter is of another variant.
    """
    for key, meaning in _UNSERVED.items():
        if config.get(key):
            raise ModelStoreError(f"{where}: {key} ({meaning}) can't be served; only plain LoRA")
    if config.get("bias", "none") not in (None, "none"):
        raise ModelStoreError(
            f"{where}: bias {config['bias']!r} can't be served: adapters are without, 'none'"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise ModelStoreError(
            f"{where}: init_lora_weights {init!r} changes the base's weights, too; convert it to a "
            "plain adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _pattern_ranks(config: dict[str, Any], where: Path) -> list[int]:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise ModelStoreError(f"{where}: 'rank_pattern' is not an object")
    for name, rank in pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ModelStoreError(f"{where}: rank_pattern of {name!r} is not a positive number")
    return list(pattern.values())


def _shapes(
    path: Path, tensors: Mapping[str, TensorInfo], ranks: set[int]
) -> dict[str, tuple[int, int]]:
    """Return the (rows, columns) of each module's weight, from the two halves of the adapter.

    Raises:
        ModelStoreError: The halves do not fit together.
    """
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if ".base_layer." in name:
            continue  # this is the base's own weight, which was saved with the adapter
        match = _HALF.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ModelStoreError(f"{path}: tensor {name!r} is not a half of a LoRA adapter")
        if len(tensor.shape) != 2:
            raise ModelStoreError(f"{path}: tensor {name!r} is not a matrix")
        half = match["half"].removesuffix(".weight").removeprefix("embedding_")
        halves.setdefault(match["module"], {})[half] = tensor.shape
    shapes = {}
    for module, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise ModelStoreError(f"{path}: {module} has one half of an adapter only")
        (rank, columns), (rows, other) = pair["A"], pair["B"]
        if ".experts." in f".{module}." and rank == other:
            continue  # it covers all routed experts of a layer in other shapes, which vLLM checks
        if rank != other or rank not in ranks:
            allowed = ", ".join(map(str, sorted(ranks)))
            raise ModelStoreError(
                f"{path}: {module} has rank {rank if rank == other else f'{rank} and {other}'}, "
                f"{CONFIG_NAME} says {allowed}"
            )
        shapes[module] = (rows, columns)
    return shapes


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
