"""The worker extension: experts' weights beside the running one, and exchanging them.

vLLM adds this class to its worker, in the engine core's process. Weights are brought
to `HOST` as a second model object that shares nothing with the running one, read and
packed in a thread beside it. Making one resident (CPU, eager) puts that object in the
running one's place; the attention layers, which hold the KV cache and no weights, are
the same for all. Weights are never copied, and whatever vLLM did to them when it
loaded them (fused, tied, packed) stays as it was done.

What begins with `service.engine.vllm.engine` is all that imports vllm.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.engine.vllm.worker.capture import CaptureExtension
from service.engine.vllm.worker.grammars import Grammars
from service.engine.vllm.worker.loading import ShadowModel, check_alike, is_attention
from service.engine.vllm.worker.memory import (
    check_room,
    give_back,
    keep_freed,
    own_bytes,
    resident_bytes,
    tensor_bytes,
)
from service.engine.vllm.worker.packing import ScratchBuffers
from service.engine.vllm.worker.steering import SteeredGates
from service.engine.vllm.worker.weight_probe import Probe
from service.models.lora_merge import LoraDelta


@dataclass(slots=True)
class HostWeights:
    """One expert's weights in this process. `probe` is recorded between two steps.

    steered: the rules of a steered expert; the rest is then its base's own, held by both.
    """

    model: Any
    layers: dict[str, Any]
    host_bytes: int
    fill_s: float = 0.0
    probe: Probe | None = None
    steered: SteeredGates | None = None


@dataclass(slots=True)
class PendingLoad:
    """An expert on its way in; `thread` is None until it is its turn."""

    folder: str
    adapter: str | None
    strength: float
    asked_s: float
    thread: threading.Thread | None = None
    error: str | None = None


@dataclass(slots=True)
class _State:
    held: dict[str, Any] = field(default_factory=dict)
    filling: dict[str, PendingLoad] = field(default_factory=dict)
    running: str = ""
    grammars: Grammars | None = None


class SwapExtension(CaptureExtension):
    """Methods that the pool calls through `collective_rpc`. Names begin with `coe_`."""

    # Set by vLLM's worker.
    vllm_config: Any
    # Where an expert is loaded; None: where the engine computes.
    _coe_device: str | None = None

    def _coe(self) -> _State:
        state: _State | None = self.__dict__.get("_coe_state")
        if state is None:
            state = _State()
            self.__dict__["_coe_state"] = state
        return state

    def _coe_layers(self) -> dict[str, Any]:
        """The running engine's layers by name."""
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        return layers

    def coe_register_initial(self, expert: str) -> str:
        """The model that the engine was started with is this expert's.

        Returns why no other's weights can be put in their place; empty where they can.
        """
        state = self._coe()
        if state.held:
            return ""
        keep_freed()
        own = {name: one for name, one in self._coe_layers().items() if not is_attention(one)}
        model = self.model_runner.model
        state.held[expert] = HostWeights(model, own, 0, probe=Probe.of(model))
        state.running = expert
        return ""

    def coe_load_to_host(
        self, expert: str, folder: str, adapter: str | None, strength: float
    ) -> None:
        """Begin to bring an expert's weights to this process, beside the running one.

        `folder`: full weights; `adapter`: LoRA to merge into them, times `strength`.
        Look at `coe_load_result` for the outcome. One is filled at a time, in the order asked.
        """
        state = self._coe()
        if expert not in state.held and expert not in state.filling:
            state.filling[expert] = PendingLoad(folder, adapter, strength, time.monotonic())
            self._coe_next_fill()

    def coe_steer(self, expert: str, told: dict[str, Any]) -> int:
        """Hold a steered expert (`told`: a `Steering`), whose base is held. Returns its bytes.

        Raises ValueError where the base isn't held, or its gates can't be steered so.
        """
        state = self._coe()
        base = state.held.get(told["base"])
        if base is None:
            raise ValueError(f"the weights of {told['base']!r} are not held")
        steered = SteeredGates.of(base.model, told)
        state.held[expert] = HostWeights(
            base.model, base.layers, steered.size_bytes, probe=base.probe, steered=steered
        )
        return steered.size_bytes

    def _coe_next_fill(self) -> None:
        """Begin the next fill, if none is under way. Between two steps of the running model."""
        state = self._coe()
        if any(one.thread is not None and one.error is None for one in state.filling.values()):
            return
        for expert, filling in state.filling.items():
            if filling.thread is None and filling.error is None:
                try:
                    bring = self._coe_begin(expert, filling)
                except Exception as error:
                    filling.error = _told(error)
                    continue
                filling.thread = threading.Thread(
                    target=self._coe_load,
                    args=(expert, filling, bring),
                    name=f"fill-{expert}",
                    daemon=True,
                )
                filling.thread.start()
                return

    def _coe_begin(self, expert: str, filling: PendingLoad) -> Callable[[], Any]:
        """What can't be done in a thread; the rest, which brings what is to be held."""
        before = own_bytes()
        beside = ShadowModel(self.vllm_config, filling.folder, self._coe_device)

        def bring() -> Any:
            delta = LoraDelta(Path(filling.adapter), filling.strength) if filling.adapter else None
            check_room(beside.model)
            return self._coe_bring(expert, beside, delta, before)

        return bring

    def _coe_load(self, expert: str, filling: PendingLoad, bring: Callable[[], Any]) -> None:
        state = self._coe()
        began_s = time.monotonic()
        try:
            held = bring()
            give_back()
            held.fill_s = time.monotonic() - began_s
        except Exception as error:
            filling.error = _told(error)
            return
        state.held[expert] = held
        del state.filling[expert]

    def _coe_bring(
        self, expert: str, beside: ShadowModel, delta: LoraDelta | None, before: int
    ) -> Any:
        """Load an expert's weights and hold them."""
        del expert
        scratch = ScratchBuffers()
        beside.load(delta, scratch)
        layers = beside.share_attention(self._coe_layers())
        check_alike(beside.model, self.model_runner.model)
        # What is packed is no tensor; what vLLM makes of other layers is only seen as growth.
        counted = tensor_bytes(beside.model) + scratch.packed_bytes
        return HostWeights(beside.model, layers, max(counted, own_bytes() - before))

    def coe_load_tokenizer(self, expert: str, folder: str) -> None:
        """Begin to read an expert's tokenizer; where `folder` is empty it has the core's own.

        Raises ValueError where that is no use here.
        """
        state = self._coe()
        if state.grammars is None:
            if not folder:
                return
            state.grammars = Grammars(self.vllm_config)
        if folder:
            state.grammars.bring(expert, folder)
        else:
            state.grammars.forget(expert)

    def coe_tokenizer_fault(self, expert: str) -> str | None:
        """See `Grammars.told`."""
        grammars = self._coe().grammars
        return grammars.told(expert) if grammars is not None else ""

    def coe_load_result(self, expert: str) -> dict[str, Any]:
        """`{"state": "host" | "filling" | "failed" | "disk", …}`. A failure is told once."""
        state = self._coe()
        self._coe_next_fill()
        if (held := state.held.get(expert)) is not None:
            self._coe_look(held)
            return {"state": "host", "host_bytes": held.host_bytes, "fill_s": held.fill_s}
        filling = state.filling.get(expert)
        if filling is None:
            return {"state": "disk"}
        if filling.error is not None:
            del state.filling[expert]
            gc.collect()
            give_back()
            return {"state": "failed", "reason": filling.error}
        return {"state": "filling", "since_s": time.monotonic() - filling.asked_s}

    def _coe_look(self, held: Any) -> None:
        """Record an expert that has just come. Between two steps of the running model."""
        if held.probe is None:
            held.probe = Probe.of(held.model)

    def coe_swap_in(self, expert: str) -> dict[str, Any]:
        """Make an expert that is held the running one. The engine must be paused.

        `ok` is false where the probe finds other weights than were loaded.
        """
        state = self._coe()
        began_s = time.perf_counter()
        held = state.held[expert]
        method = self._coe_put(held)
        state.running = expert
        if state.grammars is not None:
            state.grammars.run(expert)
        self._coe_watch(self.model_runner.model)
        exchange_s = time.perf_counter() - began_s
        ok = False
        # From here on the old expert is gone: a probe that fails must say so, not raise.
        with contextlib.suppress(Exception):
            ok = self._coe_verify(held)
        return {
            "ok": ok,
            "method": method,
            "exchange_s": exchange_s,
            "probe_s": time.perf_counter() - began_s - exchange_s,
        }

    def _coe_put(self, held: Any) -> str:
        """Put an expert's weights where the engine computes with them. Returns the method."""
        old = self._coe().held[self._coe().running]
        if old.steered is not None:
            old.steered.remove()
        self._coe_layers().update(held.layers)
        self.model_runner.model = held.model
        if held.steered is not None:
            held.steered.put()
        return "steer" if held.model is old.model else "inplace"

    def _coe_runs(self) -> str:
        return self._coe().running

    def _coe_verify(self, held: Any) -> bool:
        """Whether those are the weights that were loaded."""
        if held.steered is not None and not held.steered.holds():
            return False
        return held.probe is not None and held.probe.holds()

    def coe_evict(self, expert: str, for_next: bool = False) -> bool:
        """Forget an expert's weights. False where it is the running one, or not held.

        `for_next`: a fill follows, which takes their memory as it is. The system would
        have to clear each page of new one first.
        """
        state = self._coe()
        if expert == state.running or expert not in state.held:
            return False
        del state.held[expert]
        gc.collect()
        if not for_next:
            give_back()
        return True

    def coe_memory(self) -> dict[str, int]:
        """Resident bytes of this process, and what the held experts were measured to take."""
        state = self._coe()
        return {
            "resident_bytes": resident_bytes(),
            "host_bytes": sum(held.host_bytes for held in state.held.values()),
        }


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]
