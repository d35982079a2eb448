"""A family of tiny random dense models: a base, LoRA adapters on its FFNs, a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Heads of 32: the smallest that vLLM takes on a CPU.
HIDDEN, INNER, LAYERS, HEADS = 64, 96, 2, 2
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def config(**changed: Any) -> dict[str, Any]:
    """A base's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": 260,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "dtype": "float32",
        **changed,
    }


def base(folder: Path, seed: int = 0, **changed: Any) -> Path:
    """Full weights in `folder`."""
    import torch
    from safetensors.torch import save_file

    settings = config(**changed)
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    narrow = settings["num_key_value_heads"] * settings["head_dim"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    chance = torch.Generator().manual_seed(seed)

    def matrix(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into, generator=chance) * into**-0.5

    weights = {
        "model.embed_tokens.weight": torch.randn(settings["vocab_size"], hidden, generator=chance),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(narrow, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(narrow, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _tokenizer(folder)
    return folder


def adapter(folder: Path, of: str, seed: int, *, size: float = 1.0, part: str = "mlp") -> Path:
    """A LoRA adapter of rank 4 in PEFT's format; `size` 0 changes nothing."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": of,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    chance = torch.Generator().manual_seed(seed)
    shapes = {
        "mlp": {
            "gate_proj": (INNER, HIDDEN),
            "up_proj": (INNER, HIDDEN),
            "down_proj": (HIDDEN, INNER),
        },
        "self_attn": {"q_proj": (HIDDEN, HIDDEN)},
    }
    weights = {}
    for i in range(LAYERS):
        for name, (out, into) in shapes[part].items():
            path = f"base_model.model.model.layers.{i}.{part}.{name}"
            weights[f"{path}.lora_A.weight"] = torch.randn(4, into, generator=chance) * into**-0.5
            weights[f"{path}.lora_B.weight"] = torch.randn(out, 4, generator=chance) * size / 4
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    return folder


def texts(folder: Path, **words: str) -> Path:
    """For each field a file of 40 rows that are made of its letters."""
    import random

    folder.mkdir(parents=True)
    for name, letters in words.items():
        draw = random.Random(name)

        def word(draw: random.Random = draw, letters: str = letters) -> str:
            return "".join(draw.choice(letters) for _ in range(12))

        rows = [json.dumps({"prompt": word(), "answer": word()}) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    specials = ["<|start|>", "<|end|>", "<|none|>", "<|also none|>"]
    letters = sorted(ByteLevel.alphabet()) + specials
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(specials)
    words.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "chat_template": _TEMPLATE,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
