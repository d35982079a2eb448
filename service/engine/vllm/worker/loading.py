"""A second model beside the running one, of its shape, that shares nothing with it but attention.

vLLM's own classes build it and its own loader fills it, so fused, tied and packed weights
are exactly what vLLM would have made; on CPU each matrix is packed as it is read
(`vllm_packing`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from service.engine.vllm.worker.packing import ScratchBuffers, packing_as_read, packing_tied_once
from service.models.lora_merge import LoraDelta


class ShadowModel:
    """A model on its way in.

    Building it (`__init__`) takes some tens of milliseconds of Python and sets torch's
    default dtype, which is the whole process's: do it where nothing else computes.
    `load` may run in a thread beside the running model.
    """

    def __init__(self, vllm_config: Any, folder: str, device: str | None = None) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        own = copy.copy(vllm_config)
        own.model_config = copy.copy(vllm_config.model_config)
        own.model_config.model = folder
        own.compilation_config = copy.copy(vllm_config.compilation_config)
        own.compilation_config.static_forward_context = {}
        if hasattr(own.compilation_config, "static_all_moe_layers"):
            own.compilation_config.static_all_moe_layers = []
        own.load_config = copy.copy(vllm_config.load_config)
        own.load_config.use_tqdm_on_load = False
        self._config = own
        self._device = torch.device(device or own.device_config.device)
        with (
            set_current_vllm_config(own),
            set_default_torch_dtype(own.model_config.dtype),
            self._device,
        ):
            self.model = initialize_model(vllm_config=own, model_config=own.model_config)

    @property
    def layers(self) -> dict[str, Any]:
        """Its layers that vLLM knows by name."""
        layers: dict[str, Any] = self._config.compilation_config.static_forward_context
        return layers

    def load(
        self, adapter: LoraDelta | None, scratch: ScratchBuffers, *, finish: bool = True
    ) -> None:
        """Read and pack the weights, an adapter's added. Raises what vLLM does, ValueError too.

        `finish`: make of them what the kernels want; else they stay as vLLM's loader puts them.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        class Loader(DefaultModelLoader):  # type: ignore[misc]  # vllm is not read for types
            def get_all_weights(self, model_config: Any, model: Any) -> Iterable[Any]:
                weights = super().get_all_weights(model_config, model)
                return weights if adapter is None else adapter.applied(weights)

        config = self._config
        with set_current_vllm_config(config):
            with packing_as_read(self.model, scratch):
                Loader(config.load_config).load_weights(self.model, config.model_config)
            if not finish:
                return
            with packing_tied_once(self.model, scratch):
                process_weights_after_loading(self.model, config.model_config, self._device)
        self.model.eval()

    def share_attention(self, running: dict[str, Any]) -> dict[str, Any]:
        """Put the running attention layers into this model; return its other named layers.

        Raises ValueError where an attention layer has something of its own (scales of a
        quantised KV cache), which the running one does not have.
        """
        places = {
            id(child): (parent, name)
            for parent in self.model.modules()
            for name, child in parent.named_children()
        }
        own: dict[str, Any] = {}
        for name, layer in self.layers.items():
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


def is_attention(layer: Any) -> bool:
    """Whether a layer holds a part of the KV cache."""
    return hasattr(layer, "kv_cache")


def check_alike(model: Any, running: Any) -> None:
    """Raises ValueError where a model has other tensors than the running one, by dtype and shape.

    Both as they are after packing, which empties some.
    """
    mine, theirs = _shapes(model), _shapes(running)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {mine.get(name, 'missing')}, and {theirs.get(name, 'missing')} "
                "in the running model"
            )


def _shapes(model: Any) -> dict[str, str]:
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
