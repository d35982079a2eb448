"""Merging a LoRA adapter into full weights, and the adapters that can't be merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402  # needs torch

from service.errors import ModelStoreError  # noqa: E402
from service.models.lora_adapters import inspect_adapter  # noqa: E402
from service.models.lora_merge import LoraDelta  # noqa: E402

_NAME = "model.layers.0.q"


def _adapter(folder: Path, *, rank: int = 2, rows: int = 4, columns: int = 4, **extra: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q"], **extra}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(rank)
    halves = {
        f"base_model.model.{_NAME}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"base_model.model.{_NAME}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }
    save_file(halves, folder / "adapter_model.safetensors")
    return folder


def _halves(delta: LoraDelta) -> tuple[Any, Any]:
    pair = delta._pairs[f"{_NAME}.weight"]
    return pair["A"], pair["B"]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.floats(-2.0, 2.0),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_merge_plain_adapter_adds_strength_times_scale_times_b_a(
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    rows: int,
    columns: int,
    rslora: bool,
    strength: float,
    dtype: Any,
) -> None:
    folder = tmp_path_factory.mktemp("a")
    _adapter(folder, rank=rank, rows=rows, columns=columns, use_rslora=rslora)
    delta = LoraDelta(folder, strength)
    weight = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns).to(dtype)
    other = torch.ones(2)
    made = dict(delta.applied([(f"{_NAME}.weight", weight), ("norm.weight", other)]))
    a, b = _halves(delta)
    scale = strength * 4 / (math.sqrt(rank) if rslora else rank)
    expected = (weight.float() + scale * (b @ a)).to(dtype)
    assert torch.allclose(made[f"{_NAME}.weight"].float(), expected.float(), atol=1e-2, rtol=1e-2)
    assert made[f"{_NAME}.weight"].dtype == dtype
    assert made["norm.weight"] is other


OTHER_ARITHMETIC: list[dict[str, Any]] = [
    {"use_dora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"modules_to_save": ["lm_head"]},
    {"alora_invocation_tokens": [1, 2]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_16"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq"},
    {"use_qalora": True},
    {"use_bdlora": {"nblocks": 2}},
    {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [7]},
]
SERVED_BESIDE: list[dict[str, Any]] = [
    {"rank_pattern": {"q": 2}},
    {"alpha_pattern": {"q": 8}},
    {"fan_in_fan_out": True},
    {"target_parameters": ["experts.gate_up_proj"]},
    {"what_a_newer_release_brings": True},
]
NEUTRAL: list[dict[str, Any]] = [
    {"init_lora_weights": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": "orthogonal"},
    {"bias": "none", "lora_dropout": 0.1, "layers_to_transform": [0], "task_type": "CAUSAL_LM"},
    {"use_dora": False, "modules_to_save": None, "alora_invocation_tokens": None},
    {"qalora_group_size": 16, "peft_version": "0.18.0", "inference_mode": True},
    {"what_a_newer_release_brings": None},
]


@pytest.mark.parametrize("extra", OTHER_ARITHMETIC, ids=str)
def test_merge_unsupported_adapter_variant_raises_in_check_and_engine(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    folder = _adapter(tmp_path / "a", **extra)
    key = next(iter(extra))
    with pytest.raises(ValueError, match=key):
        LoraDelta(folder, 1.0)
    with pytest.raises(ModelStoreError, match=key):
        inspect_adapter(folder)


@pytest.mark.parametrize("extra", SERVED_BESIDE, ids=str)
def test_merge_adapter_that_must_stay_unmerged_raises(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    folder = _adapter(tmp_path / "a", **extra)
    with pytest.raises(ValueError, match=next(iter(extra))):
        LoraDelta(folder, 1.0)
    assert inspect_adapter(folder).not_merged == tuple(extra)


@pytest.mark.parametrize("extra", NEUTRAL, ids=str)
def test_merge_adapter_with_training_only_options_is_plain(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    folder = _adapter(tmp_path / "a", **extra)
    assert LoraDelta(folder, 1.0)._scale == 2.0
    assert inspect_adapter(folder).not_merged == ()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32]
)
def test_merge_into_quantised_weights_raises(tmp_path: Path, dtype: Any) -> None:
    delta = LoraDelta(_adapter(tmp_path / "a"), 1.0)
    weight = torch.ones(4, 4).to(dtype)
    with pytest.raises(ValueError, match="quantised"):
        list(delta.applied([(f"{_NAME}.weight", weight)]))
