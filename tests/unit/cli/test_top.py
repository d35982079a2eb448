"""What `coe top` shows of GPUs."""

from __future__ import annotations

from typing import Any

from service.cli.top import gpu_lines

GIB = 1024**3


def gpu(index: int, reserved: int) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "H200",
        "total_bytes": 140 * GIB,
        "used_bytes": 60 * GIB,
        "free_bytes": 79 * GIB,
        "reserved_bytes": reserved * GIB,
    }


def test_gpu_lines_count_a_gpu_of_two_pools_once() -> None:
    state = {"pools": [{"gpus": [gpu(1, 30)]}, {"gpus": [gpu(0, 50), gpu(1, 25)]}, {"gpus": []}]}
    assert gpu_lines(state) == [
        "GPU 0, H200: 60.00 GiB used of 140.00 GiB, 50.00 GiB reserved, 79.00 GiB free",
        "GPU 1, H200: 60.00 GiB used of 140.00 GiB, 55.00 GiB reserved, 79.00 GiB free",
    ]


def test_gpu_lines_of_pools_on_cpu_are_none() -> None:
    assert gpu_lines({"pools": [{}, {"gpus": []}]}) == []
