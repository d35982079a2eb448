"""The folders of compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.compile_cache import compile_cache


def test_compile_cache_is_apart_for_each_kind_of_gpu(tmp_path: Path) -> None:
    h200 = compile_cache(tmp_path, "NVIDIA H200", {})
    rtx = compile_cache(tmp_path, "NVIDIA GeForce RTX 4090", {})
    assert h200 == {
        "VLLM_CACHE_ROOT": str(tmp_path / ".compiled/nvidia-h200/vllm"),
        "TRITON_CACHE_DIR": str(tmp_path / ".compiled/nvidia-h200/triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / ".compiled/nvidia-h200/inductor"),
    }
    assert not set(h200.values()) & set(rtx.values())
    for folder in (*h200.values(), *rtx.values()):
        assert Path(folder).is_dir()
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("name", ["", "../..", "a/b", "…"])
def test_compile_cache_stays_inside_the_models_folder(tmp_path: Path, name: str) -> None:
    for folder in compile_cache(tmp_path, name, {}).values():
        assert Path(folder).resolve().is_relative_to(tmp_path / ".compiled")


def test_compile_cache_leaves_what_the_operator_set(tmp_path: Path) -> None:
    found = compile_cache(tmp_path, "H200", {"VLLM_CACHE_ROOT": "/fast/disk"})
    assert found.keys() == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}


def test_compile_cache_where_nothing_can_be_written_sets_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".compiled").write_text("a file")
    assert compile_cache(tmp_path, "H200", {}) == {}
    assert "compiles them again" in caplog.text
