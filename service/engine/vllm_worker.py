"""The worker extension: experts' weights beside the running one, and exchanging them.

vLLM adds this class to its worker, in the engine core's process. Weights are
brought to `HOST` by vLLM's own loader, as a second model object that shares
nothing with the running one, in a thread beside it. Making one resident (CPU,
eager) puts that object in the running one's place; the attention layers, which
hold the KV cache and no weights, are the same for all. Weights are never copied,
and whatever vLLM did to them when it loaded them (fused, tied, packed) stays as it
was done.

With `vllm.py` and `vllm_swap.py` the only module that imports vllm.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_PROBE_ROWS = 2
_PROBE_LAYERS = 3
_PROBE_VALUES = 16
# What PEFT's adapters may have beyond A and B.
_OTHER_ADAPTERS = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
)


@dataclass
class _Held:
    """One expert's weights in this process."""

    model: Any
    layers: dict[str, Any]
    host_bytes: int
    fill_s: float
    probes: dict[str, Any] = field(default_factory=dict)
    recorded: bool = False
    probed: int = 0
    small: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass
class _Filling:
    thread: threading.Thread
    began_s: float
    error: str | None = None


class SwapExtension:
    """Methods that the pool calls through `collective_rpc`. Names begin with `coe_`."""

    # Set by vLLM's worker.
    vllm_config: Any
    model_runner: Any

    def _coe(self) -> _State:
        state: _State | None = self.__dict__.get("_coe_state")
        if state is None:
            state = _State()
            self.__dict__["_coe_state"] = state
        return state

    def coe_adopt(self, expert: str) -> None:
        """The model that the engine was started with is this expert's."""
        state = self._coe()
        if state.held:
            return
        context = self.vllm_config.compilation_config.static_forward_context
        own = {name: layer for name, layer in context.items() if not _is_attention(layer)}
        held = _Held(self.model_runner.model, own, 0, 0.0)
        state.held[expert] = held
        state.running = expert
        _record_probes(held)

    def coe_fill(self, expert: str, folder: str, adapter: str | None, strength: float) -> None:
        """Begin to bring an expert's weights to this process, beside the running one.

        `folder`: full weights; `adapter`: LoRA to merge into them, times `strength`.
        Look at `coe_filled` for the outcome.
        """
        state = self._coe()
        if expert in state.held or expert in state.filling:
            return
        thread = threading.Thread(
            target=self._coe_fill,
            args=(expert, folder, adapter, strength),
            name=f"fill-{expert}",
            daemon=True,
        )
        state.filling[expert] = _Filling(thread, time.monotonic())
        thread.start()

    def _coe_fill(self, expert: str, folder: str, adapter: str | None, strength: float) -> None:
        state = self._coe()
        began_s = time.monotonic()
        before = _resident_bytes()
        try:
            with state.loading:
                model, layers = _load(self.vllm_config, folder, adapter, strength)
                context = self.vllm_config.compilation_config.static_forward_context
                layers = _share_attention(model, layers, context)
            gc.collect()
            _give_back()
            held = _Held(
                model,
                layers,
                host_bytes=max(_tensor_bytes(model), _resident_bytes() - before),
                fill_s=time.monotonic() - began_s,
            )
        except Exception as error:
            state.filling[expert].error = f"{type(error).__name__}: {error}".splitlines()[0][:400]
            return
        state.held[expert] = held
        del state.filling[expert]

    def coe_filled(self, expert: str) -> dict[str, Any]:
        """`{"state": "host" | "filling" | "failed" | "disk", …}`. A failure is told once."""
        state = self._coe()
        if (held := state.held.get(expert)) is not None:
            if not held.recorded:
                # Not in the thread that loaded it: oneDNN's kernels here share one
                # scratch pad, and two threads in it spoil each other's products.
                _record_probes(held)
            return {"state": "host", "host_bytes": held.host_bytes, "fill_s": held.fill_s}
        filling = state.filling.get(expert)
        if filling is None:
            return {"state": "disk"}
        if filling.error is not None:
            del state.filling[expert]
            return {"state": "failed", "reason": filling.error}
        return {"state": "filling", "since_s": time.monotonic() - filling.began_s}

    def coe_exchange(self, expert: str) -> dict[str, Any]:
        """Make an expert that is held the running one. The engine must be paused.

        `ok` is false where the probe finds other weights than were loaded.
        """
        state = self._coe()
        began_s = time.perf_counter()
        held = state.held[expert]
        context = self.vllm_config.compilation_config.static_forward_context
        context.update(held.layers)
        self.model_runner.model = held.model
        state.running = expert
        exchange_s = time.perf_counter() - began_s
        ok = False
        # From here on the old expert is gone: a probe that fails must say so, not raise.
        with torch.inference_mode(), contextlib.suppress(Exception):
            ok = _probe(held)
        return {
            "ok": ok,
            "exchange_s": exchange_s,
            "probe_s": time.perf_counter() - began_s - exchange_s,
        }

    def coe_drop(self, expert: str) -> bool:
        """Forget an expert's weights. False where it is the running one, or not held."""
        state = self._coe()
        if expert == state.running or expert not in state.held:
            return False
        held = state.held.pop(expert)
        del held
        gc.collect()
        _give_back()
        return True

    def coe_memory(self) -> dict[str, int]:
        """Resident bytes of this process, and what the held experts were measured to take."""
        state = self._coe()
        return {
            "resident_bytes": _resident_bytes(),
            "host_bytes": sum(held.host_bytes for held in state.held.values()),
        }

    def coe_spoil(self, expert: str) -> None:
        """Change an expert's weights behind the probe's back. For tests of the probe."""
        for parameter in self._coe().held[expert].model.parameters():
            if parameter.numel():
                parameter.data.add_(1.0)


