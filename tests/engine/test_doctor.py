"""`coe doctor` with real engines on a CPU, and up to the first kernel where a GPU is pretended."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from service.cli.doctor.layouts_to_try import default_subject
from service.cli.doctor.trial_runner import prove
from service.engine.swap_proof import Verdict
from tests.support.engine.real_engines import ENVIRONMENT

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
# Three minutes are the command's own limit; a busy machine may get more.
_LIMIT_S = 280.0


def test_quick_doctor_proves_swaps_in_place_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    told: list[str] = []
    found = prove(
        default_subject(on_gpu=False),
        quick=True,
        deadline_s=time.monotonic() + _LIMIT_S,
        tell=told.append,
        folder=tmp_path,
    )
    assert found["inplace"].verdict is Verdict.PROVEN, (found, told)
    for name in ("start_s", "fill_s", "swap_s", "fill_bytes_per_s", "memory_bytes_per_s"):
        assert found["inplace"].figures[name] > 0
    assert found["sleep"].verdict is Verdict.UNAVAILABLE
    assert not list(tmp_path.iterdir()), "models stayed"


def test_doctor_on_a_pretended_gpu_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The core inherits the pretended platform.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    told: list[str] = []
    found = prove(
        default_subject(on_gpu=True),
        quick=True,
        deadline_s=time.monotonic() + _LIMIT_S,
        tell=told.append,
        launcher=(sys.executable, "-m", "tests.support.engine.pretended_gpu_trial"),
        folder=tmp_path,
    )
    assert found.keys() == {"inplace"}
    assert found["inplace"].verdict is Verdict.FAILED, found
    # The core is as far as its worker's look for a device.
    assert found["inplace"].reason.startswith("starting an engine: AssertionError: "), found
    assert "out of bounds for 0 devices" in found["inplace"].reason
    assert any("bandwidth is unknown" in line for line in told)
