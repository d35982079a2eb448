"""The engines that the contract tests run against, one at a time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from service.config import SimulatedOptions, VllmOptions
from service.engine.engine_interface import Engine, EngineReport
from service.engine.simulated_engine import SimulatedEngine
from tests.support.small_models import small_model, tiny_moe


@dataclass(frozen=True)
class Subject:
    """An engine under test. `real`: it computes, and so has all of vLLM's options."""

    name: str
    engine: Any
    report: EngineReport
    expert: str
    real: bool

    async def idle(self) -> bool:
        """Whether it has nothing under way."""
        running: int = await self.engine.in_flight()
        return running == 0

    async def busy(self) -> bool:
        """Whether it has exactly one request under way."""
        running: int = await self.engine.in_flight()
        return running == 1

    def children(self) -> list[psutil.Process]:
        """The processes that this one has started for it."""
        return [p for p in psutil.Process().children(recursive=True) if _is_core(p)]


def _is_core(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return False


def _vllm(folder: Path, moe_backend: str) -> Engine:
    from service.engine.vllm.engine import VllmEngine, VllmModel

    options = VllmOptions.model_validate(
        {
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_bytes": "128MiB",
            "max_num_seqs": 16,
            "enforce_eager": True,
            "moe_backend": moe_backend,
            "tool_call_parser": "hermes",
        }
    )
    return VllmEngine(VllmModel("org/expert-1", str(folder), {}), options, on_cpu=True)


@pytest_asyncio.fixture(
    scope="session",
    loop_scope="session",
    params=[
        "simulated",
        pytest.param("vllm", marks=pytest.mark.engine),
        pytest.param("vllm-moe", marks=pytest.mark.engine),
    ],
)
async def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Subject]:
    """A started engine; afterwards nothing of it is left."""
    name: str = request.param
    expert = "org/expert-1"
    engine: Any
    if name == "simulated":
        options = SimulatedOptions(max_model_len=1024, decode_ms=5)
        engine = SimulatedEngine((expert,), options)
    elif name == "vllm":
        engine = _vllm(small_model(), "auto")
    else:
        engine = _vllm(tiny_moe(tmp_path_factory.mktemp("moe")), "auto")
    before = asyncio.all_tasks()
    report = await engine.start()
    made = Subject(name, engine, report, expert, real=name != "simulated")
    await engine.load(expert)
    yield made
    await engine.stop()
    await engine.stop()
    assert made.children() == []
    assert engine.failure() is not None
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}
    # What vLLM leaves to the collector complains here, where its warnings are let pass.
    del made, engine
    gc.collect()
