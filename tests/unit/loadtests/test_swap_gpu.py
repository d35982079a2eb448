"""The GPU swap load test, as far as it runs without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.swap_gpu import __main__ as swap_gpu
from loadtests.swap_gpu.pinned_copies import copy_apart_s
from loadtests.swap_gpu.random_llama import SHAPES, write_random
from service.models import ModelInfo, inspect_model

torch = pytest.importorskip("torch")


def test_swap_gpu_model_has_seven_billion_parameters() -> None:
    assert SHAPES["7b"].parameters == 7_241_732_096


def test_swap_gpu_random_models_are_one_family(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    one, two = (write_random(tmp_path / name, shape, seed) for seed, name in enumerate("ab"))
    infos = [inspect_model(folder) for folder in (one, two)]
    for info in infos:
        assert isinstance(info, ModelInfo)
        assert (info.parameters, info.weight_bytes) == (shape.parameters, shape.weight_bytes)
        assert info.dtype == "bfloat16"
    assert infos[0].family == infos[1].family  # type: ignore[union-attr]
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == ["model-0.safetensors", "model-1.safetensors", "model-rest.safetensors"]
    assert (one / files[0]).read_bytes() != (two / files[0]).read_bytes()


def test_copies_run_in_a_process_of_their_own() -> None:
    assert len(copy_apart_s(1 << 20, 3, device="cpu")) == 3
    with pytest.raises(RuntimeError, match="copying from pinned memory failed"):
        copy_apart_s(1 << 20, 3, device="no such device")


@pytest.mark.parametrize(("inplace_s", "met"), [(0.62, True), (0.64, False)])
def test_swap_gpu_computes_its_targets(inplace_s: float, met: bool) -> None:
    told: list[dict[str, Any]] = []
    found = swap_gpu.Found(14_000_000_000, known=told.append)
    fields = {swap_gpu.BUS: 0.5, swap_gpu.INPLACE: inplace_s, swap_gpu.WAKE: 0.9}
    for name, seconds in fields.items():
        for _ in range(5):
            found.add(name, seconds)
    found.done(*fields)
    assert told[0] == {"what": swap_gpu.BUS, "median_s": 0.5, "times": 5, "gb_s": 28.0}
    report = swap_gpu.report_of(found)
    (reach,) = report.reach
    assert (reach.target, reach.ok) == (0.8, met)
    assert reach.value == pytest.approx(0.5 / inplace_s, rel=1e-4)
    assert report.facts["times as fast as waking"]["value"] == pytest.approx(0.9 / inplace_s)
    assert "28.00" in report.tables[0].text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would be measured")
def test_swap_gpu_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap_gpu", "--shape", "tiny"])
    assert swap_gpu.main() == 1
    assert "no GPU here" in capsys.readouterr().err
