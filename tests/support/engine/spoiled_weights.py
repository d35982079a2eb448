"""Weights that no engine can use: cut, of other shapes or names, incomplete, of another kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from service.engine.vllm.swapping_engine import Weights
from tests.support.engine.real_engines import ADAPTERS, BASE

Spoil = Callable[[Path], object]


def _adapter(folder: Path, spoil: Spoil) -> Weights:
    """The adapter for maths, spoiled."""
    shutil.copytree(ADAPTERS / "math", folder)
    spoil(folder)
    return Weights(BASE, str(folder))


def _cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _misshapen(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = str(folder / "adapter_model.safetensors")
    tensors = {
        key: tensor[:-8].contiguous() if "lora_B" in key else tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)


def _other_names(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = str(folder / "adapter_model.safetensors")
    save_file({key.replace("mlp", "glp"): t for key, t in load_file(file).items()}, file)


def _dora(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))


_ADAPTERS: dict[str, tuple[Spoil, str]] = {
    "cut": (_cut_short, "can't be read"),
    "misshapen": (_misshapen, "the adapter adds"),
    "other-names": (_other_names, "the base has no"),
    "dora": (_dora, "use_dora"),
    "gone": (shutil.rmtree, "can't be read"),
}


def _full(folder: Path, spoil: Spoil) -> Weights:
    """Full weights of the base's family, spoiled."""
    shutil.copytree(BASE, folder)
    spoil(folder / "model.safetensors")
    return Weights(str(folder))


def _cut_full(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10**6)


def _misshapen_full(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(file))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, str(file), metadata={"format": "pt"})


def _incomplete_full(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(file))
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, str(file), metadata={"format": "pt"})


_FULL: dict[str, tuple[Spoil, str]] = {
    "full-cut": (_cut_full, "could not be loaded"),
    "full-misshapen": (_misshapen_full, "could not be loaded"),
    "full-incomplete": (_incomplete_full, "not in the file"),
}

WHY = {name: why for name, (_, why) in {**_ADAPTERS, **_FULL}.items()}
"""By name, what is said of each."""
OF_ADAPTERS = tuple(_ADAPTERS)


def spoiled_weights(folder: Path) -> dict[str, Weights]:
    """Each of them, made in a folder."""
    return {
        **{name: _adapter(folder / name, spoil) for name, (spoil, _) in _ADAPTERS.items()},
        **{name: _full(folder / name, spoil) for name, (spoil, _) in _FULL.items()},
    }
