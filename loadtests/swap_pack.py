"""Measures the least time to load weights: reading the file and packing each matrix.

`python -m loadtests.swap_pack FOLDER TIMES` prints one JSON list of seconds. It runs in a process
of its own with the engine's environment. It reads safetensors into memory, concatenates the tensors
that vLLM fuses, and packs each matrix by the same oneDNN call with the same number of threads. It
builds no model, checks nothing, and merges no adapter.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def read_and_pack(folder: Path) -> float:
    """Seconds."""
    import torch
    from safetensors.torch import load_file
    from vllm import _custom_ops as ops

    began_s = time.perf_counter()
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(str(file))
    packed = []
    for parts in _FUSED:
        for name in [key for key in tensors if f".{parts[0]}.weight" in key]:
            names = [name.replace(parts[0], part) for part in parts]
            whole = torch.cat([tensors.pop(item) for item in names])
            packed.append(ops.create_onednn_mm(whole.t(), 32))
    for name in [key for key in tensors if tensors[key].dim() == 2]:
        packed.append(ops.create_onednn_mm(tensors.pop(name).t(), 32))
    took_s = time.perf_counter() - began_s
    if not packed:
        raise RuntimeError(f"{folder} has no matrices")
    return took_s


def main() -> int:
    """Print the list."""
    import vllm.platforms  # noqa: F401  # which loads the kernels
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    folder, times = Path(sys.argv[1]), int(sys.argv[2])
    read_and_pack(folder)  # the file into the page cache, oneDNN's first call
    print(json.dumps([read_and_pack(folder) for _ in range(times)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
