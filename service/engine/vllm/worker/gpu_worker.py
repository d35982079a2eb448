"""vLLM's worker on a GPU, with the parts that must be installed before graphs are captured.

An engine uses it as `worker_cls` where it steers experts or captures routing.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from service.engine.vllm.worker.gate_choice_recorder import ChoiceRecorderMixin
from service.engine.vllm.worker.graph_steering import SteeringMixin


class GraphSteeringWorker(ChoiceRecorderMixin, SteeringMixin, Worker):  # type: ignore[misc]  # vLLM is not read for types
    """Records and steers the choices of gates under captured graphs."""
