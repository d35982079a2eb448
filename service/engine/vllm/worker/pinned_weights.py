"""The worker extension on a GPU: experts in pinned host memory, copied into the live parameters.

Captured graphs hold the addresses of the parameters, so weights are copied to where the
running model has them, on a stream of their own, and never exchanged by reference. An
expert is loaded beside the running one as a model on the CPU, by vLLM's own classes and
loader, and its tensors are written to a file of shared memory, which the pool's other engines
map (`shared_weights`); each engine registers it with CUDA. Only where a GPU's kernels want
the weights as the loader puts them: plain linear layers and embeddings.

Where they don't (mixtures of experts), the engine keeps the weights that it was started with.
Steered experts run on these by the rules that stand in its routers (`vllm_standing`).

Written against vLLM's CUDA build; where there is no GPU it has not been run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.engine.shared_memory import ENDING, MappedTensors, Tensor, find, laid_out, write
from service.engine.vllm.worker.graph_steering import GraphSteering, SteeringTable
from service.engine.vllm.worker.loading import ShadowModel, is_attention
from service.engine.vllm.worker.packing import ScratchBuffers
from service.engine.vllm.worker.swap import PendingLoad, SwapExtension
from service.engine.vllm.worker.weight_probe import Probe
from service.models.lora_merge import LoraDelta

_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
_VALUES = 16


@dataclass(slots=True)
class PinnedWeights:
    """One expert's tensors in shared memory, by name, pinned where there is a GPU.

    `whole`: all of it, as bytes. `probe`: recorded at its first swap. Empty where they can't be
    copied: they are then where they were loaded, and stay. `steered`: a steered expert's part of
    the rules; its tensors are its base's own.
    """

    tensors: dict[str, torch.Tensor]
    whole: torch.Tensor | None
    host_bytes: int
    fill_s: float = 0.0
    probe: Probe | None = None
    steered: SteeringTable | None = None

    def release(self) -> None:
        """Its memory is this process's no more, once nothing refers to it."""
        self.tensors = {}
        whole, self.whole = self.whole, None
        if whole is not None:
            unpin(whole)


class PinnedExtension(SwapExtension):
    """What differs from the CPU: how weights are held, and how they are put in place."""

    _coe_device = "cpu"
    # Rules that stand in the routers, or why there can be none; None: nobody asked for any.
    _coe_standing: GraphSteering | str | None = None
    # Set by vLLM's worker.
    rank: int

    def coe_share(self, expert: str, path: str, token: str) -> None:
        """Where an expert's files are to be: what their paths begin with; whose token they bear."""
        self.__dict__.setdefault("_coe_shared", {})[expert] = (path, token)

    def _coe_place(self, expert: str) -> tuple[str, str]:
        place: tuple[str, str] | None = self.__dict__.get("_coe_shared", {}).get(expert)
        if place is None:
            raise RuntimeError(f"no shared memory was given for the weights of {expert!r}")
        return place

    def _coe_path(self, expert: str, tensors: Mapping[str, Tensor]) -> Path:
        """This worker's file: one for each rank, and for each layout."""
        header, _, _ = laid_out(tensors)
        layout = hashlib.blake2b(header, digest_size=8).hexdigest()
        ranks = self.vllm_config.parallel_config.world_size
        begin, _ = self._coe_place(expert)
        return Path(f"{begin}-{self.rank}of{ranks}-{layout}{ENDING}")

    def _coe_hold(self, expert: str, tensors: dict[str, torch.Tensor]) -> PinnedWeights:
        """Tensors in shared memory, written there unless they are. Raises OSError, RuntimeError."""
        described = describe(tensors)
        path = self._coe_path(expert, described)
        mapped = find(path, described)
        if mapped is None:
            _, token = self._coe_place(expert)
            mapped = write(path, described, partial(copy_to, tensors), token)
        return pinned(mapped)

    def coe_register_initial(self, expert: str) -> str:
        """The model that the engine was started with is this expert's.

        Returns why no other's weights can be put in their place; empty where they can.
        """
        state = self._coe()
        if state.held:
            return ""
        model, fixed = self.model_runner.model, ""
        try:
            check_plain(model)
        except ValueError as error:
            fixed, held = str(error), PinnedWeights({}, None, 0)
        else:
            held = self._coe_hold(expert, tensors_of(model))
        held.probe = Probe.of(model)
        state.held[expert] = held
        state.running = expert
        return fixed

    def _coe_begin(self, expert: str, filling: PendingLoad) -> Callable[[], Any]:
        # Where the running one's can't be copied, none can be put in their place.
        check_plain(self.model_runner.model)
        # Another of the pool's engines may have them already.
        live = describe(tensors_of(self.model_runner.model))
        mapped = find(self._coe_path(expert, live), live)
        if mapped is not None:
            return partial(pinned, mapped)
        return super()._coe_begin(expert, filling)

    def _coe_bring(
        self, expert: str, beside: ShadowModel, delta: LoraDelta | None, before: int
    ) -> PinnedWeights:
        check_plain(beside.model)
        beside.load(delta, ScratchBuffers(), finish=False)
        tensors = tensors_of(beside.model)
        check_fits(tensors, tensors_of(self.model_runner.model))
        return self._coe_hold(expert, tensors)

    def coe_evict(self, expert: str, for_next: bool = False) -> bool:
        """Forget an expert's weights: this engine's hold on them, that is."""
        held = self._coe().held.get(expert)
        dropped = super().coe_evict(expert, for_next)
        if dropped and held is not None:
            held.release()
        return dropped

    def _coe_look(self, held: Any) -> None:
        """Its layers can be asked when it runs for the first time."""

    def coe_steer(self, expert: str, told: dict[str, Any]) -> int:
        """Hold a steered expert (`told`: a `Steering`), whose base is held. Returns its bytes.

        Raises ValueError where the base isn't held, or its gates can't be steered so.
        """
        state = self._coe()
        base = state.held.get(told["base"])
        if base is None:
            raise ValueError(f"the weights of {told['base']!r} are not held")
        standing = self._coe_standing
        if not isinstance(standing, GraphSteering):
            raise ValueError(standing or "this engine was not started for steered experts")
        steered = standing.steering(told)
        state.held[expert] = PinnedWeights(
            base.tensors, None, steered.size_bytes, probe=base.probe, steered=steered
        )
        return steered.size_bytes

    def _coe_put(self, held: Any) -> str:
        state = self._coe()
        stays = held.tensors is state.held[state.running].tensors
        if not stays:
            copy_all(held.tensors, tensors_of(self.model_runner.model))
        if isinstance(self._coe_standing, GraphSteering):
            self._coe_standing.write(held.steered)
        return "steer" if stays else "inplace"

    def _coe_verify(self, held: Any) -> bool:
        model = self.model_runner.model
        if isinstance(self._coe_standing, GraphSteering) and not self._coe_standing.holds():
            return False
        if held.probe is not None:
            return bool(held.probe.holds())
        # The first time: what arrived is what was sent.
        live = tensors_of(model)
        for name, tensor in held.tensors.items():
            for part in (slice(None, _VALUES), slice(-_VALUES, None)):
                arrived = live[name].detach().flatten()[part].cpu()
                if not torch.equal(arrived, tensor.flatten()[part]):
                    return False
        held.probe = Probe.of(model)
        return True


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """A model's own parameters and buffers by name, tied ones once, without its KV cache."""
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


