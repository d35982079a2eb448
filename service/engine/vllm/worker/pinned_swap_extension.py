"""The worker extension on a GPU: experts in pinned host memory, copied into the live parameters.

Captured graphs hold the addresses of the parameters. Weights are therefore copied into the running
model's parameters on a separate stream, and never replaced by reference. An expert is loaded beside
the running expert as a model on the CPU, by vLLM's own classes and loader. Its tensors are written
to a file of shared memory (`service.engine.shared_memory_tensors`), which the pool's other engines
map. Each engine registers the file with CUDA.

A GPU's kernels use plain linear layers and embeddings as the loader leaves them. Quantised weights
and fused mixtures are first made ready by vLLM's own code, layer by layer on the GPU between two
steps of the running model (`SecondModel.process`), and read back. Everything else that such a model
computes with must be equal in both (`model_state`).

The engine's first expert is in the model only. It is written to shared memory before the first
other expert is loaded, because a swap will overwrite it.

For other models the engine keeps its first weights. Steered experts use these weights with the
rules that are installed in the routers (`graph_steering`).

The code is written for vLLM's CUDA build. It was seen working around a CPU's compiled engine, and
was not run on a GPU.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.engine.shared_memory_tensors import (
    SUFFIX,
    MappedTensors,
    Tensor,
    layout_of,
    map_file,
    write_file,
)
from service.engine.vllm.worker.cuda_runtime import cuda_runtime
from service.engine.vllm.worker.graph_steering import GraphSteering, SteeringTable
from service.engine.vllm.worker.host_registration import Registration, parts_of, register
from service.engine.vllm.worker.model_access import (
    PLAIN_METHODS,
    PROCESSED_METHODS,
    is_attention,
    is_plain,
    weight_method,
    world_size,
)
from service.engine.vllm.worker.model_state import (
    ModelState,
    as_bytes,
    ends_of,
    memory_of,
    memory_order,
)
from service.engine.vllm.worker.pack_while_loading import ScratchBuffers
from service.engine.vllm.worker.second_model import SecondModel
from service.engine.vllm.worker.step_turns import StepTurns
from service.engine.vllm.worker.swap_extension import PendingLoad, SwapExtension
from service.engine.vllm.worker.weight_probe import WeightProbe
from service.models.lora_merge import LoraDelta

log = logging.getLogger("coe.engine")

_VALUES = 16


@dataclass(slots=True)
class PinnedWeights:
    """One expert's tensors in shared memory, pinned where there is a GPU.

    Attributes:
        tensors: The tensors by name. They are empty where weights can't be copied and stay in the
            model.
        offsets: The place of each tensor in the registered memory, in bytes.
        registration: The registration of the memory with CUDA; None without a GPU.
        host_bytes: The size of the tensors in bytes.
        fill_s: The duration of the load in seconds.
        stall_s: The longest time for which the load may have kept kernels waiting, in seconds.
        layer_room_ratio: The room on the GPU in which the largest layer was made ready, in sizes of
            that layer; 0 where none was.
        stored: False while the weights are in the model only.
        probe: The probe that was recorded at the first swap.
        steered: The table of a steered expert, which shares its base's tensors.
    """

    tensors: dict[str, torch.Tensor]
    offsets: Mapping[str, int] = field(default_factory=dict)
    registration: Registration | None = None
    host_bytes: int = 0
    fill_s: float = 0.0
    stall_s: float = 0.0
    layer_room_ratio: float = 0.0
    stored: bool = True
    probe: WeightProbe | None = None
    steered: SteeringTable | None = None

    def store(self, written: PinnedWeights) -> None:
        """Take over weights that were in the model only."""
        # Steered experts share this dict, and are known by it.
        self.tensors.update(written.tensors)
        self.offsets, self.registration = written.offsets, written.registration
        self.host_bytes, self.stall_s = written.host_bytes, written.stall_s
        self.stored = True

    def release(self) -> None:
        """Unpin the memory. It is freed when no object refers to it any more."""
        registration, self.registration = self.registration, None
        if registration is not None:
            registration.release()
        # Not before, because the last tensor unmaps the memory.
        self.tensors = {}


class PinnedExtension(SwapExtension):
    """Holds weights in pinned memory and copies them into the live parameters."""

    _coe_device = "cpu"
    # The rules in the routers, or the reason why there are none. None: the engine has no steering.
    _coe_graph_steering: GraphSteering | str | None = None
    # The state of a running model whose weights were changed after loading; None for plain models.
    _coe_live_state: ModelState | None = None
    # What else such a model computes with. A file fits only models of the same.
    _coe_form = b""
    # Why the running model's weights can't be replaced, or an empty string.
    _coe_fixed = ""
    # Set by vLLM's worker.
    rank: int
    device: torch.device

    def _coe_live(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the running model that experts' tensors are copied into."""
        if self._coe_live_state is not None:
            return self._coe_live_state.tensors
        return tensors_of(self.model_runner.model)

    def coe_share(self, expert: str, path: str, token: str) -> None:
        """Set the path prefix of an expert's files, and the token for incomplete files."""
        self.__dict__.setdefault("_coe_shared", {})[expert] = (path, token)

    def _coe_place(self, expert: str) -> tuple[str, str]:
        place: tuple[str, str] | None = self.__dict__.get("_coe_shared", {}).get(expert)
        if place is None:
            raise RuntimeError(f"no shared memory was given for the weights of {expert!r}")
        return place

    def _coe_path(self, expert: str, tensors: Mapping[str, Tensor]) -> Path:
        """Return the path of an expert's file. Each rank and each layout has its own file.

        Quantised weights have one for each form of models, too: who maps a file can't check whether
        its weights fit, because it doesn't see the model that they come from.
        """
        header, _, _ = layout_of(tensors)
        layout = hashlib.blake2b(header + self._coe_form, digest_size=8).hexdigest()
        ranks = world_size(self.vllm_config)
        prefix, _ = self._coe_place(expert)
        return Path(f"{prefix}-{self.rank}of{ranks}-{layout}{SUFFIX}")

    def _coe_hold(self, expert: str, tensors: dict[str, torch.Tensor]) -> PinnedWeights:
        """Map an expert's file. Write it first if it does not exist.

        Raises:
            OSError: The file can't be written or mapped.
            RuntimeError: CUDA can't register the memory.
        """
        described = describe(tensors)
        path = self._coe_path(expert, described)
        mapped = map_file(path, described)
        if mapped is None:
            _, token = self._coe_place(expert)
            mapped = write_file(path, described, partial(copy_to, tensors), token)
        return pinned(mapped)

    def coe_register_initial(self, expert: str) -> str:
        state = self._coe()
        if state.held:
            return ""
        model = self.model_runner.model
        try:
            check_copyable(model)
            if not is_plain(model):
                # Before any other expert runs, and after graphs were captured.
                live = ModelState.of(model)
                live.check_open()
                self._coe_live_state, self._coe_form = live, live.digest()
        except ValueError as error:
            self._coe_fixed = str(error)
            held = PinnedWeights({})  # nothing is ever written into them
        else:
            held = PinnedWeights({}, stored=False, probe=self._coe_probe_of(model))
        state.held[expert] = held
        state.running = expert
        return self._coe_fixed

    def _coe_probe_of(self, model: torch.nn.Module) -> WeightProbe | None:
        """Record a probe. Without one, every swap compares values with their source instead."""
        parameters = {name for name, _ in model.named_parameters()}
        others = [tensor for name, tensor in self._coe_live().items() if name not in parameters]
        try:
            return WeightProbe.of(model, self.vllm_config.model_config.dtype, others)
        except Exception as error:
            log.warning("no probe of the weights, a kernel refused: %s", error)
            return None

    def _coe_begin_load(self) -> None:
        if (runtime := cuda_runtime()) is not None:
            runtime.use_device(self.device)
        for expert, held in self._coe().held.items():
            if not held.stored:  # and no other weights were ever in the model
                held.store(self._coe_hold(expert, self._coe_live()))
                return

    def _coe_prepare_load(self, expert: str, load: PendingLoad) -> Callable[[], Any]:
        # Weights that can't be copied can't be replaced either.
        if self._coe_fixed:
            raise ValueError(self._coe_fixed)
        # Another engine of the pool may have written the file already.
        live = describe(self._coe_live())
        mapped = map_file(self._coe_path(expert, live), live)
        if mapped is not None:
            return partial(pinned, mapped)
        return super()._coe_prepare_load(expert, load)

    def _coe_read(
        self,
        expert: str,
        second: SecondModel,
        delta: LoraDelta | None,
        before: int,
        turns: StepTurns,
    ) -> PinnedWeights:
        check_copyable(second.model)
        second.load(delta, ScratchBuffers(), finish=False)
        if (live := self._coe_live_state) is not None:
            second.process(self._coe_processor(), turns, memory_of(live))
            state = ModelState.of(second.model)
            state.check_fits(live)
            held = self._coe_hold(expert, {name: state.tensors[name] for name in live.tensors})
            held.layer_room_ratio = second.room.ratio
            return held
        tensors = tensors_of(second.model)
        check_fits(tensors, tensors_of(self.model_runner.model))
        return self._coe_hold(expert, tensors)

    def _coe_processor(self) -> torch.device:
        """Return the device whose kernels change weights after loading."""
        return self.device if cuda_runtime() is not None else torch.device("cpu")

    def _coe_release(self, held: Any) -> None:
        runtime = cuda_runtime()
        if runtime is None:
            held.release()
            return

        def release() -> None:
            runtime.use_device(self.device)
            held.release()

        # The driver takes as long for it as for pinning, and the running expert would wait.
        threading.Thread(target=release, name="unpin", daemon=True).start()

    def _coe_record_probe(self, held: Any) -> None:
        """Do nothing yet. The probe is recorded when the expert first runs."""

    def coe_steer(self, expert: str, steering: dict[str, Any]) -> int:
        state = self._coe()
        base = state.held.get(steering["base"])
        if base is None:
            raise ValueError(f"the weights of {steering['base']!r} are not held")
        rules = self._coe_graph_steering
        if not isinstance(rules, GraphSteering):
            raise ValueError(rules or "this engine was not started for steered experts")
        steered = rules.table_for(steering)
        state.held[expert] = PinnedWeights(
            base.tensors, host_bytes=steered.size_bytes, probe=base.probe, steered=steered
        )
        return steered.size_bytes

    def _coe_install(self, held: Any, *, repairs: bool) -> str:
        state = self._coe()
        same_weights = held.tensors is state.held[state.running].tensors
        if repairs or not same_weights:
            copy_all(held, self._coe_live())
        if isinstance(self._coe_graph_steering, GraphSteering):
            self._coe_graph_steering.write(held.steered)
        return "steer" if same_weights else "inplace"

    def _coe_verify(self, held: Any, *, whole: bool) -> bool:
        model = self.model_runner.model
        if (
            isinstance(self._coe_graph_steering, GraphSteering)
            and not self._coe_graph_steering.verify()
        ):
            return False
        if not held.tensors and held.probe is None:
            return True  # nothing was ever written into the weights
        # The copy must equal its source, at the first swap and where there is no probe.
        if (whole or held.probe is None) and not arrived(held.tensors, self._coe_live()):
            return False
        if held.probe is not None:
            return bool(held.probe.verify(whole=whole))
        held.probe = self._coe_probe_of(model)
        return True


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers by name, without attention's buffers.

    Tied tensors appear once.
    """
    attention = {
        id(tensor)
        for layer in model.modules()
        if is_attention(layer)
        for tensor in layer.buffers(recurse=False)
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in attention:
            found[name] = tensor.data
    return found


def check_copyable(model: torch.nn.Module) -> None:
    """Check that all weights belong to classes of vLLM that are known to leave nothing unseen.

    Raises:
        ValueError: A layer has weights of another class.
    """
    for name, module in model.named_modules():
        method = weight_method(module)
        if method is None or is_attention(module):
            continue
        if method not in (*PLAIN_METHODS, *PROCESSED_METHODS):
            raise ValueError(f"{name} has weights of {method}; they can't be copied")


def check_fits(held: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> None:
    """Check that tensors have equal names, shapes and dtypes.

    Raises:
        ValueError: They differ.
    """
    for name in sorted(held.keys() ^ live.keys()):
        raise ValueError(f"{name} is in one of the two models only")
    for name, tensor in held.items():
        if (tensor.shape, tensor.dtype) != (live[name].shape, live[name].dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and "
                f"{live[name].dtype} {tuple(live[name].shape)} in the running model"
            )


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """Return the dtypes, shapes and sizes of tensors by name."""
    return {
        name: Tensor(
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.numel() * tensor.element_size(),
            _strides(tensor),
        )
        for name, tensor in tensors.items()
    }


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor whose dimensions are permuted, and otherwise nothing."""
    if tensor.is_contiguous() or memory_order(tensor) is None:
        return ()
    return tuple(tensor.stride())


