"""`coe check` on model folders as people bring them: planned, or refused with what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.errors import ModelStoreError
from service.models import ModelInfo, inspect_model, locate
from service.models.model_inspection import hub_snapshot, is_second_copy
from tests.unit.models.test_model_inspection import Tensors, write_tensors

HIDDEN, FFN, KV, LAYERS, VOCABULARY = 64, 128, 32, 2, 256
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
POOL = {"dtype": "float32", "kv_cache_bytes": "512MiB", "max_model_len": 256, "max_lora_rank": 16}


def llama_tensors() -> Tensors:
    """The tensors of a small Llama model."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (KV, HIDDEN),
            f"{at}self_attn.v_proj.weight": (KV, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {name: ("F32", shape) for name, shape in shapes.items()}


def make_llama(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: bool = True,
    template: bool = True,
    weights: bool = True,
) -> Path:
    """A whole little model folder; what is switched off is left out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA))
    if weights:
        write_tensors(folder / "model.safetensors", llama_tensors())
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
        fields = {"chat_template": "{{ messages }}"} if template else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def make_lora(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    more: Tensors | None = None,
    ranks: tuple[int, ...] = (4, 4),
    hidden: int = HIDDEN,
    module: str = "self_attn.q_proj",
) -> Path:
    """A little adapter of `module`, of one rank for each layer that it changes."""
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    fields |= {
        "target_modules": [module.rpartition(".")[2]],
        "base_model_name_or_path": "acme/tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **(config or {})}))
    tensors: Tensors = {}
    for layer, rank in enumerate(ranks):
        at = f"base_model.model.model.layers.{layer}.{module}."
        tensors[at + "lora_A.weight"] = ("F32", (rank, hidden))
        tensors[at + "lora_B.weight"] = ("F32", (hidden, rank))
    write_tensors(folder / "adapter_model.safetensors", {**tensors, **(more or {})})
    return folder


def check(folder: Path, experts: dict[str, Any], *options: str) -> Result:
    """`coe check` of a config with these experts."""
    from service.cli import cli

    path = folder / "coe.yaml"
    pools = {"cpu": {"vllm": {**POOL, "enforce_eager": True}}}
    path.write_text(json.dumps({"experts": experts, "pools": pools}))
    return CliRunner().invoke(cli, ["check", str(path), *options])


def output_of(result: Result) -> str:
    """All that a command said, its error too."""
    message = getattr(result.exception, "message", "")
    return f"{result.output}\n{message}"


# --- configs that leave things to the class

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model"},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # layers, heads, KV heads, head size, vocabulary, context: of the classes in transformers
        (GEMMA3_4B, (34, 8, 4, 256, 262_208, 131_072)),
        (LLAVA_7B, (32, 32, 32, 128, 32_064, 4096)),
        ({**LLAMA, "vocab_size": None}, (2, 4, 2, 16, 32_000, 512)),
    ],
    ids=["gemma3", "llava", "llama"],
)
def test_inspect_config_without_sizes_uses_the_class_s_defaults(
    tmp_path: Path, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    info = inspect_model(make_llama(tmp_path / "m", config=config))
    assert isinstance(info, ModelInfo)
    found = (info.layers, info.attention_heads, info.kv_heads, info.head_size, info.vocab_size)
    assert (*found, info.max_context_tokens) == expected


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_inspect_nested_config_reads_the_language_part(tmp_path: Path, part: str) -> None:
    config = {"architectures": ["X"], "model_type": "nobody_knows", "hidden_size": 1, part: LLAMA}
    info = inspect_model(make_llama(tmp_path / "m", config=config))
    assert isinstance(info, ModelInfo)
    assert (info.hidden_size, info.layers) == (HIDDEN, LAYERS)


TYPES = ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        # full layers, layers with a window, its tokens, elements of a token in a layer
        ({}, (4, 0, 0, 64)),
        ({"sliding_window": 8}, (0, 4, 8, 64)),
        ({"sliding_window": 8, "use_sliding_window": False}, (4, 0, 0, 64)),
        ({"sliding_window": None}, (4, 0, 0, 64)),
        ({"sliding_window": 8, "sliding_window_pattern": 2}, (2, 2, 8, 64)),
        ({"sliding_window": 8, "layer_types": TYPES}, (1, 3, 8, 64)),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, (1, 0, 0, 64)),
        ({"attention_chunk_size": 8, "layer_types": ["chunked_attention"] * 4}, (0, 4, 8, 64)),
        ({"kv_lora_rank": 32, "qk_rope_head_dim": 8}, (4, 0, 0, 40)),
    ],
)
def test_inspect_kv_layout_is_that_of_the_layers(
    tmp_path: Path, changes: dict[str, Any], layout: tuple[int, ...]
) -> None:
    config = {**LLAMA, "num_hidden_layers": 4, **changes}
    info = inspect_model(make_llama(tmp_path / "m", config=config))
    assert isinstance(info, ModelInfo)
    assert info.kv is not None
    found = (info.kv.full_layers, info.kv.window_layers, info.kv.window_tokens, info.kv.elements)
    assert found == layout
    assert info.least_kv_bytes(100, 2) <= 100 * info.kv_bytes_per_token(2)


@pytest.mark.parametrize(("kv_bytes", "fits"), [(16_384, True), (16_383, False)])
def test_check_sliding_window_layers_reserve_the_window_only(
    tmp_path: Path, kv_bytes: int, fits: bool
) -> None:
    # Two layers, of which each keeps 32 of 256 tokens of 64 float32 numbers.
    folder = make_llama(tmp_path / "m", config={**LLAMA, "sliding_window": 32})
    path = tmp_path / "coe.yaml"
    options = {**POOL, "kv_cache_bytes": kv_bytes, "enforce_eager": True}
    pools = {"cpu": {"vllm": options}}
    path.write_text(json.dumps({"experts": {"a": {"model": str(folder)}}, "pools": pools}))
    from service.cli import cli

    result = CliRunner().invoke(cli, ["check", str(path)])
    assert (result.exit_code == 0) == fits, output_of(result)
    if not fits:
        assert "give it at least 16384 bytes, or set vllm.max_model_len to at most 31" in output_of(
            result
        )


# --- weights that are there twice


@pytest.mark.parametrize(
    ("files", "copies"),
    [
        ({"model"}, ()),
        ({"shards", "index"}, ()),
        ({"shards"}, ()),
        ({"shards", "index", "consolidated"}, ()),
        ({"shards", "index", "stray"}, ()),
        ({"shards", "consolidated"}, ("consolidated.safetensors",)),
        ({"shards", "stray"}, ("model.safetensors",)),
        ({"model", "consolidated"}, ("consolidated.safetensors",)),
        ({"consolidated"}, ()),
    ],
    ids=lambda value: "+".join(sorted(value)) or "none",
)
def test_check_duplicate_weights_are_counted_once(
    tmp_path: Path, files: set[str], copies: tuple[str, ...]
) -> None:
    shapes = llama_tensors()
    names = sorted(shapes)
    halves = {
        f"model-0000{n}-of-00002.safetensors": {name: shapes[name] for name in part}
        for n, part in ((1, names[:5]), (2, names[5:]))
    }
    folder = make_llama(tmp_path / "m", weights=False)
    if "model" in files:
        write_tensors(folder / "model.safetensors", shapes)
    if "stray" in files:
        write_tensors(folder / "model.safetensors", {"a.qweight": ("I32", (8, 64))})
    if "consolidated" in files:
        theirs = {name.replace("self_attn.q_proj", "wq"): item for name, item in shapes.items()}
        write_tensors(folder / "consolidated.safetensors", theirs)
    if "shards" in files:
        for name, half in halves.items():
            write_tensors(folder / name, half)
    if "index" in files:
        weight_map = {tensor: name for name, half in halves.items() for tensor in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    result = check(tmp_path, {"a": {"model": str(folder)}}, "--json")
    (pool,) = json.loads(result.output)["pools"]
    once = sum(4 * _elements(shape) for _, shape in shapes.values())
    assert pool["engines"][0]["weight_bytes"] == 2 * once  # packed beside itself
    assert [copy for copy in copies if copy not in " ".join(pool["warnings"])] == []
    assert bool(pool["warnings"]) == bool(copies)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


@pytest.mark.parametrize("index", [True, False])
def test_inspect_missing_shard_raises_with_its_name(tmp_path: Path, index: bool) -> None:
    folder = make_llama(tmp_path / "m", weights=False)
    write_tensors(folder / "model-00001-of-00002.safetensors", llama_tensors())
    if index:
        weight_map = {"a": "model-00001-of-00002.safetensors"}
        weight_map["b"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelStoreError, match=r"first model-00002-of-00002\.safetensors"):
        inspect_model(folder)


def test_inspect_index_outside_the_folder_raises(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", weights=False)
    write_tensors(tmp_path / "other.safetensors", llama_tensors())
    weight_map = dict.fromkeys(llama_tensors(), "../other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelStoreError, match="is no file name"):
        inspect_model(folder)


def test_is_second_copy_is_true_beside_the_other_format_only() -> None:
    assert not is_second_copy("consolidated.safetensors", ["consolidated.safetensors"])
    assert is_second_copy("consolidated.safetensors", ["model.safetensors"])
    assert not is_second_copy("model.safetensors", ["consolidated.safetensors"])


# --- adapters

MAGNITUDES: Tensors = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": ("F32", (HIDDEN,))
}
UNSERVED: dict[str, dict[str, Any]] = {
    "use_dora": {"config": {"use_dora": True}, "more": MAGNITUDES},
    "modules_to_save": {
        "config": {"modules_to_save": ["lm_head"]},
        "more": {"base_model.model.lm_head.weight": ("F32", (VOCABULARY, HIDDEN))},
    },
    "bias": {"config": {"bias": "all"}},
    "lora_bias": {"config": {"lora_bias": True}},
    "init_lora_weights": {"config": {"init_lora_weights": "pissa"}},
    "layer_replication": {"config": {"layer_replication": [[0, 2]]}},
    "alora_invocation_tokens": {"config": {"alora_invocation_tokens": [1]}},
    "use_qalora": {"config": {"use_qalora": True}},
    "use_bdlora": {"config": {"use_bdlora": {"x": 1}}},
    "trainable_token_indices": {"config": {"trainable_token_indices": [1]}},
    "target_modules": {"config": {"target_modules": None}},
    "lora_alpha": {"config": {"lora_alpha": None}},
    "'r'": {"config": {"r": 0}},
    "lora_magnitude_vector": {"more": MAGNITUDES},
    "one half": {"more": {"a.lora_A.weight": ("F32", (4, 64))}},
    "no tensor of one dimension": {"more": {"a.lora_A.weight": ("F32", ())}},
    "has rank 8": {"ranks": (4, 8)},
}


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("named", sorted(UNSERVED))
def test_check_unsupported_adapter_raises_with_the_reason(
    tmp_path: Path, named: str, form: str
) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", **UNSERVED[named])
    experts = {
        "a": {"model": str(base)},
        "b": {"base": "a", "adapter": str(adapter), "form": form},
    }
    result = check(tmp_path, experts)
    assert result.exit_code == 1
    assert isinstance(result.exception, ModelStoreError)
    text = "is not a matrix" if named.startswith("no tensor") else named
    assert text in output_of(result)


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"target_modules": "all-linear"}, {"init_lora_weights": "eva"}],
)
def test_check_plain_adapter_passes(tmp_path: Path, config: dict[str, Any], form: str) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", config=config)
    experts = {
        "a": {"model": str(base)},
        "b": {"base": "a", "adapter": str(adapter), "form": form},
    }
    assert check(tmp_path, experts).exit_code == 0


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 8}}, (4, 8)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 64}}, (4, 4)),
        ({"fan_in_fan_out": True}, (4, 4)),
    ],
)
def test_check_adapter_with_patterns_is_served_unmerged_only(
    tmp_path: Path, config: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", config=config, ranks=ranks)
    (key,) = config
    tuned = {"base": "a", "adapter": str(adapter)}
    beside = check(tmp_path, {"a": {"model": str(base)}, "b": tuned})
    assert beside.exit_code == 0
    assert f"b: {key} of its adapter is followed, with ranks of up to {max(ranks)}" in beside.output
    merged = check(tmp_path, {"a": {"model": str(base)}, "b": {**tuned, "form": "merged"}})
    assert f"experts.b.adapter: {key} of its adapter_config.json can't be merged" in output_of(
        merged
    )


def test_check_adapter_with_an_unknown_key_warns(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", config={"use_newest_lora": True})
    result = check(
        tmp_path, {"a": {"model": str(base)}, "b": {"base": "a", "adapter": str(adapter)}}
    )
    assert result.exit_code == 0
    assert (
        "experts.b.adapter: use_newest_lora of its adapter_config.json is not known"
        in output_of(result)
    )


def test_check_adapter_whose_largest_rank_exceeds_the_limit_raises(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", config={"rank_pattern": {"layers.1": 32}}, ranks=(4, 32))
    experts = {"a": {"model": str(base)}, "b": {"base": "a", "adapter": str(adapter)}}
    assert "its rank is 32, and vllm.max_lora_rank is 16" in output_of(check(tmp_path, experts))


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden": 32}, "self_attn.q_proj of 32 × 32, and the base's has 64 × 64"),
        ({"ranks": (4, 4, 4)}, "layers.2.self_attn.q_proj, and the base has 2 layers"),
        ({"module": "self_attn.k_proj"}, "self_attn.k_proj of 64 × 64, and the base's has 32 × 64"),
    ],
)
def test_check_adapter_of_another_base_raises(
    tmp_path: Path, changes: dict[str, Any], why: str, form: str
) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_lora(tmp_path / "lora", **changes)
    tuned = {"base": "a", "adapter": str(adapter), "form": form}
    result = check(tmp_path, {"a": {"model": str(base)}, "b": tuned})
    assert result.exit_code == 1  # a ConfigError; the command's exit status is 2
    assert "experts.b.adapter: it is of another base than 'a'" in output_of(result)
    assert why in output_of(result)


def test_check_adapter_of_a_multimodal_model_matches_by_layer(tmp_path: Path) -> None:
    config = {**LLAVA_7B, "text_config": LLAMA}
    base = make_llama(tmp_path / "base", config=config, weights=False)
    prefixed = {f"language_model.{name}": tensor for name, tensor in llama_tensors().items()}
    seeing: Tensors = {"vision_tower.layers.0.self_attn.q_proj.weight": ("F32", (8, 8))}
    write_tensors(base / "model.safetensors", {**prefixed, **seeing})
    good = make_lora(tmp_path / "good")
    bad = make_lora(tmp_path / "bad", hidden=32)
    for adapter, status in ((good, 0), (bad, 1)):
        experts = {"a": {"model": str(base)}, "b": {"base": "a", "adapter": str(adapter)}}
        assert check(tmp_path, experts).exit_code == status


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        ("acme/tiny", False),
        ("someone-else/Tiny", False),
        ("acme/other", True),
        ("./outputs/tiny", False),
        (None, False),
    ],
)
def test_check_adapter_that_names_another_base_warns(
    tmp_path: Path, named: str | None, warned: bool
) -> None:
    models = tmp_path / "models"
    stored = make_llama(models / "acme--tiny")
    manifest = {"format": 1, "name": "acme--tiny", "source": "x", "licence": None, "created": ""}
    (stored / "coe-model.json").write_text(json.dumps({**manifest, "files": []}))
    adapter = make_lora(tmp_path / "lora", config={"base_model_name_or_path": named})
    path = tmp_path / "coe.yaml"
    experts = {"a": {"model": "acme/tiny"}, "b": {"base": "a", "adapter": str(adapter)}}
    pools = {"cpu": {"vllm": {**POOL, "enforce_eager": True}}}
    path.write_text(json.dumps({"models_dir": str(models), "experts": experts, "pools": pools}))
    from service.cli import cli

    result = CliRunner().invoke(cli, ["check", str(path)])
    assert result.exit_code == 0, output_of(result)
    assert ("it was trained on acme/other" in output_of(result)) == warned


# --- tokenizers and chat templates


def test_check_folder_without_a_tokenizer_raises(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", tokenizer=False)
    result = check(tmp_path, {"a": {"model": str(folder)}})
    assert "experts.a.model: no tokenizer in its folder" in output_of(result)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "qwen.tiktoken"],
)
def test_check_any_known_vocabulary_file_counts_as_a_tokenizer(tmp_path: Path, name: str) -> None:
    folder = make_llama(tmp_path / "m", tokenizer=False)
    (folder / name).write_text("{}")
    assert check(tmp_path, {"a": {"model": str(folder)}}).exit_code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", json.dumps({"chat_template": "{{ messages }}"})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default"}]})),
        ("tekken.json", "{}"),
    ],
)
def test_check_chat_template_is_found_in_any_of_its_places(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = make_llama(tmp_path / "m", template=False)
    (folder / name).write_text(content)
    result = check(tmp_path, {"a": {"model": str(folder)}})
    assert (result.exit_code, "warning" in output_of(result)) == (0, False)


def test_check_chat_expert_without_a_template_warns(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", template=False)
    chats = check(tmp_path, {"a": {"model": str(folder)}})
    assert chats.exit_code == 0
    assert "warning: experts.a.model: no chat template" in output_of(chats)
    silent = check(tmp_path, {"a": {"model": str(folder), "capabilities": ["completions"]}})
    assert (silent.exit_code, "template" in output_of(silent)) == (0, False)


# --- the hub client's cache


def hub_cache(root: Path, *commits: str, main: str | None = None) -> Path:
    """A model in the cache of the hub's client: real files in `blobs`, links in `snapshots`."""
    folder = root / "models--acme--tiny"
    for commit in commits:
        make_llama(folder / "snapshots" / commit)
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder


def test_locate_hub_cache_root_is_its_snapshot(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, "aaa", "bbb", main="bbb")
    assert locate(str(folder), root=tmp_path / "store") == folder / "snapshots" / "bbb"
    result = check(tmp_path, {"a": {"model": str(folder)}})
    assert result.exit_code == 0, output_of(result)


def test_hub_snapshot_without_a_ref_is_the_only_one_or_none(tmp_path: Path) -> None:
    one = hub_cache(tmp_path / "1", "aaa")
    assert hub_snapshot(one) == one / "snapshots" / "aaa"
    two = hub_cache(tmp_path / "2", "aaa", "bbb")
    assert hub_snapshot(two) is None
    out = hub_cache(tmp_path / "3", "aaa", main="../../elsewhere")
    assert hub_snapshot(out) is None


def test_check_root_of_the_whole_hub_cache_raises_with_what_to_name(tmp_path: Path) -> None:
    hub_cache(tmp_path / "hub", "aaa")
    result = check(tmp_path, {"a": {"model": str(tmp_path / "hub")}})
    assert "name one model's folder in it, models--ORG--NAME" in output_of(result)
