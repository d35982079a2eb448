"""The GPUs that nvidia-smi lists."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from service import gpu_devices
from service.gpu_devices import (
    driver_version,
    gpu_memory,
    gpus,
    read_gpu_memory,
    read_gpus,
    visible_gpus,
)

LISTED = """0, GPU-aa11, NVIDIA H200, 143771, 1024, 142000
1, GPU-ab22, Some, GPU, 24564, 20000, 4000
2, GPU-bb33, NVIDIA L4, [N/A], [N/A], [N/A]
3, GPU-cc44, NVIDIA L4, 23034, 0, 22500
No devices were found

"""


def test_gpus_are_read_from_nvidia_smi() -> None:
    told = "NVIDIA H100 80GB HBM3, 81559\nSome, GPU, 24564\n\nNo devices were found\nX, [N/A]\n"
    assert [(g.name, g.memory_bytes >> 20) for g in read_gpus(told)] == [
        ("NVIDIA H100 80GB HBM3", 81559),
        ("Some, GPU", 24564),
    ]


def test_memory_is_read_from_nvidia_smi() -> None:
    found = read_gpu_memory(LISTED)
    assert [(g.index, g.uuid, g.name) for g in found] == [
        (0, "GPU-aa11", "NVIDIA H200"),
        (1, "GPU-ab22", "Some,GPU"),
        (3, "GPU-cc44", "NVIDIA L4"),
    ]
    assert [size >> 20 for size in (found[0].total_bytes, found[0].used_bytes)] == [143771, 1024]
    assert found[1].free_bytes == 4000 << 20


@pytest.mark.parametrize(
    ("given", "visible"),
    [
        (None, [0, 1, 3]),
        ("", []),
        ("3,0", [3, 0]),
        ("GPU-ab22", [1]),
        ("GPU-c, 1", [3, 1]),
        ("GPU-a,1", []),  # two GPUs begin so
        ("0,7,1", [0]),  # CUDA stops at the first that is not there
        ("1,1", [1]),
        ("-1", []),
    ],
)
def test_visible_gpus_are_those_of_cuda(given: str | None, visible: list[int]) -> None:
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    found = visible_gpus(read_gpu_memory(LISTED), environ)
    assert [gpu.index for gpu in found] == visible


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of what stands in for nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "nvidia-smi"
    path.touch(0o755)
    return path


@pytest.mark.parametrize(
    "body",
    [
        "exit 9",
        "printf '\\377\\376\\000\\200, \\262'",
        "printf 'H200, \\302\\262\\n'",
        "printf '0, GPU-a, H200, 1e9, -1, 0x10\\n'",
        "printf '%s\\n' 'Failed to initialize NVML: Driver/library version mismatch'",
        "printf '%s\\n' 'No devices were found'",
        "kill -9 $$",
    ],
)
def test_garbage_of_nvidia_smi_lists_no_gpu(tool: Path, body: str) -> None:
    tool.write_text(f"#!/bin/sh\n{body}\n")
    assert (gpus(), gpu_memory(), driver_version()) == ((), (), "")


def test_names_are_shown_without_control_characters(tool: Path) -> None:
    tool.write_text("#!/bin/sh\nprintf '0, GPU-a, H\\033[31m200, 10, 4, 6\\n'\n")
    (gpu,) = gpu_memory()
    assert gpu.name == "H[31m200"


def test_numbers_of_other_scripts_name_no_visible_gpu() -> None:
    found = read_gpu_memory(LISTED)
    assert visible_gpus(found, {"CUDA_VISIBLE_DEVICES": "\u00b2"}) == ()


def test_nvidia_smi_that_no_signal_ends_is_left_behind(
    tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(gpu_devices, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _: None)
    began_s = time.monotonic()
    assert gpus() == ()
    assert time.monotonic() - began_s < 25
