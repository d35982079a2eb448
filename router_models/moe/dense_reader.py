"""Reads dense models for a mixture, and reports why a model can't be joined.

An expert is a LoRA folder (merged by the service's own arithmetic) or a folder of full weights of
the base's family. A mixture that was made here reads as its own base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from router_models.moe.gate_fit import Statistics
from router_models.moe.gate_fit import read as read_statistics
from service.errors import ArtifactError, CoeError
from service.models import AdapterInfo, inspect_model
from service.models.lora_merge import LoraDelta
from service.models.model_store import MANIFEST, read_manifest

STATISTICS = Path("upcycle/statistics.safetensors")
"""Beside the checkpoint, in a folder of its own: engines read every safetensors file they see."""
BASE_CONFIG = Path("upcycle/base.json")
"""The dense base's config.json, by which a mixture reads as its own base."""
FFN = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_TYPES = ("llama", "mistral")
_KERNEL = 32
_FFN_NAME = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_MOE_NAME = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.0\.(w[123])\.weight")
# The config keys that must be equal, so that all experts can share attention, embeddings and norms.
_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_parameters", "rope_scaling", "tie_word_embeddings",
)  # fmt: skip
_FOREIGN = 0.5


class UpcycleError(ArtifactError):
    """These models can't be joined. The message names the model and the reason."""

    code = "invalid_upcycle"


@dataclass(frozen=True, slots=True)
class Dense:
    """A model to join. `folder` has full weights, into which `adapter` is merged."""

    name: str
    folder: Path
    adapter: Path | None = None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors by the base's names, with the adapter merged as the service does."""
        try:
            read = read_weights(self.folder)
            yield from LoraDelta(self.adapter, 1.0).applied(read) if self.adapter else read
        except (ValueError, OSError, SafetensorError) as error:
            raise UpcycleError(f"{self.name}: {error}") from error


def ffn_name(name: str, expert: int) -> str | None:
    """Return the name of a dense FFN weight in a mixture's expert, or None for other weights."""
    found = _FFN_NAME.fullmatch(name)
    if found is None:
        return None
    return f"{found[1]}.block_sparse_moe.experts.{expert}.{FFN[found[2]]}.weight"


def read_config(folder: Path) -> dict[str, Any]:
    """Read a dense model's config. A mixture that was made here gives its base's config."""
    kept = folder / BASE_CONFIG
    path = kept if kept.is_file() else folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a dense model's weights. A mixture that was made here gives its base's weights."""
    names = {words: name for name, words in FFN.items()}
    for path in weight_files(folder):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dict
                if ".block_sparse_moe." in name:
                    found = _MOE_NAME.fullmatch(name)
                    if found is None:
                        continue
                    yield f"{found[1]}.mlp.{names[found[2]]}.weight", file.get_tensor(name)
                else:
                    yield name, file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, in order."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def statistics_of(folder: Path) -> Statistics | None:
    """Read the statistics of a mixture that upcycling made; None for other models."""
    path = folder / STATISTICS
    return read_statistics(path) if path.is_file() else None


def check_base(folder: Path) -> dict[str, Any]:
    """Read and check the base's config.

    Raises:
        UpcycleError: No Mixtral can be made of the base.
    """
    info = _inspect(folder)
    if isinstance(info, AdapterInfo):
        raise UpcycleError(f"base {folder}: it is a LoRA adapter; a base has full weights")
    config = read_config(folder)
    kind = config.get("model_type")
    if info.is_moe and not (folder / BASE_CONFIG).is_file():
        raise UpcycleError(
            f"base {folder}: it is a mixture of experts that was not made by `coe moe upcycle`"
        )
    if kind not in _TYPES:
        allowed = " or ".join(_TYPES)
        raise UpcycleError(
            f"base {folder}: model_type {kind!r}; a Mixtral can be made of {allowed} only"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UpcycleError(f"base {folder}: its layers have biases, a Mixtral's have none")
    if config.get("hidden_act") != "silu":
        act = config.get("hidden_act")
        raise UpcycleError(f"base {folder}: hidden_act {act!r}; a Mixtral has 'silu'")
    if info.quantization is not None:
        raise UpcycleError(f"base {folder}: its weights are quantised ({info.quantization})")
    for key in ("hidden_size", "intermediate_size"):
        if config[key] % _KERNEL:
            raise UpcycleError(
                f"base {folder}: {key} is {config[key]}; vLLM's expert kernel for CPUs takes "
                f"multiples of {_KERNEL}"
            )
    return config


def check_expert(name: str, folder: Path, base: Path, config: dict[str, Any]) -> Dense:
    """Read the expert in `folder` and check it against the base.

    Raises:
        UpcycleError: The expert does not fit. The message names the difference.
    """
    info = _inspect(folder)
    if isinstance(info, AdapterInfo):
        wanted = _last(info.base)
        known = _known_as(base)
        if wanted and wanted not in known:
            raise UpcycleError(
                f"{name}: the adapter in {folder} was made for the base {info.base!r}, "
                f"and {base} is {' or '.join(sorted(known))!r}"
            )
        return Dense(name, base, folder)
    own = read_config(folder)
    for key in _SIZES:
        if own.get(key) != config.get(key):
            raise UpcycleError(
                f"{name}: {folder} is of another family than the base: its {key} is "
                f"{own.get(key)!r}, the base's {config.get(key)!r}"
            )
    return Dense(name, folder)


def lost(expert: Dense, shared: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Return how many weights outside its FFNs an expert changes, and by what share of the norm.

    All experts share the base's other weights, so these changes are lost.

    Raises:
        UpcycleError: The changes are so large that the expert can't have been made of this base.
    """
    changed, difference, total = 0, 0.0, 0.0
    for name, weight in expert.weights():
        if ffn_name(name, 0) is not None or name not in shared:
            continue
        apart = float((weight.float() - shared[name].float()).norm()) ** 2
        changed += apart > 0
        difference += apart
        total += float(shared[name].float().norm()) ** 2
    share = (difference / total) ** 0.5 if total else 0.0
    if share > _FOREIGN:
        raise UpcycleError(
            f"{expert.name}: {expert.folder} was not made of this base: outside its FFNs it "
            f"differs by {share:.0%} of the base's norm"
        )
    return changed, share


def unique(names: Iterable[str]) -> None:
    """Check that no name appears twice.

    Raises:
        UpcycleError: A name appears twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UpcycleError(f"two experts are called {name!r}")
        seen.add(name)


def _inspect(folder: Path) -> Any:
    try:
        return inspect_model(folder)
    except CoeError as error:
        raise UpcycleError(error.message) from error


def _known_as(base: Path) -> set[str]:
    """Return the names by which an adapter may refer to this base."""
    names = {_last(str(base.resolve()))}
    manifest = base / MANIFEST
    if manifest.is_file():
        names.add(_last(read_manifest(base).name))
    statistics = statistics_of(base)
    if statistics is not None:
        names.add(_last(statistics.origins[0].weights))
    return names - {""}


def _last(name: str | None) -> str:
    """The last part of a path or of org/name, in small letters."""
    return (name or "").rstrip("/").split("/")[-1].split("--")[-1].lower()