def copy_to(tensors: Mapping[str, torch.Tensor], name: str, memory: memoryview) -> None:
    """Write one tensor's values to memory."""
    tensor = tensors[name].detach()
    if not tensor.numel():
        return
    flat = memory_order(tensor) if _strides(tensor) else None
    tensor = as_bytes(tensor.contiguous() if flat is None else flat)
    target = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = cuda_runtime()
    if runtime is None or tensor.device.type == "cpu":
        target.copy_(tensor)
        return
    # On the model's own stream, the running expert would wait for the copy.
    with runtime.copies():
        target.copy_(tensor)


def pinned(mapped: MappedTensors) -> PinnedWeights:
    """Return the tensors of a mapped file, registered with CUDA if there is a GPU.

    Raises:
        RuntimeError: CUDA can't register the memory.
    """
    whole = torch.frombuffer(mapped.memory, dtype=torch.uint8)
    tensors = {name: _of_file(whole, tensor) for name, tensor in mapped.tensors.items()}
    offsets = {name: tensor.offset for name, tensor in mapped.tensors.items()}
    size = sum(tensor.size_bytes for tensor in mapped.tensors.values())
    held = PinnedWeights(tensors, offsets, host_bytes=size)
    if (runtime := cuda_runtime()) is not None:
        held.registration = register(runtime, whole.data_ptr(), whole.numel())
        held.stall_s = held.registration.longest_s
    return held


