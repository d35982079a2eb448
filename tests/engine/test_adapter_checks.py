"""The adapter checks of `coe check` agree with vLLM's own reader."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import ModelStoreError
from service.models import inspect_model
from service.models.lora_adapters import AdapterInfo
from tests.unit.models.test_model_folders import make_lora

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "use_rslora": {"use_rslora": True},
    "target_modules": {"target_modules": "all-linear"},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init off": {"init_lora_weights": False},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "init pissa": {"init_lora_weights": "pissa_niter_4"},
    "init olora": {"init_lora_weights": "OLoRA"},
    "alora": {"alora_invocation_tokens": [1]},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "use_qalora": {"use_qalora": True},
    "rank of zero": {"r": 0},
    "no alpha": {"lora_alpha": None},
}
# vLLM would go on to divide by it.
_STRICTER = {"no alpha"}


def ours(folder: Path) -> AdapterInfo | None:
    """What we know of an adapter; None where it is refused."""
    try:
        info = inspect_model(folder)
    except ModelStoreError:
        return None
    assert isinstance(info, AdapterInfo)
    return info


def theirs(folder: Path) -> Any:
    """Read an adapter as vLLM does; None if vLLM refuses it."""
    from vllm.lora.peft_helper import PEFTHelper

    try:
        helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=512)
        helper.validate_legal(SimpleNamespace(max_lora_rank=64))
    except (ValueError, TypeError, KeyError):
        return None
    return helper


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_adapter_check_accepts_what_vllm_accepts(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    ranks = (4, 8) if name == "rank_pattern" else (4, 4)
    folder = make_lora(tmp_path / "lora", config=config, ranks=ranks)
    info, helper = ours(folder), theirs(folder)
    assert (info is None) == (helper is None) or name in _STRICTER
    if info is not None:
        assert info.rank == max([helper.r, *helper.rank_pattern.values()])


def test_adapter_patterns_are_applied_as_by_vllm(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.q_proj"
    config = {"rank_pattern": {module: 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}}
    helper = theirs(make_lora(tmp_path / "lora", config=config, ranks=(4, 8)))
    assert helper.get_rank_and_scaling(module) == (8, 8 / 8)
    assert helper.get_rank_and_scaling("model.layers.0.self_attn.q_proj") == (4, 64 / 4)


def test_adapter_variants_of_vllm_are_all_known() -> None:
    from vllm.lora.peft_helper import PEFTHelper

    from service.models import lora_adapters

    known = {*lora_adapters._UNSERVED, *lora_adapters._NEUTRAL, *lora_adapters.FOLLOWED}
    own = {field.name for field in fields(PEFTHelper) if not field.name.startswith("vllm_")}
    assert own - known == set(), "a new version of vLLM reads more of adapter_config.json"
