"""vLLM's worker on CPU for mixtures whose routed experts do not all fit into memory.

While the checkpoint is read, each expert is packed as soon as it is complete and goes into a file,
so that the experts of one layer at most are in memory. The next start finds the file and skips the
experts of the checkpoint. The layers keep as many slots as the bound allows; `expert_slots` fills
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.version import __version__

from service.engine.steering_data import OFFLOAD_KEY
from service.engine.vllm.worker.expert_slots import Prediction, SlotLayer
from service.engine.vllm.worker.weight_memory import release_freed
from service.expert_offload.expert_file import (
    ExpertFile,
    ExpertFileWriter,
    ExpertSizes,
    expert_file_path,
)
from service.expert_offload.slot_plan import slots_for
from service.expert_offload.slot_policies import PolicyName
from service.models.weights_version import version_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Enough to keep a disk busy; they only wait and copy.
_READERS = 2
_PARTS = ("w13_weight", "w2_weight")
_SHARDS = frozenset({"w1", "w2", "w3"})


@dataclass(frozen=True, slots=True)
class OffloadSettings:
    """The pool's `expert_offload`, as `additional_config` has it.

    Attributes:
        bytes: The bytes of all slots.
        policy: The policy by which experts keep their slots.
        prefetch: What is fetched ahead of a layer's step.
        folder: The folder of packed files.
    """

    bytes: int
    policy: PolicyName
    prefetch: str
    folder: str


class OffloadWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """Holds the routed experts of a mixture in slots. Other models are loaded as usual."""

    # Set by vLLM.
    vllm_config: VllmConfig

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with slots for its routed experts.

        Raises:
            ExpertFileError: The file of packed experts is damaged, or can't be written.
            ValueError: The experts can't be held in slots; the message says why.
        """
        settings = OffloadSettings(**self.vllm_config.additional_config[OFFLOAD_KEY])
        with _loading_into_file(settings) as loaded:
            super().load_model(*args, **kwargs)
        self._coe_slots: tuple[SlotLayer, ...] = ()
        if loaded.experts is not None:
            self._coe_slots = _install(loaded.experts, settings)
        release_freed()

    def expert_slot_counters(self) -> list[dict[str, float]]:
        """Return the counters of each layer, in order."""
        names = (
            "steps",
            "passes",
            "uses",
            "waits",
            "prefetched",
            "read_bytes",
            "waited_s",
        )
        return [
            {name: getattr(layer.counters, name) for name in names} for layer in self._coe_slots
        ]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer with routed experts: vLLM's runner, and the module that holds the gate."""

    runner: Any
    owner: Any

    @property
    def routed(self) -> Any:
        """The module with the weights."""
        return self.runner.routed_experts

    @property
    def gate(self) -> Any | None:
        """The gate, where it can be found."""
        return (
            self.runner.gate if self.runner.gate is not None else getattr(self.owner, "gate", None)
        )


@dataclass(frozen=True, slots=True)
class _OffloadedExperts:
    """All routed experts of a model.

    Attributes:
        layers: The layers, in order.
        file: The file with the packed experts.
    """

    layers: tuple[_Layer, ...]
    file: ExpertFile


@dataclass(slots=True)
class _Loaded:
    experts: _OffloadedExperts | None = None


