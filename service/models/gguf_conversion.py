"""Converts a GGUF file to a folder that vLLM and transformers load.

It does not use transformers' GGUF loader, for three reasons found with the catalogue's model. That
loader needs `accelerate`, which no other part of the project needs. It takes 20 s instead of 2 s.
It rebuilds the tokenizer without SmolLM2's rule that every digit is a separate token. The weights
equal the weights of that loader bit for bit.

The conversion supports only what the catalogue needs: the dense Llama architecture, and a
byte-level BPE tokenizer of the `smollm` kind. It refuses everything else by name.

Weights are written as float32. The quantised blocks are scale·q + minimum with float16 scales,
which float32 holds exactly and bfloat16 would round once more. Serving on CPU uses float32, so that
loading and swapping need no cast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models import safetensors_headers

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of special tokens."""


def convert(gguf_path: Path, folder: Path, *, on_bytes: Callable[[int], None]) -> None:
    """Write config, tokenizer and `model.safetensors` (float32) into `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelStoreError(
            "converting a GGUF file needs the package 'gguf': pip install gguf"
        ) from error
    try:
        reader = GGUFReader(str(gguf_path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise ModelStoreError(f"{gguf_path}: not a whole GGUF file: {error}") from error
    _check_supported(gguf_path, fields)
    config = model_config(fields, tied="output.weight" not in tensors)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(fields))
    write_tokenizer(fields, folder)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for written in _write_weights(tensors, heads, folder / "model.safetensors"):
        on_bytes(written)


def _check_supported(path: Path, fields: dict[str, Any]) -> None:
    found = (
        fields.get("general.architecture"),
        fields.get("tokenizer.ggml.model"),
        fields.get("tokenizer.ggml.pre"),
    )
    if found != ("llama", "gpt2", "smollm"):
        raise ModelStoreError(
            f"{path}: can't convert a GGUF of architecture {found[0]!r} with tokenizer "
            f"{found[1]!r}/{found[2]!r}; supported is 'llama' with 'gpt2'/'smollm'. "
            "Pull the model as safetensors instead"
        )


def model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Build `config.json` for transformers' LlamaConfig."""
    hidden_size = int(fields["llama.embedding_length"])
    heads = int(fields["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "dtype": "float32",
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        # GGUF holds the value as float32, so that 1e-05 reads as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {
            "rope_theta": float(fields["llama.rope.freq_base"]),
            "rope_type": "default",
        },
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": int(fields["llama.vocab_size"]),
    }


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
    }


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    special = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL_TOKEN
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        # Digits come first, because every digit is a separate token in SmolLM2.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    template = fields["tokenizer.chat_template"]
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": tokens[int(fields["tokenizer.ggml.bos_token_id"])],
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[int(fields["tokenizer.ggml.eos_token_id"])],
            "model_max_length": int(fields["llama.context_length"]),
            "pad_token": tokens[int(fields["tokenizer.ggml.padding_token_id"])],
            # This class uses tokenizer.json unchanged. GPT2Tokenizer of transformers 5 would
            # replace the pre-tokenizer by its own.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": tokens[int(fields["tokenizer.ggml.unknown_token_id"])],
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def target_name(gguf_name: str) -> str:
    """Return the name that LlamaForCausalLM gives to a GGUF tensor."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise ModelStoreError(f"GGUF tensor {gguf_name!r} is not one of a dense Llama model")
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"


def _write_weights(tensors: dict[str, Any], heads: dict[str, int], path: Path) -> Iterator[int]:
    # GGUF lists the fastest dimension first, which is the reverse of the usual order.
    layout = {
        target_name(name): ("F32", tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    }

    def chunks() -> Iterator[bytes | memoryview]:
        yield safetensors_headers.encode_header(layout, {"format": "pt"})
        for name, tensor in tensors.items():
            yield _float32_bytes(tensor, heads.get(name.split(".")[-2]))

    return safetensors_headers.write_chunks(path, chunks())


def _float32_bytes(tensor: Any, heads: int | None) -> memoryview:
    import numpy as np
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    if heads is not None:
        # llama.cpp stores q and k with each head's rotary halves interleaved.
        rows, columns = values.shape
        values = (
            values.reshape(heads, rows // heads // 2, 2, columns)
            .swapaxes(1, 2)
            .reshape(rows, columns)
        )
    return np.ascontiguousarray(values, dtype="<f4").data.cast("B")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
