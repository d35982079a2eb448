"""vLLM's worker on a GPU, with the parts that must be in place before graphs are captured.

An engine names it as `worker_cls` where experts are steered, or routing is captured.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from service.engine.vllm.worker.graph_capture import ChoiceRecorderMixin
from service.engine.vllm.worker.graph_steering import SteeringMixin


class GraphSteeringWorker(ChoiceRecorderMixin, SteeringMixin, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """Records the choices of gates, and steers them, under captured graphs."""
