"""GGUF conversion: values, row order, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelStoreError
from service.models import ModelInfo, inspect_model
from service.models.gguf_conversion import convert, target_name

gguf = pytest.importorskip("gguf")

HIDDEN, FFN, HEADS, KV_HEADS, CONTEXT = 64, 96, 4, 2, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted("abcdefgh Ġ0123456789" + "Ċ"), "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def interleave(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k."""
    rows, columns = values.shape
    return (
        values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(path: Path, *, pre: str = "smollm") -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "blk.0.attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    expected = {}
    for name, shape in shapes.items():
        values = draw.standard_normal(shape).astype(np.float32)
        expected[target_name(f"{name}.weight")] = values
        if name.endswith("attn_q"):
            values = interleave(values, HEADS)
        elif name.endswith("attn_k"):
            values = interleave(values, KV_HEADS)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    expected = write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, on_bytes=lambda _: None)
    return folder, expected


def test_convert_weights_keep_values_and_row_order(
    converted: tuple[Path, dict[str, np.ndarray[Any, Any]]],
) -> None:
    from safetensors.numpy import load_file

    folder, expected = converted
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_convert_config_matches_the_gguf_metadata(converted: tuple[Path, Any]) -> None:
    info = inspect_model(converted[0])
    assert isinstance(info, ModelInfo)
    assert info.architecture == "LlamaForCausalLM"
    assert info.dtype == "float32"
    assert info.tied_embeddings
    assert (info.max_context_tokens, info.head_size, info.kv_heads) == (CONTEXT, 16, KV_HEADS)
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["eos_token_id"] == 2


def test_convert_tokenizer_encodes_and_renders_the_template(converted: tuple[Path, Any]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    text = "<|im_start|>abc  12<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == [
        "<|im_start|>", "ab", "c", "Ġ", "Ġ", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    config = json.loads((converted[0] / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"] == TEMPLATE


def test_convert_unsupported_architecture_raises_with_its_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="qwen2")
    with pytest.raises(ModelStoreError, match="'gpt2'/'qwen2'; supported is 'llama'"):
        convert(tmp_path / "tiny.gguf", tmp_path, on_bytes=lambda _: None)
    with pytest.raises(ModelStoreError, match="not one of a dense Llama"):
        target_name("blk.0.ffn_gate_exps.weight")


def test_convert_truncated_gguf_raises(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelStoreError, match="not a whole GGUF file"):
        convert(path, tmp_path, on_bytes=lambda _: None)
