"""A second model of the same architecture beside the running model. They share only attention.

vLLM's own classes build the model and vLLM's own loader fills it. Fused, tied and packed weights
are therefore exactly as in vLLM. On CPU each matrix is packed as it is read (`packing`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from service.engine.vllm.worker.model_access import is_attention, named_layers
from service.engine.vllm.worker.pack_while_loading import (
    ScratchBuffers,
    packing_as_read,
    packing_tied_once,
)
from service.models.lora_merge import LoraDelta

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class SecondModel:
    """A model that is being loaded.

    `__init__` takes some tens of milliseconds and sets torch's default dtype for the whole process.
    It must run where nothing else computes. `load` may run in a thread beside the running model.

    Args:
        config: The running engine's config.
        folder: The folder of the weights.
        device: The device to load to. None means the engine's own device.
    """

    def __init__(self, config: VllmConfig, folder: str, device: str | None = None) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        own = copy.copy(config)
        own.model_config = copy.copy(config.model_config)
        own.model_config.model = folder
        own.compilation_config = copy.copy(config.compilation_config)
        own.compilation_config.static_forward_context = {}
        if hasattr(own.compilation_config, "static_all_moe_layers"):
            own.compilation_config.static_all_moe_layers = []
        own.load_config = copy.copy(config.load_config)
        own.load_config.use_tqdm_on_load = False
        self._config = own
        self._device = torch.device(device or own.device_config.device)
        with (
            set_current_vllm_config(own),
            set_default_torch_dtype(own.model_config.dtype),
            self._device,
        ):
            self.model = initialize_model(vllm_config=own, model_config=own.model_config)

    def load(
        self, adapter: LoraDelta | None, scratch: ScratchBuffers, *, finish: bool = True
    ) -> None:
        """Read the weights.

        Args:
            adapter: A LoRA adapter to add to the weights.
            scratch: Buffers to assemble matrices in.
            finish: Whether to pack the weights for the kernels. Otherwise they stay as vLLM's
                loader leaves them.

        Raises:
            ValueError: The weights do not fit the model.
            Exception: Any error of vLLM's loader.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

        class Loader(DefaultModelLoader):  # type: ignore[misc]  # vllm is not read for types
            def get_all_weights(
                self, model_config: ModelConfig, model: torch.nn.Module
            ) -> Iterable[tuple[str, torch.Tensor]]:
                weights = super().get_all_weights(model_config, model)
                return weights if adapter is None else adapter.applied(weights)

            def _init_ep_weight_filter(self, model_config: ModelConfig) -> None:
                """Read all weights. The filter would read vLLM's current config."""

        config = self._config
        # vLLM's current config is one for the process. It is not set here for the seconds of
        # reading, because the running model's thread would see it.
        with packing_as_read(self.model, scratch):
            Loader(config.load_config).load_weights(self.model, config.model_config)
        if not finish:
            maybe_retie_word_embeddings(self.model, config.model_config)
            return
        with set_current_vllm_config(config), packing_tied_once(self.model, scratch):
            process_weights_after_loading(self.model, config.model_config, self._device)
        self.model.eval()

    def share_attention(self, running: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Put the running attention layers into this model.

        Args:
            running: The running model's layers by name.

        Returns:
            This model's other layers by name.

        Raises:
            ValueError: The scales of a quantised KV cache differ from those of the running model.
        """
        places = {
            id(child): (parent, name)
            for parent in self.model.modules()
            for name, child in parent.named_children()
        }
        own: dict[str, torch.nn.Module] = {}
        for name, layer in named_layers(self._config).items():
            if name not in running:
                raise ValueError(f"the running engine has no layer {name}")
            if not is_attention(layer):
                own[name] = layer
                continue
            mine, theirs = layer.state_dict(), running[name].state_dict()
            if mine.keys() != theirs.keys() or any(
                not torch.equal(mine[key], theirs[key]) for key in mine
            ):
                raise ValueError(f"{name} has values of its own; it can't be exchanged in place")
            parent, child = places[id(layer)]
            setattr(parent, child, running[name])
        return own


def check_alike(model: torch.nn.Module, running: torch.nn.Module) -> None:
    """Check that two packed models have the same tensors, by name, dtype and shape.

    Raises:
        ValueError: A tensor differs.
    """
    mine, theirs = _shapes(model), _shapes(running)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {mine.get(name, 'missing')}, and {theirs.get(name, 'missing')} "
                "in the running model"
            )


def _shapes(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
