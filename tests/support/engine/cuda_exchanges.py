"""`python -m tests.support.engine.cuda_exchanges FOLDER [FORM …]`: swaps in models built for a GPU.

For each case a line of JSON. Two experts of an architecture take turns in one model, which must
then have, tensor by tensor, what vLLM's own loader makes of the expert that runs. Models that are
quantised while they are loaded keep their weights. With forms of quantised weights, the same for a
Llama and a Mixtral of each form: the layouts are those of `PRETENDED_GPU`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.engine import cuda_platform  # isort: skip  # before anything of vLLM

import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from service.cli.doctor.random_models import (
    LLAMA,
    MIXTRAL,
    QUANTIZATIONS,
    SMALL,
    small_config,
    write_random_model,
)
from service.engine.vllm.worker import cuda_runtime
from service.engine.vllm.worker.model_access import PLAIN_METHODS, is_plain, weight_method
from service.engine.vllm.worker.model_state import ModelState, as_bytes
from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension
from service.engine.vllm.worker.second_model import SecondModel
from tests.support.engine.dense_model import loaded

_SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXCHANGED: dict[str, dict[str, Any]] = {
    # vLLM makes the group of expert parallelism for a mixture only, and groups are made once.
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32},
    "Phi3": {},
    "Glm4": {"head_dim": 32},
    "Cohere2": {},
    "Llama tied and stored": {"tie_word_embeddings": True},
}
# By case, the architecture and the arguments of the engine.
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("Llama", {"quantization": "fp8"}),
}


def _write(folder: Path, case: str, seed: int, **more: Any) -> Path:
    """A random model of a case's architecture."""
    torch.manual_seed(seed)
    name = case.split()[0]
    made = getattr(transformers, f"{name}Config")(**{**_SIZES, **more})
    getattr(transformers, f"{name}ForCausalLM")(made).to(torch.bfloat16).save_pretrained(folder)
    if "stored" in case:  # a copy of the embeddings, which many tools write
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


class _Worker:
    """An engine's worker, without an engine."""

    def __init__(self, folder: Path, root: Path, **more: Any) -> None:
        self.config = cuda_platform.engine_config(folder, skip_tokenizer_init=True, **more)
        self.model = cuda_platform.loaded_model(self.config, root / "rendezvous")

    def extension(self, shared: Path) -> Any:
        made = PinnedExtension()
        made.rank, made.vllm_config = 0, self.config
        made.model_runner = SimpleNamespace(model=self.model)
        for name in "ab":
            made.coe_share(name, str(shared / name), "token")
        return made


def _quantised(folder: Path, case: str, seed: int) -> Path:
    kind, form = case.split()
    given = {"Llama": LLAMA, "Mixtral": MIXTRAL}[kind]
    config = small_config({**given, "quantization_config": QUANTIZATIONS[form]}, SMALL)
    write_random_model(folder, config, "bfloat16", seed)
    return folder


def _exchange(case: str, root: Path) -> dict[str, Any]:
    first, second = (
        _write(root / f"{case}-{i}", case, i, **EXCHANGED[case])
        if case in EXCHANGED
        else _quantised(root / f"{case}-{i}", case, i)
        for i in (0, 1)
    )
    one = _Worker(first, root)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        extension = one.extension(Path(shared))
        fixed = extension.coe_register_initial("a")
        if fixed:
            return {"fixed": fixed}
        before = _state(one.model)
        goes_on = _survives_a_layer_without_room(extension, second, before)
        with _watching_config() as seen, _pretended_device() as moved:
            held = loaded(extension, "b", str(second))
        if held["state"] != "host":
            return {"fixed": fixed, "failed": held}
        done = extension.coe_swap_in("b")
        expected = _state(_Worker(second, root).model)
        same = _equal(_state(one.model), expected)
        differs = not _equal(before, expected)
        back = extension.coe_swap_in("a")
        return {
            "fixed": fixed,
            "ok": done["ok"] and back["ok"],
            "same": same and _equal(_state(one.model), before),
            "differs": differs,
            "sets_no_config": seen == [None],
            "goes_on": goes_on,
            "moves_what_changes": bool(moved) != is_plain(one.model)
            and not set(moved) & set(PLAIN_METHODS),
            "kernels": _kernels(one.model),
        }


