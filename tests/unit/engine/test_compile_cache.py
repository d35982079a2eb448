"""The folders of compiled kernels."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from service.engine.compile_cache import compile_cache, without_compiler


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


@pytest.mark.parametrize(
    ("given", "there", "expected"),
    [
        ({}, "g++", {}),
        ({}, "clang++", {"TORCH_COMPILE_DISABLE": "1"}),
        ({"CXX": "clang++"}, "clang++", {}),
        ({"CXX": "clang++"}, "g++", {"TORCH_COMPILE_DISABLE": "1"}),
        ({"TORCH_COMPILE_DISABLE": "0"}, "clang++", {}),
    ],
)
def test_engines_without_a_compiler_compile_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    there: str,
    expected: dict[str, str],
) -> None:
    (tmp_path / there).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert without_compiler(given) == expected


@pytest.mark.parametrize(
    ("package", "file"), [("torch", "_dynamo/config.py"), ("vllm", "config/vllm.py")]
)
def test_compiling_nothing_is_a_setting_that_the_installed_packages_have(
    package: str, file: str
) -> None:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    source = (Path(found.submodule_search_locations[0]) / file).read_text()
    assert re.search(r'environ.get\("TORCH_COMPILE_DISABLE"[^\n]* == "1"', source)
