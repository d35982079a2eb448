"""The CPU worker with the parts of a GPU worker around it."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from service.engine.vllm.worker.gate_choice_recorder import ChoiceRecorderMixin
from service.engine.vllm.worker.graph_steering import SteeringMixin


class SeeingCpuWorker(ChoiceRecorderMixin, SteeringMixin, CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """See `service.engine.vllm.worker.gpu_worker`."""
