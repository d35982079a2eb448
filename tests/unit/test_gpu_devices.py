"""The GPUs that nvidia-smi lists."""

from __future__ import annotations

from service.gpu_devices import read_gpus


def test_gpus_are_read_from_nvidia_smi() -> None:
    told = "NVIDIA H100 80GB HBM3, 81559\nSome, GPU, 24564\n\nNo devices were found\nX, [N/A]\n"
    assert [(g.name, g.memory_bytes >> 20) for g in read_gpus(told)] == [
        ("NVIDIA H100 80GB HBM3", 81559),
        ("Some, GPU", 24564),
    ]