def _layers_of(model: torch.nn.Module) -> tuple[_Layer, ...]:
    """Return the layers with routed experts, in order.

    Raises:
        ValueError: A layer's experts can't be held in slots.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if not isinstance(module, MoERunner):
            continue
        method = module.routed_experts.quant_method
        where = f"expert_offload: layer {module.layer_id}"
        if type(method) is not UnquantizedFusedMoEMethod or method.is_monolithic:
            raise ValueError(
                f"{where} is computed by {type(method).__name__}; allowed are weights that are not "
                "quantised"
            )
        if method.moe.has_bias:
            raise ValueError(f"{where} has experts with biases; allowed are experts without")
        if set(dict(module.routed_experts.named_parameters(recurse=False))) != set(_PARTS):
            raise ValueError(f"{where} has other weights than {' and '.join(_PARTS)}")
        found.append(_Layer(module, modules[name.rpartition(".")[0]]))
    found.sort(key=lambda layer: int(layer.runner.layer_id))
    shapes = {tuple(getattr(layer.routed, part).shape for part in _PARTS) for layer in found}
    if len(shapes) > 1:
        raise ValueError(
            "expert_offload: the layers have experts of several shapes; allowed is one"
        )
    return tuple(found)


class _Packer:
    """Packs single experts as the kernel of a layer wants them. All layers have the same shapes."""

    def __init__(self, layer: _Layer) -> None:
        routed = layer.routed
        method = routed.quant_method
        self._shapes = [tuple(getattr(routed, part).shape[1:]) for part in _PARTS]
        self._dtype = routed.w13_weight.dtype
        self._kernel = method.experts_cls(method.moe, method.get_fused_moe_quant_config(routed))
        self.isa = str(self._kernel.isa)

    def pack(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the packed parts of an expert, each (1, ...)."""
        holder = torch.nn.Module()
        for name, part in zip(_PARTS, parts, strict=True):
            holder.register_parameter(name, torch.nn.Parameter(part, requires_grad=False))
        self._kernel.process_weights_after_loading(holder)
        return [getattr(holder, name).data for name in _PARTS]

    def empty(self) -> list[torch.Tensor]:
        """Return memory for an expert as the checkpoint has it, each part (1, ...), of zeros."""
        return [torch.zeros((1, *shape), dtype=self._dtype) for shape in self._shapes]

    def sizes(self, layers: int, experts: int) -> ExpertSizes:
        """Return the sizes of packed experts."""
        parts = self.pack(self.empty())
        sizes = tuple(part.numel() * part.element_size() for part in parts)
        return ExpertSizes(layers, experts, sizes)


@dataclass(slots=True)
class _Incomplete:
    """An expert of which not all matrices have been read."""

    parts: list[torch.Tensor]
    shards: set[str] = field(default_factory=set)


