"""Random Llama models of a given shape: their answers are noise, and their size is real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.doctor.random_models import write_byte_tokenizer

_NOISE = 1 << 22
_ELEMENT_BYTES = 2  # bfloat16
# Tokens that every shape has: the bytes.
WORDS = range(256)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions that determine a model's size."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    words: int

    def matrices(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, layer by layer."""
        narrow = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.words, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.self_attn.k_proj.weight", (narrow, self.hidden)
            yield f"{layer}.self_attn.v_proj.weight", (narrow, self.hidden)
            yield f"{layer}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{layer}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{layer}.mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.words, self.hidden)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(_count(shape) for _, shape in self.matrices())

    @property
    def weight_bytes(self) -> int:
        """Size in bfloat16, in bytes."""
        return _ELEMENT_BYTES * self.parameters


# Of 7 B as Mistral's is; and one for trying the program out.
SHAPES = {
    "7b": Shape(4096, 14336, 32, 32, 8, 32000),
    "tiny": Shape(64, 96, 2, 2, 1, 260),
}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def write_random(folder: Path, shape: Shape, seed: int) -> Path:
    """Write one into a new folder, bfloat16, a file for each layer. Raises OSError."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    write_byte_tokenizer(folder)
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed))
    files: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for number, (name, sides) in enumerate(shape.matrices()):
        part = name.split(".")[2] if ".layers." in name else "rest"
        file = f"model-{part}.safetensors"
        files.setdefault(file, {})[name] = _tensor(noise, sides, number)
        where[name] = file
        if part != "rest" and name.endswith("down_proj.weight"):
            save_file(files.pop(file), str(folder / file), metadata={"format": "pt"})
    for file, tensors in files.items():
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    index = {"metadata": {"total_size": shape.weight_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _tensor(noise: Any, sides: tuple[int, ...], number: int) -> Any:
    """A tensor of the same noise, which begins somewhere else for each."""
    import torch

    if len(sides) == 1:
        return torch.ones(sides, dtype=torch.bfloat16)
    count = _count(sides)
    scaled = (noise.roll(number * 7919) * sides[1] ** -0.5).to(torch.bfloat16)
    return scaled.repeat(-(-count // len(scaled)))[:count].reshape(sides).clone()


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.words,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
