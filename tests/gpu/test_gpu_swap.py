"""Swaps on a GPU. Without a GPU each test is skipped with that reason."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.config import VllmOptions
from service.engine.gpu_share import GpuShare
from service.engine.shared_weight_cache import SharedWeightCache
from tests.support.engine.real_engines import ask, demo
from tests.support.small_models import small_model


def why_no_gpu() -> str | None:
    """Why there is none, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "no GPU here (torch.cuda.is_available() is False)"


pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(why_no_gpu() is not None, reason=why_no_gpu() or ""),
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = VllmOptions(
    dtype="bfloat16", max_model_len=512, kv_cache_bytes=256 * 1024**2, max_num_seqs=8
)

# Two engines on one GPU: vLLM lets each start only where its share is free.
SHARE = GpuShare(0.4)


@pytest.mark.parametrize("eager", [True, False])
async def test_gpu_swap_copies_weights_into_live_parameters(eager: bool) -> None:
    """With captured graphs, too: outputs are the same before, between and after swaps."""
    from service.engine.vllm.swapping_engine import SwappingVllmEngine

    options = OPTIONS.model_copy(update={"enforce_eager": eager})
    cache = SharedWeightCache(None)
    engine = SwappingVllmEngine(
        "base", demo(), options, on_cpu=False, canary_interval=5, canaries={}, cache=cache
    )
    try:
        await engine.start()
        answers = {"base": await ask(engine, "base")}
        for name in ("math", "intents"):
            await engine.load_to_host(name)
            assert (await engine.swap_in(name)).ok
            answers[name] = await ask(engine, name)
        assert len(set(answers.values())) == 3
        for _ in range(5):
            for name, expected in answers.items():
                assert (await engine.swap_in(name)).ok
                assert await ask(engine, name) == expected
    finally:
        await engine.stop()
        cache.close()


async def test_gpu_engines_of_one_pool_share_one_file_per_expert() -> None:
    from service.engine.vllm.swapping_engine import SwappingVllmEngine

    cache = SharedWeightCache(None)
    engines = [
        SwappingVllmEngine(
            "base",
            demo(),
            OPTIONS,
            on_cpu=False,
            canary_interval=5,
            canaries={},
            cache=cache,
            gpu_share=SHARE,
        )
        for _ in range(2)
    ]
    try:
        answers = []
        for engine in engines:
            await engine.start()
            filled = await engine.load_to_host("math")
            assert (await engine.swap_in("math")).ok
            answers.append(await ask(engine, "math"))
        assert answers[0] == answers[1]
        # The base's and the expert's, each once; the second engine only mapped them.
        assert len(cache.sizes()) == 2
        assert sum(cache.sizes().values()) < 2.1 * filled.host_bytes
        await engines[0].stop()
        assert (await engines[1].swap_in("base")).ok
        assert (await engines[1].swap_in("math")).ok
        assert await ask(engines[1], "math") == answers[0]
        assert len(cache.sizes()) == 2
    finally:
        for engine in engines:
            await engine.stop()
        cache.close()
    assert not cache.folder.exists()


@pytest.mark.parametrize("level", [1, 2])
async def test_gpu_engines_of_two_families_sleep_in_turn(level: int, tmp_path: Path) -> None:
    from service.engine.sleeping_engines import SleepingEngines
    from service.engine.vllm.engine import VllmEngine, VllmModel

    other = tmp_path / "other"
    shutil.copytree(small_model(), other)
    config: dict[str, Any] = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e4}))
    folders = {"one": str(small_model()), "two": str(other)}

    def build(name: str) -> VllmEngine:
        model = VllmModel(name, folders[name], {})
        return VllmEngine(model, OPTIONS, on_cpu=False, sleep_level=level, gpu_share=SHARE)

    engines = SleepingEngines("one", {name: (name,) for name in folders}, build, {})
    try:
        await engines.start()
        answers = {"one": await ask(engines, "one")}
        await engines.swap_in("two")
        answers["two"] = await ask(engines, "two")
        for _ in range(3):
            for name, expected in answers.items():
                await engines.swap_in(name)
                assert await ask(engines, name) == expected
    finally:
        await engines.stop()


def test_gpu_swap_every_byte_arrives_where_the_graphs_read_it(tmp_path: Path) -> None:
    import torch

    from service.engine.shared_memory_tensors import write_file
    from service.engine.vllm.worker.pinned_swap_extension import copy_all, copy_to, describe, pinned

    live = {"w": torch.zeros(1 << 20, device="cuda"), "b": torch.zeros(7, device="cuda")}
    made = {name: torch.randn_like(tensor) for name, tensor in live.items()}
    mapped = write_file(tmp_path / "w.weights", describe(made), partial(copy_to, made), "t")
    held = pinned(mapped)
    assert all(tensor.is_pinned() for tensor in held.tensors.values())
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    copy_all(held, live)
    for name, tensor in live.items():
        assert torch.equal(tensor.cpu(), held.tensors[name])
        assert torch.equal(tensor, made[name])
        assert tensor.data_ptr() == addresses[name]
    held.release()
