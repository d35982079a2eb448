"""The memory plan, from what folders say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.errors import ConfigError, ModelStoreError
from service.memory import ENGINE_BYTES, REPLICA_BYTES, check_plan, folders_of, plan_pool
from service.models import AdapterInfo, ModelInfo, MoeInfo

MIB = 1024**2


def model(**changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "path": Path("m"),
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization": None,
        "parameters": 50 * MIB,
        "active_parameters": 50 * MIB,
        "weight_bytes": 100 * MIB,
        "max_context_tokens": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "layers": 8,
        "attention_heads": 8,
        "kv_heads": 4,
        "head_size": 64,
        "vocab_size": 1000,
        "tied_embeddings": True,
        "moe": None,
        "needs_custom_code": False,
        "family": "f",
    }
    return ModelInfo(**{**fields, **changes})


def adapter(rank: int = 8, parameters: int = MIB) -> AdapterInfo:
    return AdapterInfo(Path("a"), None, rank, 16.0, ("q_proj",), "float32", parameters, 4 * MIB)


def config(pool: dict[str, Any] | None = None, **vllm: Any) -> Config:
    options = {"dtype": "float32", "kv_cache_bytes": "128MiB", **vllm}
    return Config.model_validate(
        {
            "experts": {"base": {"model": "m"}, "tuned": {"base": "base", "adapter": "a"}},
            "pools": {"cpu": {"vllm": options, **(pool or {})}},
        }
    )


def inspect(base: ModelInfo | None = None, tuned: AdapterInfo | None = None) -> Any:
    found = {"base": base or model(), "tuned": tuned or adapter()}
    return found.__getitem__


def test_bytes_add_up_on_a_cpu() -> None:
    plan = plan_pool(config(), "cpu", inspect())
    (engine,) = plan.engines
    # bfloat16 on disk, float32 in memory, and packed beside itself while it loads.
    assert engine.weight_bytes == 100 * MIB * 2 * 2
    assert engine.adapter_bytes == 4 * MIB
    assert engine.kv_bytes == 128 * MIB
    assert engine.kv_tokens == 128 * MIB // (2 * 8 * 4 * 64 * 4)
    assert engine.overhead_bytes == ENGINE_BYTES
    assert plan.total_bytes == REPLICA_BYTES + (400 + 4 + 128) * MIB + ENGINE_BYTES
    assert engine.adapters == ("tuned",)


def test_on_a_gpu_weights_count_once_and_processes_not_at_all() -> None:
    plan = plan_pool(config({"gpus": 1}, dtype="auto"), "cpu", inspect())
    assert plan.total_bytes == (100 + 2 + 128) * MIB


def test_a_simulated_pool_needs_nothing() -> None:
    assert plan_pool(config({"engine": "simulated"}), "cpu", inspect()).total_bytes == 0


def test_the_bound_is_held() -> None:
    plan = plan_pool(config({"memory_bytes": "1GiB"}), "cpu", inspect())
    with pytest.raises(ConfigError) as caught:
        check_plan(plan, None)
    need = f"{plan.total_bytes / 1024**3:.2f} GiB"
    assert caught.value.message == (
        f"pools.cpu.memory_bytes: the experts need {need}, and only 1.00 GiB are allowed"
    )
    plan = plan_pool(config(), "cpu", inspect())
    check_plan(plan, plan.total_bytes)
    with pytest.raises(ConfigError, match=r"this machine has 1\.00 GiB"):
        check_plan(plan, 1024**3)


@pytest.mark.parametrize(
    ("base", "tuned", "vllm", "words"),
    [
        (model(needs_custom_code=True), None, {}, "brings its own code, which is not run"),
        (model(), None, {"max_model_len": 4096}, "was made for at most 2048 tokens"),
        (model(), adapter(rank=16), {}, "its rank is 16, and vllm.max_lora_rank is 8"),
        (model(), None, {"kv_cache_bytes": "1MiB"}, "or set vllm.max_model_len to at most 64"),
        (model(moe=MoeInfo(4, 2, 64)), None, {}, "LoRA on a mixture-of-experts model needs a GPU"),
        (adapter(), None, {}, "holds an adapter, not a model"),
        (model(), model(), {}, "holds a model, not an adapter"),
    ],
)
def test_what_can_not_work_is_said_before_anything_starts(
    base: Any, tuned: Any, vllm: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_pool(config(**vllm), "cpu", inspect(base, tuned))
    assert words in caught.value.message


def test_folders_are_found_or_how_to_get_them_is_said() -> None:
    assert folders_of(config(), {"m": Path("/there")}) == {
        "base": Path("/there"),
        "tuned": Path("a"),
    }
    with pytest.raises(ModelStoreError, match="get it with: coe models pull m"):
        folders_of(config(), {})
