"""vLLM's worker on a GPU, with standing rules: named by `worker_cls` where experts are steered."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from service.engine.vllm_standing import Stands


class StandingWorker(Stands, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """See `Stands`."""