class _State:
    def __init__(self) -> None:
        self.held: dict[str, _Held] = {}
        self.filling: dict[str, _Filling] = {}
        self.running = ""
        # vLLM keeps the config that a model is built under in a global.
        self.loading = threading.Lock()


# --- loading


def _load(
    vllm_config: Any, folder: str, adapter: str | None, strength: float
) -> tuple[Any, dict[str, Any]]:
    """A second model of the running one's shape, by vLLM's own loader, and its named layers."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    own = copy.copy(vllm_config)
    own.model_config = copy.copy(vllm_config.model_config)
    own.model_config.model = folder
    own.compilation_config = copy.copy(vllm_config.compilation_config)
    own.compilation_config.static_forward_context = {}
    if hasattr(own.compilation_config, "static_all_moe_layers"):
        own.compilation_config.static_all_moe_layers = []
    delta = _Delta(Path(adapter), strength) if adapter is not None else None

    class Loader(DefaultModelLoader):  # type: ignore[misc]
        def get_all_weights(self, model_config: Any, model: Any) -> Iterable[Any]:
            weights = super().get_all_weights(model_config, model)
            return weights if delta is None else delta.applied(weights)

    with set_current_vllm_config(own):
        model = Loader(vllm_config.load_config).load_model(
            vllm_config=own, model_config=own.model_config
        )
    return model, own.compilation_config.static_forward_context


def _is_attention(layer: Any) -> bool:
    return hasattr(layer, "kv_cache")


def _share_attention(model: Any, layers: dict[str, Any], running: dict[str, Any]) -> dict[str, Any]:
    """Put the running attention layers into `model`; return its other named layers.

    Raises ValueError where an attention layer has something of its own (scales of a
    quantised KV cache), which the running one does not have.
    """
    places = {
        id(child): (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
    }
    own: dict[str, Any] = {}
    for name, layer in layers.items():
        if name not in running:
            raise ValueError(f"the running engine has no layer {name}")
        if not _is_attention(layer):
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


class _Delta:
    """A LoRA adapter as what it adds to full weights: strength · alpha / rank · B A.

    Reads PEFT's files: `base_model.model.<name>.lora_A.weight` (rank × in) and
    `lora_B.weight` (out × rank). Raises ValueError where an adapter's tensor has
    no weight to be added to.
    """

    def __init__(self, folder: Path, strength: float) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(str(folder / "adapter_model.safetensors"))
            rank = int(config["r"])
            alpha = float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"the adapter in {folder} can't be read: {type(error).__name__}: {error}"
            ) from error
        # Each of these means other arithmetic than what is done here.
        others = [name for name in _OTHER_ADAPTERS if config.get(name)]
        if others:
            raise ValueError(f"the adapter in {folder} uses {others[0]}, which can't be merged")
        self._scale = strength * alpha / (rank**0.5 if config.get("use_rslora") else rank)
        self._pairs: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, which = key.removeprefix("base_model.model.").partition(".lora_")
            if which not in ("A.weight", "B.weight"):
                raise ValueError(f"the adapter in {folder} has {key}, which can't be merged")
            self._pairs.setdefault(name + ".weight", {})[which[0]] = tensor
        for name, pair in self._pairs.items():
            shapes = {which: tuple(tensor.shape) for which, tensor in pair.items()}
            if len(pair) != 2 or shapes["A"][0] != rank or shapes["B"][1] != rank:
                raise ValueError(f"{name}: the adapter of rank {rank} has {shapes}")

    def applied(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        left = set(self._pairs)
        for name, weight in weights:
            pair = self._pairs.get(name)
            if pair is not None:
                left.discard(name)
                a, b = pair["A"].float(), pair["B"].float()
                if (b.shape[0], a.shape[1]) != weight.shape:
                    raise ValueError(
                        f"{name}: the adapter adds {(b.shape[0], a.shape[1])} "
                        f"to {tuple(weight.shape)}"
                    )
                weight = torch.addmm(weight.float(), b, a, alpha=self._scale).to(weight.dtype)
            yield name, weight
        if left:
            raise ValueError(f"the base has no {sorted(left)[0]}, which the adapter changes")


# --- the probe


def _linears(model: Any) -> list[tuple[str, Any]]:
    """Layers that can be asked for the product with a vector, by name, in order."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") and hasattr(module, "input_size"):
            found.append((name, module))
    return found


