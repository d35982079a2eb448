"""The worker extension that holds several experts' weights and swaps them in place.

vLLM mixes this class into its worker, in the engine core's process. A thread loads and packs
weights in host memory as a second model object that shares nothing with the running model. A swap
(CPU, eager) replaces the running model object by that object. The attention layers, which hold the
KV cache and no weights, are the same for all experts. Weights are never copied. They stay as vLLM
made them while loading (fused, tied, packed).
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from service.engine.vllm.worker.eager_steering import SteeredGates
from service.engine.vllm.worker.expert_grammars import ExpertGrammars
from service.engine.vllm.worker.gate_capture import CaptureExtension
from service.engine.vllm.worker.model_access import (
    PLAIN_METHODS,
    is_attention,
    named_layers,
    weight_method,
)
from service.engine.vllm.worker.pack_while_loading import ScratchBuffers
from service.engine.vllm.worker.second_model import SecondModel, check_alike
from service.engine.vllm.worker.step_turns import StepTurns
from service.engine.vllm.worker.thinking_marks import use_marks
from service.engine.vllm.worker.weight_memory import (
    check_room,
    keep_freed,
    own_bytes,
    release_freed,
    resident_bytes,
    tensor_bytes,
)
from service.engine.vllm.worker.weight_probe import WeightProbe
from service.models.lora_merge import LoraDelta

if TYPE_CHECKING:
    from vllm.config import VllmConfig


# The longest time that a load takes from the running model at one question for its state.
_TURN_S = 0.02
# Classes whose weights are packed in the load's thread on a CPU. The packers of all others use what
# holds for the whole process.
_PACKED_IN_THREAD = (*PLAIN_METHODS, "UnquantizedFusedMoEMethod")


@dataclass(slots=True)
class HostWeights:
    """One expert's weights in this process.

    Attributes:
        model: The model object.
        layers: The model's layers that vLLM looks up by name, without attention.
        host_bytes: The measured size in bytes.
        fill_s: The duration of the load in seconds.
        stall_s: The longest time for which the load may have kept the running model waiting.
        layer_room_ratio: As on a GPU; 0 here, where layers are made ready in place.
        probe: The probe that was recorded between two steps of the running model.
        steered: The rules of a steered expert, which shares everything else with its base.
    """

    model: torch.nn.Module
    layers: dict[str, torch.nn.Module]
    host_bytes: int
    fill_s: float = 0.0
    stall_s: float = 0.0
    layer_room_ratio: float = 0.0
    probe: WeightProbe | None = None
    steered: SteeredGates | None = None


@dataclass(slots=True)
class PendingLoad:
    """A requested load. `thread` is None until the load starts."""

    folder: str
    adapter: str | None
    strength: float
    requested_s: float
    thread: threading.Thread | None = None
    error: str | None = None
    turns: StepTurns = field(default_factory=StepTurns)


@dataclass(slots=True)
class _State:
    held: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, PendingLoad] = field(default_factory=dict)
    running: str = ""
    # Whether the model has exactly the weights of `running`. It has not after a failed swap.
    intact: bool = True
    grammars: ExpertGrammars | None = None


class SwapExtension(CaptureExtension):
    """Methods that the engine calls through `collective_rpc`. Their names begin with `coe_`."""

    # Set by vLLM's worker.
    vllm_config: VllmConfig
    # The device that experts are loaded to. None means the engine's own device.
    _coe_device: str | None = None

    def _coe(self) -> _State:
        state: _State | None = self.__dict__.get("_coe_state")
        if state is None:
            state = _State()
            self.__dict__["_coe_state"] = state
        return state

    def coe_register_initial(self, expert: str) -> str:
        """Register the model that the engine was started with as this expert's weights.

        Returns:
            Why these weights can't be replaced. It is empty where they can be replaced.
        """
        state = self._coe()
        if state.held:
            return ""
        keep_freed()
        own = {
            name: layer
            for name, layer in named_layers(self.vllm_config).items()
            if not is_attention(layer)
        }
        model = self.model_runner.model
        state.held[expert] = HostWeights(model, own, 0, probe=self._coe_probe_of(model))
        state.running = expert
        return ""

    def coe_load_to_host(
        self, expert: str, folder: str, adapter: str | None, strength: float
    ) -> None:
        """Start to load an expert's weights beside the running weights.

        Experts are loaded one after another in the order of calls. `coe_load_result` returns the
        outcome.

        Args:
            expert: The expert.
            folder: The folder of full weights.
            adapter: The folder of a LoRA adapter to merge into the weights.
            strength: The factor of the adapter.
        """
        state = self._coe()
        if expert not in state.held and expert not in state.loads:
            state.loads[expert] = PendingLoad(folder, adapter, strength, time.monotonic())
            self._coe_start_next_load()

    def coe_steer(self, expert: str, steering: dict[str, Any]) -> int:
        """Hold a steered expert. Its base must be held already.

        Args:
            expert: The expert.
            steering: A `Steering` as a mapping.

        Returns:
            The bytes of the expert's rules.

        Raises:
            ValueError: The base is not held, or its gates can't be steered in this way.
        """
        state = self._coe()
        base = state.held.get(steering["base"])
        if base is None:
            raise ValueError(f"the weights of {steering['base']!r} are not held")
        steered = SteeredGates.of(base.model, steering)
        state.held[expert] = HostWeights(
            base.model, base.layers, steered.size_bytes, probe=base.probe, steered=steered
        )
        return steered.size_bytes

    def _coe_start_next_load(self) -> None:
        """Start the next load, if none runs. Called between two steps of the running model."""
        state = self._coe()
        if any(load.thread is not None and load.error is None for load in state.loads.values()):
            return
        for expert, load in state.loads.items():
            if load.thread is None and load.error is None:
                try:
                    read = self._coe_prepare_load(expert, load)
                except Exception as error:
                    load.error = _first_line(error)
                    continue
                load.thread = threading.Thread(
                    target=self._coe_load, args=(expert, load, read), name=f"load-{expert}"
                )
                load.thread.daemon = True
                load.thread.start()
                return

    def _coe_prepare_load(self, expert: str, load: PendingLoad) -> Callable[[], Any]:
        """Do the part of a load that can't run in a thread.

        Returns:
            A function for the rest of the load. It returns the held weights.
        """
        before = own_bytes()
        second = SecondModel(self.vllm_config, load.folder, self._coe_device)

        def read() -> Any:
            delta = LoraDelta(Path(load.adapter), load.strength) if load.adapter else None
            check_room(second.model)
            return self._coe_read(expert, second, delta, before, load.turns)

        return read

    def _coe_load(self, expert: str, load: PendingLoad, read: Callable[[], Any]) -> None:
        state = self._coe()
        try:
            self._coe_begin_load()
            began_s = time.monotonic()
            held = read()
            release_freed()
            held.fill_s = time.monotonic() - began_s
            held.stall_s = max(held.stall_s, load.turns.longest_s)
        except Exception as error:
            load.error = _first_line(error)
            return
        state.held[expert] = held
        del state.loads[expert]

    def _coe_begin_load(self) -> None:
        """Prepare a load's thread."""

    def _coe_read(
        self,
        _expert: str,
        second: SecondModel,
        delta: LoraDelta | None,
        before: int,
        turns: StepTurns,
    ) -> Any:
        """Load an expert's weights. `before` has the bytes of the process before the load."""
        scratch = ScratchBuffers()
        in_thread = all(
            method is None or method in _PACKED_IN_THREAD
            for module in second.model.modules()
            for method in [weight_method(module)]
        )
        second.load(delta, scratch, finish=in_thread)
        if not in_thread:
            second.process(torch.device("cpu"), turns)
        layers = second.share_attention(named_layers(self.vllm_config))
        check_alike(second.model, self.model_runner.model)
        # Packed weights are not tensors. Buffers of other layers show only as growth.
        counted = tensor_bytes(second.model) + scratch.packed_bytes
        return HostWeights(second.model, layers, max(counted, own_bytes() - before))

    def coe_load_tokenizer(self, expert: str, folder: str) -> None:
        """Start to read an expert's tokenizer.

        Args:
            expert: The expert.
            folder: The folder of its tokenizer. It is empty where the core's tokenizer is the same.

        Raises:
            ValueError: The core can't use another tokenizer.
        """
        state = self._coe()
        if state.grammars is None:
            if not folder:
                return
            state.grammars = ExpertGrammars(self.vllm_config)
        if folder:
            state.grammars.load(expert, folder)
        else:
            state.grammars.forget(expert)

    def coe_tokenizer_fault(self, expert: str) -> str | None:
        """Return why a tokenizer can't be read.

        The result is None while the tokenizer is being read, and empty on success.
        """
        grammars = self._coe().grammars
        return grammars.fault(expert) if grammars is not None else ""

    def coe_load_result(self, expert: str) -> dict[str, Any]:
        """Return the state of a load: `{"state": "host" | "loading" | "failed" | "disk", …}`.

        A failure is reported once.
        """
        state = self._coe()
        self._coe_start_next_load()
        self._coe_give_turns()
        if (held := state.held.get(expert)) is not None:
            self._coe_record_probe(held)
            return {
                "state": "host",
                "host_bytes": held.host_bytes,
                "fill_s": held.fill_s,
                "stall_s": held.stall_s,
                "layer_room_ratio": held.layer_room_ratio,
            }
        load = state.loads.get(expert)
        if load is None:
            return {"state": "disk"}
        if load.error is not None:
            del state.loads[expert]
            gc.collect()
            release_freed()
            return {"state": "failed", "reason": load.error}
        return {"state": "loading", "since_s": time.monotonic() - load.requested_s}

    def _coe_give_turns(self) -> None:
        """Let the load that runs do some of what can't be done beside the running model."""
        for load in tuple(self._coe().loads.values()):
            if load.thread is not None and load.error is None:
                load.turns.serve(_TURN_S)

    def _coe_record_probe(self, held: Any) -> None:
        """Record the probe of new weights. Called between two steps of the running model."""
        if held.probe is None:
            held.probe = self._coe_probe_of(held.model)

    def _coe_probe_of(self, model: torch.nn.Module) -> WeightProbe | None:
        return WeightProbe.of(model, self.vllm_config.model_config.dtype)

    def coe_swap_in(self, expert: str) -> dict[str, Any]:
        """Swap in an expert whose weights are held. The engine must be paused.

        After a failed swap, the same call for the expert that ran before puts all its weights back
        and checks every probed layer.

        Returns:
            `method`, durations, and `ok`, which is false where the weights have changed since they
            were loaded. Where the swap failed, `error` has the reason, and `unchanged` tells
            whether the model has the weights that it had before.
        """
        state = self._coe()
        began_s = time.perf_counter()
        if (held := state.held.get(expert)) is None:
            error = f"the weights of {expert!r} are not held"
            return {"ok": False, "error": error, "unchanged": state.intact}
        repairs = not state.intact
        state.intact = False
        try:
            method = self._coe_install(held, repairs=repairs)
            state.running = expert
            if state.grammars is not None:
                state.grammars.run(expert)
                use_marks(self.model_runner, state.grammars.marks(expert))
            self._coe_watch_gates(self.model_runner.model)
        except Exception as error:
            return {"ok": False, "error": _first_line(error), "unchanged": False}
        state.intact = True
        install_s = time.perf_counter() - began_s
        ok = False
        # The old expert is already replaced, so a failed probe is a result and not an error.
        with contextlib.suppress(Exception):
            ok = self._coe_verify(held, whole=repairs)
        return {
            "ok": ok,
            "method": method,
            "install_s": install_s,
            "probe_s": time.perf_counter() - began_s - install_s,
        }

    def _coe_install(self, held: Any, *, repairs: bool) -> str:
        """Make the engine compute with an expert's weights, and return the method.

        Args:
            held: The expert's weights.
            repairs: Whether the model may have parts of several experts' weights.
        """
        del repairs  # a model is replaced as a whole
        old = self._coe().held[self._coe().running]
        if old.steered is not None:
            old.steered.remove()
        named_layers(self.vllm_config).update(held.layers)
        self.model_runner.model = held.model
        if held.steered is not None:
            held.steered.install()
        return "steer" if held.model is old.model else "inplace"

    def _coe_running_expert(self) -> str:
        return self._coe().running

    def _coe_verify(self, held: Any, *, whole: bool) -> bool:
        """Return whether the running weights are unchanged since they were loaded.

        Args:
            held: The expert's weights.
            whole: Whether to check all layers of the probe instead of the next few.
        """
        if held.steered is not None and not held.steered.verify():
            return False
        return held.probe is not None and held.probe.verify(whole=whole)

    def coe_evict(self, expert: str, for_next: bool = False) -> bool:
        """Forget an expert's weights.

        Args:
            expert: The expert.
            for_next: Whether a load follows and reuses the freed memory. The system would have to
                clear each page of new memory first.

        Returns:
            False where the expert is running or is not held.
        """
        state = self._coe()
        if expert == state.running or expert not in state.held:
            return False
        self._coe_release(state.held.pop(expert))
        gc.collect()
        if not for_next:
            release_freed()
        return True

    def _coe_release(self, held: Any) -> None:
        """Free what belongs to evicted weights besides memory that Python frees."""

    def coe_memory(self) -> dict[str, int]:
        """Return this process's resident bytes, and the measured bytes of all held experts."""
        state = self._coe()
        return {
            "resident_bytes": resident_bytes(),
            "host_bytes": sum(held.host_bytes for held in state.held.values()),
        }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]