def check_plain(model: Any) -> None:
    """Raises ValueError where kernels make something else of the weights than the loader."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or is_attention(module):
            continue
        if type(method).__name__ not in _PLAIN:
            raise ValueError(f"{name} has weights of {type(method).__name__}; they can't be copied")


def check_fits(held: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where tensors differ in name, shape or dtype."""
    for name in sorted(held.keys() ^ live.keys()):
        raise ValueError(f"{name} is in one of the two models only")
    for name, tensor in held.items():
        if (tensor.shape, tensor.dtype) != (live[name].shape, live[name].dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and "
                f"{live[name].dtype} {tuple(live[name].shape)} in the running model"
            )


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """Tensors' names, dtypes, shapes and sizes."""
    return {
        name: Tensor(
            str(one.dtype).removeprefix("torch."),
            tuple(one.shape),
            one.numel() * one.element_size(),
        )
        for name, one in tensors.items()
    }


def copy_to(tensors: Mapping[str, torch.Tensor], name: str, memory: memoryview) -> None:
    """Write one tensor's values there."""
    tensor = tensors[name]
    if tensor.numel():
        torch.frombuffer(memory, dtype=tensor.dtype).copy_(tensor.detach().flatten())


def pinned(mapped: MappedTensors) -> PinnedWeights:
    """The tensors of a mapped file, registered with CUDA where it is. Raises RuntimeError."""
    whole = torch.frombuffer(mapped.memory, dtype=torch.uint8)
    tensors = {
        name: whole[one.offset : one.offset + one.size_bytes]
        .view(getattr(torch, one.dtype))
        .view(one.shape)
        for name, one in mapped.tensors.items()
    }
    pin(whole)
    return PinnedWeights(tensors, whole, sum(one.size_bytes for one in mapped.tensors.values()))


def pin(memory: torch.Tensor) -> None:
    """Lock memory for copies by a GPU, where there is one. Raises RuntimeError."""
    if torch.cuda.is_available():
        size = memory.numel() * memory.element_size()
        _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0), "be pinned")


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`. Raises RuntimeError."""
    if torch.cuda.is_available():
        _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()), "be given back")


def _check(code: Any, what: str) -> None:
    if int(code) != 0:
        raise RuntimeError(f"shared memory could not {what}: CUDA's error {int(code)}")


def copy_all(held: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> None:
    """Copy into the live tensors, on a stream of their own, and wait until all are there."""
    with torch.no_grad():
        if not torch.cuda.is_available():
            for name, tensor in held.items():
                live[name].copy_(tensor)
            return
        stream = torch.cuda.Stream()
        # Nothing that still reads the old weights may overlap.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in held.items():
                live[name].copy_(tensor, non_blocking=True)
        stream.synchronize()
