"""See `tests.engine.seeing`: on a GPU."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from tests.engine.seeing import Sees


class SeeingGpuWorker(Sees, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """The worker of `service.engine.vllm_standing_worker`, and it writes down what it chose."""
