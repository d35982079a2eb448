"""vLLM's worker on a GPU, with what has to be in place before graphs are captured.

Named by `worker_cls` where experts are steered, or routers looked at.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from service.engine.vllm.worker.graph_capture import ChoiceRecorderMixin
from service.engine.vllm.worker.graph_steering import SteeringMixin


class GraphSteeringWorker(ChoiceRecorderMixin, SteeringMixin, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """See `ChoiceRecorderMixin` and `SteeringMixin`."""