class _LayerLoader:
    """Takes the experts of one layer from vLLM's loader. Without a writer it drops them."""

    def __init__(
        self, place: int, layer: _Layer, packer: _Packer, writer: ExpertFileWriter | None
    ) -> None:
        self._place = place
        self._load = layer.routed.weight_loader
        self._packer = packer
        self._writer = writer
        self._incomplete: dict[int, _Incomplete] = {}
        self._free: list[list[torch.Tensor]] = []

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take one matrix of an expert. vLLM calls this in place of the layer's own loader.

        Raises:
            ValueError: vLLM loads all experts at once.
        """
        if loaded_weight.dim() != 2 or shard_id not in _SHARDS:
            raise ValueError(
                f"expert_offload: {weight_name} is loaded as {tuple(loaded_weight.shape)}; allowed "
                "are single matrices of experts"
            )
        if self._writer is not None:
            self._take(self._writer, loaded_weight, weight_name, shard_id, expert_id)
        return True if return_success else None

    def _take(
        self,
        writer: ExpertFileWriter,
        loaded: torch.Tensor,
        name: str,
        shard: str,
        expert: int,
    ) -> None:
        own = self._incomplete.get(expert)
        if own is None:
            parts = self._free.pop() if self._free else self._packer.empty()
            own = self._incomplete[expert] = _Incomplete(parts)
        target = torch.nn.Parameter(own.parts[shard == "w2"], requires_grad=False)
        # vLLM's own code places the matrix, as if the layer had this expert only.
        self._load(target, loaded, name, shard, 0, return_success=True)
        own.shards.add(shard)
        if own.shards == _SHARDS:
            del self._incomplete[expert]
            packed = self._packer.pack(own.parts)
            writer.write(self._place, expert, [_bytes_of(part) for part in packed])
            self._free.append(own.parts)


@contextmanager
def _loading_into_file(settings: OffloadSettings) -> Iterator[_Loaded]:
    """Let vLLM's loader put routed experts into a file within the context.

    A draft model is read after the model itself and is loaded as usual.
    """
    read = DefaultModelLoader.load_weights
    loaded = _Loaded()
    first = True

    def load_weights(
        self: DefaultModelLoader, model: torch.nn.Module, model_config: ModelConfig
    ) -> None:
        nonlocal first
        layers = _layers_of(model) if first else ()
        first = False
        if not layers:
            read(self, model, model_config)
            return

        def read_all() -> None:
            read(self, model, model_config)

        loaded.experts = _read_experts(read_all, layers, settings, str(model_config.model))

    DefaultModelLoader.load_weights = load_weights
    try:
        yield loaded
    finally:
        DefaultModelLoader.load_weights = read


def _read_experts(
    read: Callable[[], None], layers: tuple[_Layer, ...], settings: OffloadSettings, folder: str
) -> _OffloadedExperts:
    """Read a checkpoint. The layers then have slots of zeros in place of all experts.

    Raises:
        ExpertFileError: The file of packed experts is damaged, or can't be written.
        ValueError: The bound is too small.
    """
    routed = layers[0].routed
    experts = int(routed.w13_weight.shape[0])
    packer = _Packer(layers[0])
    sizes = packer.sizes(len(layers), experts)
    slots = slots_for(settings.bytes, len(layers), experts, sizes.expert_bytes)
    identity = {
        "weights": version_of(folder, None, 1.0),
        "dtype": str(routed.w13_weight.dtype),
        "kernel": packer.isa,
        "vllm": __version__,
        "layers": [int(layer.runner.layer_id) for layer in layers],
    }
    path = expert_file_path(Path(settings.folder), identity)
    shapes = [tuple(getattr(routed, part).shape[1:]) for part in _PARTS]
    with ExitStack() as stack:
        file: ExpertFile | None = None
        writer: ExpertFileWriter | None = None
        try:
            file = ExpertFile(path, identity, sizes, verify=True)
        except FileNotFoundError:
            writer = stack.enter_context(ExpertFileWriter(path, identity, sizes))
        for place, layer in enumerate(layers):
            loader = _LayerLoader(place, layer, packer, writer)
            for part in _PARTS:
                parameter = getattr(layer.routed, part)
                # The shape without the memory, which nobody writes.
                parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)
                parameter.weight_loader = loader
        read()
    for layer in layers:
        for part, shape in zip(_PARTS, shapes, strict=True):
            empty = torch.zeros((slots, *shape), dtype=getattr(layer.routed, part).dtype)
            setattr(layer.routed, part, torch.nn.Parameter(empty, requires_grad=False))
    if file is None:
        # This process has just written and digested it.
        file = ExpertFile(path, identity, sizes, verify=False)
    return _OffloadedExperts(layers, file)


def _install(experts: _OffloadedExperts, settings: OffloadSettings) -> tuple[SlotLayer, ...]:
    """Make the layers compute with slots. vLLM has made the slots ready for its kernel.

    Raises:
        ValueError: The next gate shall tell what to fetch, and a layer's gate can't be found.
    """
    readers = ThreadPoolExecutor(_READERS, "expert-reader")
    sizes = experts.file.sizes
    made = []
    for place, layer in enumerate(experts.layers):
        routed = layer.routed
        parts = [getattr(routed, part).data for part in _PARTS]
        found = tuple(part[0].numel() * part.element_size() for part in parts)
        if found != sizes.parts or not all(part.is_contiguous() for part in parts):
            raise ValueError(f"expert_offload: slots of {found} bytes, not {sizes.parts}")
        slots = SlotLayer(place, sizes.experts, parts, settings.policy, experts.file, readers)
        method = routed.quant_method
        method.apply = _computing_with(slots, method.apply)
        made.append(slots)
    if settings.prefetch == "frequency":
        for slots in made:
            slots.prefetch_hottest()
    elif settings.prefetch == "next_gate":
        for at, layer in enumerate(experts.layers[1:]):
            made[at].prefetch_for(made[at + 1], _prediction_of(layer))
    return tuple(made)


def _computing_with(slots: SlotLayer, apply: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Return the function that computes a layer's routed experts in place of vLLM's `apply`."""

    def compute(
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        # On CPU vLLM has computed shared experts before. They are passed on once all the same.
        shared = [(shared_experts, shared_experts_input)]

        def kernel(tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            beside, beside_input = shared.pop() if shared else (None, None)
            return apply(layer, tokens, weights, ids, beside, beside_input)

        return slots.compute(kernel, x, topk_weights, topk_ids)

    return compute


def _prediction_of(layer: _Layer) -> Prediction:
    """Return what a layer would choose for the input of the layer before.

    Raises:
        ValueError: The gate can't be found.
    """
    gate, top_k = layer.gate, int(layer.routed.top_k)
    if gate is None:
        raise ValueError(
            f"expert_offload.prefetch: the gate of layer {layer.runner.layer_id} is not where it "
            "is looked for, so that next_gate can't be used; allowed are frequency and none"
        )

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        logits, _ = gate(tokens)
        return logits.topk(top_k, dim=-1).indices

    return predict


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    size = math.prod(tensor.shape) * tensor.element_size()
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())[:size]
