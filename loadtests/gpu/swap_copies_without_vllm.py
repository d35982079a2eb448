"""`python -m loadtests.gpu.swap_copies_without_vllm`: the copies under a swap in place.

It needs torch alone. One line of JSON for each finding, as soon as it is known: what the bus can
do, what writing and registering an expert's shared memory takes and what that does to decodes
beside it, how fast the weights are copied into live tensors, and whether captured graphs see what
was copied.
`--cpu` tries the program out without a GPU, with small tensors; its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.engine.shared_memory_tensors import write_file
from service.engine.vllm.worker.pinned_swap_extension import (
    PinnedWeights,
    copy_all,
    copy_to,
    describe,
    pinned,
)

_GIB = 1024**3
_TIMES = 10


class Sizes:
    """Sizes of a Llama of 7 B parameters, or of a small one on a CPU. Half its layers will do."""

    def __init__(self, *, on_cpu: bool, layers: int) -> None:
        self.device = "cpu" if on_cpu else "cuda"
        self.layers = 2 if on_cpu else layers
        self.hidden, self.inner = (64, 96) if on_cpu else (4096, 14336)
        self.vocabulary, self.narrow = (256, 32) if on_cpu else (32000, 1024)
        self.bus_bytes = 1 << 20 if on_cpu else 4 * _GIB

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        """Random tensors on the device, with the shapes that vLLM fuses a Llama's into."""
        torch.manual_seed(seed)

        def made(*shape: int) -> torch.Tensor:
            noise = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
            return noise * shape[-1] ** -0.5

        found = {
            "embed": made(self.vocabulary, self.hidden),
            "head": made(self.vocabulary, self.hidden),
        }
        for i in range(self.layers):
            found |= {
                f"{i}.qkv": made(self.hidden + 2 * self.narrow, self.hidden),
                f"{i}.o": made(self.hidden, self.hidden),
                f"{i}.gate_up": made(2 * self.inner, self.hidden),
                f"{i}.down": made(self.hidden, self.inner),
                f"{i}.norm": torch.ones(self.hidden, device=self.device, dtype=torch.bfloat16),
            }
        return found