@contextmanager
def _pretended_device(full_at: int | None = None) -> Iterator[list[str]]:
    """A GPU that is the CPU's memory, and has no room for one of the layers.

    Yields:
        The classes whose layers were moved there.
    """
    moved: list[str] = []
    act, processor = SecondModel._on_device, PinnedExtension._coe_processor

    def on_device(self: Any, module: Any, device: Any, shared: Any, run: Any) -> None:
        if device.type != "cpu":
            moved.append(weight_method(module) or type(module).__name__)
            if len(moved) - 1 == full_at:
                raise MemoryError("told to have no room")
        act(self, module, torch.device("cpu"), shared, run)

    SecondModel._on_device = on_device  # type: ignore[method-assign]
    PinnedExtension._coe_processor = lambda _: torch.device("cuda")  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        SecondModel._on_device = act  # type: ignore[method-assign]
        PinnedExtension._coe_processor = processor  # type: ignore[method-assign]


def _survives_a_layer_without_room(extension: Any, folder: Path, before: dict[str, Any]) -> bool:
    """Whether a load that fails half way leaves the running model and nothing else."""
    model = extension.model_runner.model
    if is_plain(model):
        return True  # none of its layers is moved
    with _pretended_device(full_at=2):
        failed = loaded(extension, "b", str(folder))
    left = ("failed", "MemoryError: told to have no room")
    return (failed["state"], failed.get("reason")) == left and _equal(_state(model), before)


def _state(model: Any) -> dict[str, Any]:
    """All tensors, as bytes, and everything else as text."""
    found = ModelState.of(model)
    tensors = {
        name: (str(tensor.dtype), tensor.stride(), as_bytes(tensor.contiguous()).clone())
        for name, tensor in (*found.tensors.items(), *found.fixed.items())
    }
    return {**tensors, "values": found.values}


def _kernels(model: Any) -> list[str]:
    """The classes that compute with quantised weights and mixtures."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or "Unquantized" in type(method).__name__:
            continue
        scheme = getattr(module, "scheme", None)
        for holder, name in (
            (method, "kernel"),
            (method, "fp8_linear"),
            (scheme, "kernel"),
            (scheme, "fp8_linear"),
            (getattr(method, "moe_kernel", None), "fused_experts"),
        ):
            if (kernel := getattr(holder, name, None)) is not None:
                found.add(type(kernel).__name__)
    return sorted(found)


@contextmanager
def _watching_config() -> Iterator[list[Any]]:
    """VLLM's current config, which is one for the process, when weights are read."""
    seen: list[Any] = []
    read = DefaultModelLoader.get_all_weights

    def looks(self: Any, *given: Any) -> Any:
        seen.append(get_current_vllm_config_or_none())
        return read(self, *given)

    DefaultModelLoader.get_all_weights = looks
    try:
        yield seen
    finally:
        DefaultModelLoader.get_all_weights = read


def _equal(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if mine.keys() != theirs.keys() or mine["values"] != theirs["values"]:
        return False
    names = mine.keys() - {"values"}
    return all(
        mine[name][:2] == theirs[name][:2] and torch.equal(mine[name][2], theirs[name][2])
        for name in names
    )


def _keeps(case: str, root: Path) -> dict[str, Any]:
    name, more = FIXED[case]
    one = _Worker(_write(root / case, name, 0), root, **more)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        extension = one.extension(Path(shared))
        fixed = extension.coe_register_initial("a")
        return {"fixed": fixed, "ok": extension.coe_swap_in("a")["ok"]}


def main(root: Path, forms: list[str]) -> None:
    # The models are in the CPU's memory.
    cuda_runtime.torch.cuda.is_available = lambda: False
    cases = [f"{kind} {form}" for kind in ("Mixtral", "Llama") for form in forms]
    for case in cases or (*EXCHANGED, *FIXED):
        try:
            found = _keeps(case, root) if case in FIXED else _exchange(case, root)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
