"""`python -m tests.support.engine.cuda_exchanges FOLDER`: swaps in models built for a GPU.

For each case a line of JSON. Two experts of an architecture take turns in one model, which must
then have, tensor by tensor, what vLLM's own loader makes of the expert that runs. Models that are
quantised while they are loaded keep their weights.
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

from service.engine.vllm.worker import cuda_runtime
from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension, tensors_of
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


def _exchange(case: str, root: Path) -> dict[str, Any]:
    first, second = (_write(root / f"{case}-{i}", case, i, **EXCHANGED[case]) for i in (0, 1))
    one = _Worker(first, root)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        extension = one.extension(Path(shared))
        fixed = extension.coe_register_initial("a")
        before = {name: tensor.clone() for name, tensor in tensors_of(one.model).items()}
        with _watching_config() as seen:
            held = loaded(extension, "b", str(second))
        if held["state"] != "host":
            return {"fixed": fixed, "failed": held}
        done = extension.coe_swap_in("b")
        expected = tensors_of(_Worker(second, root).model)
        same = _equal(tensors_of(one.model), expected)
        differs = not _equal(before, expected)
        back = extension.coe_swap_in("a")
        return {
            "fixed": fixed,
            "ok": done["ok"] and back["ok"],
            "same": same and _equal(tensors_of(one.model), before),
            "differs": differs,
            "sets_no_config": seen == [None],
        }


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


def _equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in theirs)


def _keeps(case: str, root: Path) -> dict[str, Any]:
    name, more = FIXED[case]
    one = _Worker(_write(root / case, name, 0), root, **more)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        extension = one.extension(Path(shared))
        fixed = extension.coe_register_initial("a")
        return {"fixed": fixed, "ok": extension.coe_swap_in("a")["ok"]}


def main(root: Path) -> None:
    # The models are in the CPU's memory.
    cuda_runtime.torch.cuda.is_available = lambda: False
    for case in (*EXCHANGED, *FIXED):
        try:
            found = _exchange(case, root) if case in EXCHANGED else _keeps(case, root)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
