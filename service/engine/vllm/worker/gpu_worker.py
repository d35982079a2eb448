"""vLLM's worker on a GPU, with what has to be in place before graphs are captured.

Named by `worker_cls` where experts are steered, or routers looked at.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from service.engine.vllm.worker.graph_capture import Notes
from service.engine.vllm.worker.graph_steering import Stands


class StandingWorker(Notes, Stands, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """See `Notes` and `Stands`."""