class DecodeSteps:
    """Steps that read live weights as decodes do, in a captured graph where there is a GPU."""

    def __init__(self, live: dict[str, torch.Tensor], sizes: Sizes) -> None:
        self._live, self._sizes = live, sizes
        self._input = torch.randn(4, sizes.hidden, device=sizes.device, dtype=torch.bfloat16)
        self._graph: Any = None
        if sizes.device == "cpu":
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._step()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._step()

    def _step(self) -> torch.Tensor:
        x = self._input
        for i in range(self._sizes.layers):
            inner = x @ self._live[f"{i}.gate_up"].T
            x = x + torch.tanh(inner[:, : self._sizes.inner]) @ self._live[f"{i}.down"].T
        return x @ self._live["head"].T

    def run(self) -> torch.Tensor:
        """Run one step, and wait for its output."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        torch.cuda.synchronize()
        return self._output

    def time_s(self) -> float:
        """Return the seconds of one step."""
        began_s = time.perf_counter()
        self.run()
        return time.perf_counter() - began_s


def tell(what: str, **found: Any) -> None:
    """Print a finding."""
    print(json.dumps({"what": what, **found}), flush=True)


def _synchronize(sizes: Sizes) -> None:
    if sizes.device != "cpu":
        torch.cuda.synchronize()


def _median_s(sizes: Sizes, act: Callable[[], Any], times: int) -> float:
    took = []
    for _ in range(times + 1):
        _synchronize(sizes)
        began_s = time.perf_counter()
        act()
        _synchronize(sizes)
        took.append(time.perf_counter() - began_s)
    return statistics.median(took[1:])


def machine(sizes: Sizes) -> None:
    """Tell what the figures were measured on."""
    shared = os.statvfs("/dev/shm")
    tell(
        "machine",
        torch=torch.__version__,
        gpu="none" if sizes.device == "cpu" else torch.cuda.get_device_name(),
        shared_memory_gb=round(shared.f_blocks * shared.f_frsize / 1e9, 1),
        cores=os.cpu_count(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
    )


def bus(sizes: Sizes) -> None:
    """Tell the bandwidth of plain copies, from pinned and from pageable memory."""
    size = sizes.bus_bytes
    there = torch.empty(size, dtype=torch.uint8, device=sizes.device)
    for kind in ("pinned", "pageable"):
        pin = kind == "pinned" and sizes.device != "cpu"
        here = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
        to_s = _median_s(sizes, partial(there.copy_, here, non_blocking=True), 5)
        back_s = _median_s(sizes, partial(here.copy_, there, non_blocking=True), 3)
        tell(f"bus, {kind} memory", to_gb_s=size / to_s / 1e9, back_gb_s=size / back_s / 1e9)


def exchanges(sizes: Sizes, folder: Path) -> None:
    """Tell what filling two experts' memory and copying them in turn takes."""
    live = sizes.tensors(0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    decode = DecodeSteps(live, sizes)
    held: list[PinnedWeights] = []
    expected: list[tuple[list[int], torch.Tensor]] = []
    for seed in (1, 2):
        for name, tensor in sizes.tensors(seed).items():
            live[name].copy_(tensor)
        expected.append((_sums(live), decode.run().clone()))
        began_s = time.perf_counter()
        mapped = write_file(folder / str(seed), describe(live), partial(copy_to, live), "gpu")
        wrote_s = time.perf_counter() - began_s
        alone = [decode.time_s() for _ in range(200)]
        registered: list[PinnedWeights] = []

        def register(mapped: Any = mapped, registered: list[PinnedWeights] = registered) -> None:
            registered.append(pinned(mapped))

        thread = threading.Thread(target=register)
        began_s = time.perf_counter()
        thread.start()
        beside = [decode.time_s()]
        while thread.is_alive():
            beside.append(decode.time_s())
        thread.join()
        registered_s = time.perf_counter() - began_s
        held.extend(registered)
        tell(
            "fill",
            gb=size / 1e9,
            write_gb_s=size / wrote_s / 1e9,
            register_s=registered_s,
            step_ms_alone=1e3 * statistics.median(alone),
            step_ms_beside=1e3 * statistics.median(beside),
            longest_step_ms_alone=1e3 * max(alone),
            longest_step_ms_beside=1e3 * max(beside),
        )
    took, right, seen = [], True, True
    for turn in range(_TIMES):
        _synchronize(sizes)
        began_s = time.perf_counter()
        copy_all(held[turn % 2], live)
        took.append(time.perf_counter() - began_s)
        sums, output = expected[turn % 2]
        right &= _sums(live) == sums
        seen &= torch.equal(decode.run(), output)
    tell(
        "copy_all",
        gb=size / 1e9,
        tensors=len(live),
        median_s=statistics.median(took[2:]),
        gb_s=size / statistics.median(took[2:]) / 1e9,
        every_tensor_is_right=right,
        captured_graph_sees_it=seen,
    )
    for weights in held:
        weights.release()


def _sums(tensors: dict[str, torch.Tensor]) -> list[int]:
    return [int(tensor.view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors.values()]


def main() -> int:
    """Run every part; one that fails is a line with its reason. Return 1 where any failed."""
    words = argparse.ArgumentParser(prog="python -m loadtests.gpu.swap_copies_without_vllm")
    words.add_argument("--cpu", action="store_true", help="try the program out without a GPU")
    words.add_argument(
        "--layers", type=int, default=16, help="layers of a 7 B model (default 16: 7.5 GB)"
    )
    given = words.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        tell("copies", failed="no GPU here (torch.cuda.is_available() is False)")
        return 1
    sizes = Sizes(on_cpu=given.cpu, layers=given.layers)
    folder = Path(tempfile.mkdtemp(prefix="coe-copies-", dir="/dev/shm"))
    failed = 0
    try:
        for part in (machine, bus, partial(exchanges, folder=folder)):
            try:
                part(sizes)
            except (RuntimeError, OSError) as error:
                name = getattr(part, "__name__", "exchanges")
                tell(name, failed=f"{type(error).__name__}: {error}"[:600])
                failed = 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
