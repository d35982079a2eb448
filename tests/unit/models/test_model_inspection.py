"""Inspection of model folders: facts that are read, and errors that are raised."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelStoreError
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.model_config import read_json
from service.models.safetensors_headers import encode_header, read_header

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
TENSORS: Tensors = {
    "model.embed_tokens.weight": ("BF16", (100, 64)),
    "model.norm.weight": ("F32", (64,)),
}


def write_tensors(path: Path, tensors: Tensors) -> None:
    header = encode_header(tensors, {"format": "pt"})
    end = max(
        entry["data_offsets"][1]
        for name, entry in json.loads(header[8:]).items()
        if name != "__metadata__"
    )
    path.write_bytes(header + bytes(end))


def make_model(folder: Path, config: dict[str, Any] = CONFIG, tensors: Tensors = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def make_adapter(folder: Path, rank: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 16,
                "target_modules": ["up_proj", "gate_proj"],
                "base_model_name_or_path": "tiny",
            }
        )
    )
    name = "base_model.model.model.layers.0.mlp.up_proj"
    write_tensors(
        folder / "adapter_model.safetensors",
        {
            f"{name}.lora_A.weight": ("F16", (rank, 64)),
            f"{name}.lora_B.weight": ("F16", (96, rank)),
        },
    )
    return folder


def inspect_full(folder: Path) -> ModelInfo:
    info = inspect_model(folder)
    assert isinstance(info, ModelInfo)
    return info


def test_inspect_full_model_reads_its_facts(tmp_path: Path) -> None:
    info = inspect_full(make_model(tmp_path))
    assert info.architecture == "LlamaForCausalLM"
    assert info.dtype == "bfloat16"
    assert info.parameters == info.active_parameters == 100 * 64 + 64
    assert info.weight_bytes == 100 * 64 * 2 + 64 * 4
    assert info.max_context_tokens == 512
    assert (info.head_size, info.kv_heads, info.layers) == (16, 2, 2)
    assert info.kv_bytes_per_token(element_bytes=4) == 2 * 2 * 2 * 16 * 4
    assert not info.is_moe
    assert not info.needs_custom_code


def test_inspect_imports_no_torch(tmp_path: Path) -> None:
    # In a process of its own: other tests may have imported torch into this one.
    import subprocess

    make_model(tmp_path)
    script = (
        "import sys; from service.models import inspect_model; "
        "inspect_model(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_inspect_moe_counts_active_parameters(tmp_path: Path) -> None:
    config = {**CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2}
    experts: Tensors = {
        f"model.layers.0.block_sparse_moe.experts.{index}.w1.weight": ("BF16", (96, 64))
        for index in range(4)
    }
    info = inspect_full(make_model(tmp_path, config, {**TENSORS, **experts}))
    assert info.moe is not None
    assert (info.moe.experts, info.moe.experts_per_token) == (4, 2)
    assert info.parameters == 100 * 64 + 64 + 4 * 96 * 64
    assert info.active_parameters == 100 * 64 + 64 + 2 * 96 * 64


def test_inspect_family_depends_on_shapes_and_not_on_values(tmp_path: Path) -> None:
    one = inspect_full(make_model(tmp_path / "one"))
    renamed = {**CONFIG, "_name_or_path": "other", "transformers_version": "1"}
    two = inspect_full(make_model(tmp_path / "two", renamed))
    wider = inspect_full(
        make_model(tmp_path / "wider", CONFIG, {**TENSORS, "model.norm.weight": ("F32", (65,))})
    )
    rope = inspect_full(make_model(tmp_path / "rope", {**CONFIG, "rope_theta": 7.0}))
    assert one.family == two.family
    assert len({one.family, wider.family, rope.family}) == 3


LAYER = "model.layers.{}"
ATTENTION: Tensors = {f"{LAYER}.self_attn.{n}_proj.weight": ("F8_E4M3", (64, 64)) for n in "qkvo"}
SCALES: Tensors = {name.replace("weight", "weight_scale"): ("F32", (1,)) for name in ATTENTION}
EXPERTS: Tensors = {
    f"{LAYER}.mlp.experts.{i}.{n}_proj.weight": ("BF16", (32, 64))
    for i in range(4)
    for n in ("gate", "up", "down")
}
SHARED: Tensors = {f"{LAYER}.mlp.shared_experts.up_proj.weight": ("BF16", (512, 64))}
FUSED: Tensors = {f"{LAYER}.mlp.experts.gate_up_proj": ("BF16", (4, 64, 64))}


@pytest.mark.parametrize(
    ("tensors", "is_quantised", "largest"),
    [
        (ATTENTION, False, 0),
        ({**ATTENTION, **SCALES}, True, 4 * (64 * 64 + 4)),
        # One of the matrices stayed as it was, and the output layer and norms do not count.
        (
            {**ATTENTION, **dict(list(SCALES.items())[:3]), "lm_head.weight": ("F32", (9999, 64))},
            True,
            3 * (64 * 64 + 4),
        ),
        ({**ATTENTION, **EXPERTS, **SHARED}, False, 12 * 2 * 32 * 64),
        ({**ATTENTION, **SCALES, **EXPERTS}, True, 12 * 2 * 32 * 64),
        (FUSED, False, 2 * 4 * 64 * 64),
    ],
    ids=["plain", "quantised", "partly", "mixture", "both", "fused file"],
)
def test_inspect_finds_the_largest_layer_that_kernels_want_changed(
    tmp_path: Path, tensors: Tensors, is_quantised: bool, largest: int
) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}} if is_quantised else CONFIG
    layers = {name.format(i): tensor for i in (0, 1) for name, tensor in tensors.items()}
    info = inspect_model(make_model(tmp_path, config, {**TENSORS, **layers}))
    assert isinstance(info, ModelInfo)
    assert info.changed_layer_bytes == largest


def test_inspect_shards_are_added_up_and_missing_ones_raise(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {"a.safetensors": "model.norm.weight", "b.safetensors": "model.embed_tokens.weight"}
    for file, name in shards.items():
        write_tensors(tmp_path / file, {name: TENSORS[name]})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: file for file, name in shards.items()}})
    )
    assert inspect_full(tmp_path).parameters == 100 * 64 + 64
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelStoreError, match=r"1 of 2 weight files are missing.*b\.safetensors"):
        inspect_model(tmp_path)


def test_inspect_adapter_reads_its_facts(tmp_path: Path) -> None:
    info = inspect_model(make_adapter(tmp_path / "adapter"))
    assert isinstance(info, AdapterInfo)
    assert (info.base, info.rank, info.alpha) == ("tiny", 8, 16.0)
    assert info.target_modules == ("gate_proj", "up_proj")
    assert info.weight_bytes == (8 * 64 + 96 * 8) * 2
    assert info.dtype == "float16"


def test_inspect_adapter_whose_rank_disagrees_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"has rank 4, adapter_config\.json says 8"):
        inspect_model(make_adapter(tmp_path / "adapter", rank=4))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: p.write_bytes(b"abc"), "cut short: not even"),
        (lambda p: p.write_bytes(p.read_bytes()[:20]), "cut short within"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut short: 1"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "corrupt"),
        (lambda p: p.write_bytes(b"\xff" * 64), "absurd length"),
        (lambda p: p.write_bytes((8).to_bytes(8, "little") + b"not json"), "corrupt"),
        (lambda p: p.unlink(), "no safetensors weights"),
    ],
)
def test_inspect_damaged_weights_raise_one_line(tmp_path: Path, damage: Any, expected: str) -> None:
    damage(make_model(tmp_path) / "model.safetensors")
    with pytest.raises(ModelStoreError, match=expected) as caught:
        inspect_model(tmp_path)
    assert "\n" not in caught.value.message


def test_inspect_overlapping_tensors_raise(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    with pytest.raises(ModelStoreError, match="overlap"):
        read_header(path)


def test_inspect_pickle_files_raise_without_being_loaded(tmp_path: Path) -> None:
    (make_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelStoreError, match=r"pytorch_model\.bin can run code"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "max_position_embeddings", "architectures"])
def test_inspect_missing_config_key_raises_with_its_name(tmp_path: Path, key: str) -> None:
    # An architecture that nobody knows has no defaults that could stand for what is missing.
    config = {**CONFIG, "model_type": "nobody_knows"}
    make_model(tmp_path, {name: value for name, value in config.items() if name != key})
    with pytest.raises(ModelStoreError, match=f"config.json: '{key}' is missing"):
        inspect_model(tmp_path)


def test_inspect_empty_or_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"neither config\.json"):
        inspect_model(tmp_path)
    with pytest.raises(ModelStoreError, match="no such folder"):
        inspect_model(tmp_path / "none")


@pytest.mark.parametrize("made", ["pipe", "device", "folder"])
@pytest.mark.parametrize("read", [read_json, read_header])
def test_read_file_without_an_end_raises_at_once(tmp_path: Path, read: Any, made: str) -> None:
    """A pipe would hang, and /dev/zero would fill the memory."""
    path = tmp_path / "adapter_config.json"
    if made == "pipe":
        os.mkfifo(path)
    elif made == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ModelStoreError, match=r"config\.json: not a file"):
        read(path)