def _of_file(whole: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """Return a view of a file's bytes as one of its tensors."""
    part = whole[tensor.offset : tensor.offset + tensor.size_bytes]
    flat = part.view(getattr(torch, tensor.dtype))
    if tensor.strides:
        return flat.as_strided(tensor.shape, tensor.strides)
    return flat.view(tensor.shape)


def copy_all(held: PinnedWeights, live: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the live tensors on a separate stream, and wait for all copies."""
    with torch.no_grad():
        if (runtime := cuda_runtime()) is None:
            for name, tensor in held.tensors.items():
                live[name].copy_(tensor)
            return
        with runtime.copies():
            for name, tensor in held.tensors.items():
                _copy_pinned(tensor, held.offsets[name], live[name])


def _copy_pinned(source: torch.Tensor, offset: int, target: torch.Tensor) -> None:
    """Copy a tensor of registered memory, no range of which may span two pieces.

    A tensor whose dimensions are permuted is copied in the order of its memory.
    """
    if not source.numel():
        return
    parts = list(parts_of(offset, source.numel() * source.element_size()))
    from_, to = memory_order(source), memory_order(target)
    if from_ is None or to is None or not _same_order(source, target):
        target.copy_(source.clone())  # slower, through memory that is not registered
    elif len(parts) <= 1:
        to.copy_(from_, non_blocking=True)
    else:
        size = source.element_size()
        for begin, end in parts:
            part = slice(begin // size, end // size)
            to[part].copy_(from_[part], non_blocking=True)


def _same_order(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape have their values in the same order of memory."""
    steps = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(mine == theirs for size, mine, theirs in steps if size > 1)


def arrived(held: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> bool:
    """Return whether live tensors begin and end with the values that they were copied from."""
    return all(
        torch.equal(there.cpu(), here)
        for name, tensor in held.items()
        for there, here in zip(_ends(live[name], tensor), _ends(tensor, tensor), strict=True)
    )


def _ends(tensor: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor's first and last values as bytes, in the order that a file has them."""
    if _same_order(tensor, held):
        return ends_of(tensor, _VALUES)
    return ends_of(tensor.contiguous(), _VALUES)