def _ask(module: Any) -> torch.Tensor:
    """A layer's output for a fixed vector."""
    size = getattr(module, "input_size_per_partition", module.input_size)
    generator = torch.Generator().manual_seed(size)
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    dtype = parameters[0].dtype if parameters else torch.get_default_dtype()
    vector = torch.randn(_PROBE_ROWS, size, generator=generator).to(dtype)
    answer: torch.Tensor = module.quant_method.apply(module, vector)
    return answer.clone()


def _record_probes(held: _Held) -> None:
    held.recorded = True
    with torch.inference_mode():
        _record(held)


def _record(held: _Held) -> None:
    linears = _linears(held.model)
    step = max(1, len(linears) // 12)
    for name, module in linears[::step]:
        held.probes[name] = (module, getattr(module, "cpu_linear", None), _ask(module))
    for parameter in held.model.parameters():
        held.small.append((parameter, parameter.detach().flatten()[:_PROBE_VALUES].clone()))


def _probe(held: _Held) -> bool:
    """Whether a few layers, in rotation, answer bit for bit as when they were loaded.

    All packed layers must be the very objects that were recorded, and every
    parameter that is not packed must begin as it did.
    """
    for parameter, expected in held.small:
        if not torch.equal(parameter.detach().flatten()[:_PROBE_VALUES], expected):
            return False
    names = list(held.probes)
    if not names:
        return True
    for name in names:
        module, packed, _ = held.probes[name]
        if getattr(module, "cpu_linear", None) is not packed:
            return False
    for i in range(_PROBE_LAYERS):
        module, _, expected = held.probes[names[(held.probed + i) % len(names)]]
        if not torch.equal(_ask(module), expected):
            return False
    held.probed += _PROBE_LAYERS
    return True


# --- memory


def _tensor_bytes(model: Any) -> int:
    seen: set[int] = set()
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
