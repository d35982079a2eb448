"""The GPUs that nvidia-smi lists."""

from __future__ import annotations

import pytest

from service.gpu_devices import read_gpu_memory, read_gpus, visible_gpus

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
