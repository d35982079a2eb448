"""vLLM's worker with slots for some routed experts computes what it computes with all of them.

First in a process of its own, without an engine around it, and then in an engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.config.moe_options import ExpertOffload
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.errors import ExpertFailedError
from tests.support.engine import tiny_mixtral
from tests.support.engine.real_engines import ENVIRONMENT, ON_ONE_ENGINE, OPTIONS, ask
from tests.support.tiny_moe import EXPERTS, LAYERS, save, tiny_moe

pytestmark = ON_ONE_ENGINE
_ROOT = Path(__file__).parents[2]


def test_layers_with_one_slot_half_and_all_compute_what_all_experts_compute(
    tmp_path: Path,
) -> None:
    # Its experts are padded for the kernel, and it has shared experts beside the routed ones.
    folder = save(tiny_moe("qwen2_moe"), tmp_path / "model")
    store = tmp_path / "store"
    store.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.engine.offload_worker_child", folder, store],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["experts"] == EXPERTS
    # Steps in one pass, with room for all experts, are equal bit for bit.
    assert report[str(EXPERTS)]["same_bits"]
    for slots in (1, EXPERTS // 2, EXPERTS):
        found = report[str(slots)]
        # Passes add the experts of a token in another order: float32 has 24 bits.
        assert found["difference"] <= 2**-20 * found["largest"]
        assert len(found["counters"]) == LAYERS
        for layer in found["counters"]:
            reads = layer["waits"] + layer["prefetched"]
            assert reads == EXPERTS if slots == EXPERTS else reads > EXPERTS
            assert layer["passes"] >= layer["uses"] / slots
    assert report["damaged"].startswith("ExpertFileError: ")
    assert "does not match its digest; delete the file" in report["damaged"]
    assert "takes 24576; allowed is that or more" in report["too_small"]


async def test_engine_with_one_slot_or_half_says_what_it_says_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ.update(ENVIRONMENT)
    monkeypatch.setenv("COE_MODELS", str(tmp_path / "store"))
    folder = tiny_mixtral.mixtral(tmp_path / "model", 0)
    expected, _ = await _said(folder, None)
    for slots in (1, tiny_mixtral.EXPERTS // 2):
        answers, counters = await _said(folder, slots)
        assert answers == expected
        assert len(counters) == tiny_mixtral.LAYERS
        for layer in counters:
            reads = layer["waits"] + layer["prefetched"]
            assert layer["read_bytes"] == reads * _EXPERT_BYTES
            assert reads > tiny_mixtral.EXPERTS
    (packed,) = (tmp_path / "store" / ".packed-experts").iterdir()
    with packed.open("r+b") as file:
        file.seek(5000)
        file.write(bytes(64))
    with pytest.raises(ExpertFailedError):
        await _said(folder, 1)


_EXPERT_BYTES = 3 * tiny_mixtral.SHAPE.hidden * tiny_mixtral.SHAPE.inner * 4


async def _said(folder: str, slots: int | None) -> tuple[str, list[dict[str, Any]]]:
    """What an engine says, and the counters of its layers. None: all experts are in memory."""
    offload = None
    if slots is not None:
        offload = ExpertOffload(bytes=tiny_mixtral.LAYERS * slots * _EXPERT_BYTES)
    options = OPTIONS.model_copy(update={"expert_offload": offload})
    engine = VllmEngine(VllmModel("m", folder, {}), options, on_cpu=True)
    counters: list[dict[str, Any]] = []
    try:
        await engine.start()
        answers = await ask(engine, "m")
        if offload is not None:
            (counters,) = await engine.vllm.collective_rpc("expert_slot_counters")
        return answers, counters
    finally:
        await engine.stop()
