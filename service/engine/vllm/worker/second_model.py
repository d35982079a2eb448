"""A second model of the same architecture beside the running model. They share only attention.

vLLM's own classes build the model and vLLM's own loader fills it. Fused, tied and packed weights
are therefore exactly as in vLLM. On CPU each matrix is packed as it is read (`packing`). Quantised
weights are made ready for their kernels by vLLM's own code, too, layer by layer between two steps
of the running model, and on the engine's device.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from service.engine.vllm.worker.cuda_runtime import cuda_runtime
from service.engine.vllm.worker.model_access import (
    PLAIN_METHODS,
    is_attention,
    named_layers,
    weight_method,
)
from service.engine.vllm.worker.model_state import move_to_host
from service.engine.vllm.worker.pack_while_loading import (
    ScratchBuffers,
    packing_as_read,
    packing_tied_once,
)
from service.engine.vllm.worker.step_turns import StepTurns
from service.engine.vllm.worker.weight_memory import tensor_bytes
from service.models.lora_merge import LoraDelta
from service.models.model_config import read_json
from service.models.quantization_form import quantization_facts

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


_HOST = torch.device("cpu")


@dataclass(slots=True)
class LayerRoom:
    """What it took on a device to make the largest layer ready.

    Attributes:
        layer_bytes: The bytes of that layer as it was stored.
        room_bytes: The most bytes on the device at once; 0 while none was made ready there.
    """

    layer_bytes: int = 0
    room_bytes: int = 0

    def add(self, layer_bytes: int, room_bytes: int) -> None:
        """Add a layer. The one that needs the most room counts."""
        if room_bytes > self.room_bytes:
            self.layer_bytes, self.room_bytes = layer_bytes, room_bytes

    @property
    def ratio(self) -> float:
        """The room in sizes of the layer, which the memory plan takes for three."""
        return self.room_bytes / self.layer_bytes if self.layer_bytes else 0.0


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

        check_same_form(Path(config.model_config.model), Path(folder))
        self.room = LayerRoom()
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
            finish: Whether to pack the weights for the kernels, in this thread. Otherwise they stay
                as vLLM's loader leaves them.

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

    def process(
        self, device: torch.device, turns: StepTurns, shared: Collection[int] = frozenset()
    ) -> None:
        """Make loaded weights ready for the kernels, in the order of vLLM's own loader.

        Each layer is one turn between two steps of the running model. It is moved to the device,
        changed there, and moved back. Layers whose kernels take weights as they are stored stay on
        the host, so that embeddings need no room on the device.

        Args:
            device: The engine's device.
            turns: The turns of the load's thread.
            shared: Addresses of memory that other models use, which stays where it is.

        Raises:
            ValueError: The model has weights that can't be made ready layer by layer.
            MemoryError: A layer does not fit beside the running model.
            Exception: Any error of vLLM's classes.
        """
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

        if hasattr(self.model, "process_weights_after_loading"):
            kind = type(self.model).__name__
            raise ValueError(f"{kind} changes its weights as a whole after they are loaded")
        maybe_retie_word_embeddings(self.model, self._config.model_config)
        try:
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, QuantizeMethodBase):
                    where = _HOST if weight_method(module) in PLAIN_METHODS else device
                    run = partial(method.process_weights_after_loading, module)
                    turns.take(partial(self._on_device, module, where, shared, run))
                    if hasattr(module, "update_param_tp_status"):
                        module.update_param_tp_status()
            dtype = self._config.model_config.dtype
            for module in self.model.modules():
                if is_deferred_attention_layer(module):
                    run = partial(module.process_weights_after_loading, dtype)
                    turns.take(partial(self._on_device, module, device, shared, run))
        finally:
            if device.type != "cpu":
                # Torch would keep the layers' room, which other engines of the GPU may need.
                turns.take(torch.cuda.empty_cache)
        self.model.eval()

    def _on_device(
        self,
        module: torch.nn.Module,
        device: torch.device,
        shared: Collection[int],
        run: Callable[[], None],
    ) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self._config
        moves = device.type != "cpu"
        with (
            _measured(self.room, device, module) if moves else nullcontext(),
            torch.no_grad(),
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            device if moves else nullcontext(),
            _on(device, module) if moves else nullcontext(),
        ):
            run()
            if moves:
                move_to_host(module, shared)

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


@contextmanager
def _measured(room: LayerRoom, device: torch.device, module: torch.nn.Module) -> Iterator[None]:
    """Add to `room` what making a layer ready takes on a device."""
    runtime = cuda_runtime()
    if runtime is None:
        yield
        return
    layer_bytes, before = tensor_bytes(module), runtime.watch_memory(device)
    yield
    room.add(layer_bytes, runtime.most_memory(device) - before)


@contextmanager
def _on(device: torch.device, module: torch.nn.Module) -> Iterator[None]:
    """Move a layer's parameters to a device. A failed layer moves back, to free its room.

    Raises:
        MemoryError: The device has no room for the layer and for what is made of it.
    """
    layer_bytes = tensor_bytes(module)
    try:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(device)
        yield
    except BaseException as error:
        for parameter in module.parameters():
            parameter.data = parameter.data.cpu()
        # What the kernels' code has left there lives as long as its frames do.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(
                f"the GPU has no room to make a layer of {layer_bytes / 1e9:.2f} GB ready beside "
                "the running model; set a smaller vllm.kv_cache_bytes or gpu_memory_utilization"
            ) from error
        raise


def check_same_form(running: Path, folder: Path) -> None:
    """Check that an engine of one model reads another model's quantised weights rightly.

    Both are built from the engine's config, which knows only the form of the running weights.

    Raises:
        ValueError: The forms differ.
    """
    mine, theirs = (_facts(path) for path in (folder, running))
    if mine == theirs:
        return
    if mine is None or theirs is None:
        raise ValueError(f"its weights are {'not ' if mine is None else ''}stored quantised")
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"quantization_config.{name} is {mine.get(name)!r:.80}, and "
                f"{theirs.get(name)!r:.80} in the running model"
            )


def _facts(folder: Path) -> dict[str, Any] | None:
    where = folder / "config.json"
    return quantization_facts(read_json(where)) if where.is_file() else None


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
