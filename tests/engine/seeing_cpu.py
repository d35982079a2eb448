"""See `tests.engine.seeing`: on a CPU."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from tests.engine.seeing import Sees


class SeeingCpuWorker(Sees, CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """What a GPU's worker is made of, around the CPU's."""
