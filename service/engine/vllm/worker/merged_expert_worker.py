"""vLLM's worker on CPU for an engine that starts with a merged expert.

The adapter is added while the weights are read, so that they are read once and held once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker

from service.engine.steering_data import MERGED_KEY
from service.models.lora_merge import LoraDelta

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig


class MergedWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """Merges the adapter that `additional_config` names into the weights that it loads."""

    # Set by vLLM.
    vllm_config: VllmConfig

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with the adapter added.

        Raises:
            ValueError: The adapter can't be merged.
        """
        merged = self.vllm_config.additional_config[MERGED_KEY]
        with _merging(LoraDelta(Path(merged["folder"]), merged["strength"])):
            super().load_model(*args, **kwargs)


@contextmanager
def _merging(delta: LoraDelta) -> Iterator[None]:
    """Let vLLM's loader add the adapter to all weights that it reads within the context.

    This is safe because the process loads only one model.
    """
    read = DefaultModelLoader.get_all_weights

    def get_all_weights(
        self: DefaultModelLoader, model_config: ModelConfig, model: torch.nn.Module
    ) -> Iterable[tuple[str, torch.Tensor]]:
        return delta.applied(read(self, model_config, model))

    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = read
