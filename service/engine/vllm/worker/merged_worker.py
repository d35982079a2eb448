"""vLLM's worker on CPU for an engine that starts with a merged expert: its adapter is added as the
weights are read, so that they are in memory once, and are read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker

from service.engine.steering_spec import MERGED
from service.models.lora_merge import LoraDelta


class MergedWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """Reads from `additional_config` which adapter to merge, and how strongly."""

    # Set by vLLM.
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with the adapter added. Raises ValueError where it can't be."""
        told = self.vllm_config.additional_config[MERGED]
        with _merging(LoraDelta(Path(told["folder"]), told["strength"])):
            super().load_model(*args, **kwargs)


@contextmanager
def _merging(delta: LoraDelta) -> Iterator[None]:
    """Within, what vLLM's loader reads has the adapter added. This process loads one model."""
    read = DefaultModelLoader.get_all_weights

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterable[Any]:
        return delta.applied(read(self, model_config, model))

    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = read
