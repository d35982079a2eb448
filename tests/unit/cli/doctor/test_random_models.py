"""Small configs of large models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli.doctor.random_models import (
    CPU_SIZE,
    GPU_SIZE,
    LLAMA,
    MIXTRAL,
    SMALL,
    small_config,
    write_random_model,
)
from service.models import ModelInfo, inspect_model


@given(
    st.sampled_from([SMALL, CPU_SIZE, GPU_SIZE]),
    st.sampled_from([32, 64, 80, 96, 128, 256]),
    st.sampled_from([8, 32, 40, 64]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_small_config_keeps_heads_and_divides_by_gpus(
    size: Any, head_size: int, heads: int, share: int, gpus: int
) -> None:
    config = {
        **LLAMA,
        "head_dim": None,
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // share,
    }
    made = small_config(config, size, gpus)
    assert made["hidden_size"] == made["num_attention_heads"] * head_size
    assert made["hidden_size"] >= size.hidden
    assert made["num_attention_heads"] % gpus == 0
    assert made["num_attention_heads"] % made["num_key_value_heads"] == 0
    if share == 1:
        assert made["num_key_value_heads"] == made["num_attention_heads"]


def test_small_config_has_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    made = small_config({**LLAMA, "layer_types": kinds * 8, "max_window_layers": 40}, SMALL)
    assert made["layer_types"] == kinds
    assert made["num_hidden_layers"] == made["max_window_layers"] == 6
    assert small_config({**LLAMA, "layer_types": kinds[:1] * 48}, SMALL)["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "no random weights of hqq"),
        ({"hidden_size": None}, None),
    ],
)
def test_small_config_refuses_what_it_can_t_make(changed: dict[str, Any], why: str | None) -> None:
    config = {**LLAMA, **changed}
    if why is None:
        del config["hidden_size"]
    with pytest.raises(ValueError, match=why or "no hidden_size at its top"):
        small_config(config, SMALL)


def test_small_config_runs_no_code_and_keeps_the_architecture() -> None:
    made = small_config({**LLAMA, "auto_map": {"AutoConfig": "evil.Config"}}, SMALL)
    assert "auto_map" not in made
    assert made["architectures"] == LLAMA["architectures"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "mixture"])
def test_random_models_are_of_one_family_and_differ(tmp_path: Path, config: Any) -> None:
    pytest.importorskip("torch")
    small = small_config(config, SMALL)
    infos, digests = [], []
    for seed in (0, 1):
        size = write_random_model(tmp_path / str(seed), small, "bfloat16", seed)
        info = inspect_model(tmp_path / str(seed))
        assert isinstance(info, ModelInfo)
        infos.append(info)
        digests.append((tmp_path / str(seed) / "model.safetensors").read_bytes())
        assert info.weight_bytes <= size
    assert infos[0].family == infos[1].family
    assert digests[0] != digests[1]
    assert infos[0].dtype == "bfloat16"
    assert infos[0].has_tokenizer
    assert infos[0].is_moe == (config is MIXTRAL)
