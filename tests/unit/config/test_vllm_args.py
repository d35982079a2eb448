"""vLLM's own arguments in a config: which are refused, with which reason, and which pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import Config, load_config, parse_config
from service.config.vllm_args import _SERVER, OWNED, PASSED
from service.errors import ConfigError

# Keys of the config that reasons name.
SECTIONS = ("vllm.", "swap.", "experts.", "server.", "telemetry.", "keys", "gpus", "models_dir")


def config(args: object, *, vllm: dict[str, Any] | None = None, **pool: Any) -> Config:
    options = {**(vllm or {}), "args": args}
    data = {"experts": {"a": {"model": "m"}}, "pools": {"p": {"vllm": options, **pool}}}
    return Config.model_validate(data)


def refusal(args: object, **more: Any) -> str:
    with pytest.raises(ValueError, match=r"args|argument|given|should|needs|vLLM") as caught:
        config(args, **more)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({*OWNED, *_SERVER}))
@pytest.mark.parametrize("value", [None, True, 1, "x", {"a": 1}])
def test_owned_argument_is_refused_with_its_reason(name: str, value: object) -> None:
    said = refusal({name: value})
    reason = OWNED.get(name) or _SERVER[name]
    assert f"{name} can't be given to vLLM: {reason}" in said
    assert "pools.p.vllm.args" in said
    assert len(reason) > 15
    if "a key of its own" in reason:
        assert (
            any(section in reason for section in SECTIONS)
            or "environment" in reason
            or ("the expert's name" in reason)
        )


@pytest.mark.parametrize("name", ["max-model-len", "--max_model_len", "--max-model-len"])
def test_owned_argument_is_refused_however_it_is_written(name: str) -> None:
    assert "max_model_len can't be given to vLLM" in refusal({name: 1})


def test_token_of_the_hub_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            "experts: {a: {model: m}}\npools: {p: {vllm: {args: {hf_token: hf_abcdef}}}}\n", "c"
        )
    assert "hf_token can't be given" in caught.value.message
    assert "hf_abcdef" not in caught.value.message


@pytest.mark.parametrize("name", sorted(PASSED))
def test_other_argument_needs_no_vllm_and_keeps_its_value(name: str) -> None:
    values: dict[str, Any] = {
        "gpu_memory_utilization": 0.5,
        "cpu_offload_gb": 2,
        "kv_offloading_size": 1.5,
        "kv_cache_dtype": "fp8",
        "quantization": "fp8",
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "generation_config": "vllm",
    }
    value = values.get(name, {"any": ["thing"]})
    given = config({name.replace("_", "-"): value}).pools["p"].vllm
    assert given.args == {name: value}
    # Options with other arguments are those of another engine.
    assert given != config({}).pools["p"].vllm


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"kv_cache_dtpye": "fp8"}, "no engine argument 'kv_cache_dtpye'; did you mean 'kv_cache"),
        ({"quantisation": "fp8"}, "did you mean 'quantization'?"),
        ({"seed": None}, "seed has no value"),
        ({"block-size": 16, "block_size": 32}, "block_size is given twice"),
        ([1], "valid dictionary"),
        ({"gpu_memory_utilization": 0}, "above 0 and at most 1, not 0"),
        ({"gpu_memory_utilization": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"gpu_memory_utilization": True}, "above 0 and at most 1, not True"),
        ({"cpu_offload_gb": -1}, "a number of GiB, at least 0, not -1"),
        ({"kv_offloading_size": "2GiB"}, "a number of GiB, at least 0, not '2GiB'"),
        ({"cpu_offload_gb": float("nan")}, "a number of GiB, at least 0, not nan"),
        ({"kv_offloading_size": float("inf")}, "a number of GiB, at least 0, not inf"),
        ({"compilation_config": {"backend": "os.system"}}, "Python code to import"),
        ({"compilation_config": '{"backend": "os.system"}'}, "should be a mapping, not"),
        ({"compilation_config": {"inductor_passes": {"x": "os.system"}}}, "Python code to import"),
        ({"compilation_config": {"debug_dump_path": "/tmp/x"}}, "write files to a place"),
        ({"compilation_config": {"cache-dir": "/tmp/x"}}, "write files to a place"),
        ({"profiler_config": {"torch_profiler_dir": "/tmp/x"}}, "write files to a place"),
        ({"mm-encoder-fp8-scale-save-path": "/etc/x"}, "write files to a place"),
        ({"generation_config": "/etc"}, "should be auto"),
        ({"generation_config": {"a": 1}}, "should be auto"),
        ({"kv_cache_dtype": 8}, "should be a text, not 8"),
        ({"quantization": {}}, "should be a text, not {}"),
        ({"pipeline_parallel_size": 0}, "whole number of at least 1, not 0"),
        ({"data_parallel_size": "2"}, "whole number of at least 1, not '2'"),
        ({"speculative_config": "ngram"}, "should be a mapping, not 'ngram'"),
        ({"speculative_config": {"model": "org/name"}}, "the path of a folder of this machine"),
        ({"speculative_config": {"draft_load_config": {}}}, "safetensors only"),
        ({"speculative_config": {"method": "custom_class"}}, "Python code to import"),
        ({"speculative_config": {"method": "suffix"}}, "draft from other tenants' texts"),
    ],
)
def test_wrong_argument_is_refused_with_what_is_allowed(args: object, words: str) -> None:
    assert words in refusal(args)


@pytest.mark.parametrize("name", sorted(PASSED))
@pytest.mark.parametrize("word", ["--trust-remote-code", "--load-format=pt", "-O3", " --config=x"])
def test_item_of_a_list_is_no_other_argument(name: str, word: str) -> None:
    refused = refusal({name: ["1", word]})
    assert f"{name}: vLLM would take a text that begins with - for an argument" in refused


def test_suffixes_of_one_request_may_draft() -> None:
    own = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
    assert config({"speculative_config": own})


def test_folder_of_a_draft_model_starts_at_the_config_s_folder(tmp_path: Path) -> None:
    file = tmp_path / "coe.yaml"
    file.write_text(
        "experts: {a: {model: m}}\n"
        "pools: {p: {vllm: {args: {seed: 3, speculative_config: {model: ./d, x: 1}}}}}\n"
    )
    args = load_config(file).pools["p"].vllm.args
    assert args == {
        "seed": 3,
        "speculative_config": {"model": str(tmp_path / "d"), "x": 1},
    }


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size"])
@pytest.mark.parametrize(
    ("vllm", "pool", "words"),
    [
        ({}, {}, "on CPU an engine is one process; min_replicas"),
        ({}, {"gpus": 1}, "an engine needs 2 GPUs"),
        ({"tensor_parallel_size": 2}, {"gpus": 3}, "an engine needs 4 GPUs"),
        ({"moe_capture": {}}, {"gpus": 2}, "moe_capture sees one pipeline stage"),
        ({"tensor_parallel_size": 2}, {"gpus": 4}, None),
    ],
)
def test_parallel_sizes_need_the_gpus_of_a_replica(
    name: str, vllm: dict[str, Any], pool: dict[str, Any], words: str | None
) -> None:
    if words is None:
        assert config({name: 2}, vllm=vllm, **pool).pools["p"].vllm.engine_gpus == 4
    else:
        said = refusal({name: 2}, vllm=vllm, **pool)
        assert f"vllm.args.{name}: " in said
        assert words in said
