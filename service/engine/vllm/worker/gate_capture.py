"""The worker's side of MoE routing capture: the choices of gates in sampled steps, by expert.

vLLM's routers pass each choice to a callback. An unsampled step costs one call per layer. A sampled
step counts the load of routed experts, and keeps the choices for consecutive tokens of a few
prompts. Only indices and counts of routed experts leave this process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.engine.engine_interface import CANARY
from service.engine.vllm.worker.gate_access import RoutedLayer, routed_layers
from service.engine.vllm.worker.gate_choice_recorder import ChoiceBuffer, ChoiceCopy
from service.engine.vllm.worker.model_access import has_batch, step_batch

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_NO_BATCH = "this model runner of vLLM does not tell which tokens of a step are whose"
# A shorter stretch would hardly fill a cache of routed experts.
_MIN_STRETCH_TOKENS = 32


@dataclass(slots=True)
class _Sample:
    """The choices of one expert since the last snapshot.

    Attributes:
        load: The number of tokens that each routed expert got, int64 (layers, experts).
        tokens: The number of tokens in the sample.
        stretches: The choices for consecutive tokens of prompts, each int16 (layers, tokens, k).
    """

    load: NDArray[np.int64]
    tokens: int = 0
    stretches: list[NDArray[np.int16]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """A sampled step.

    Attributes:
        sample: The sample of the running expert.
        tokens: The number of tokens of the step.
        kept: The rows of the stretches that are kept, each with its choices by layer.
    """

    sample: _Sample
    tokens: int
    kept: list[tuple[slice, list[NDArray[np.int16]]]]


class GateCapture:
    """Samples the steps of one worker. On average it samples one of `every` steps.

    The distance to the next sampled step is random, from 1 to 2 · `every` - 1. With a fixed
    distance, requests of one length would always be sampled at the same tokens.

    Args:
        runner: vLLM's model runner.
        running: A function that returns the expert that the engine runs now.
        every: The average distance of sampled steps.
        stretches: The number of stretches that are kept for each expert until a snapshot.
        tokens: The largest number of tokens of a stretch.
        chance: The source of random distances.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        running: Callable[[], str],
        *,
        every: int,
        stretches: int,
        tokens: int,
        chance: random.Random,
    ) -> None:
        self._chance = chance
        self._runner = runner
        self._running = running
        self._every = every
        self._stretches = stretches
        self._tokens = tokens
        self._layers: Sequence[RoutedLayer] = ()
        self._buffer: ChoiceBuffer | None = None
        self._steps_left = self._draw_distance()
        self._step: _Step | None = None
        # A sampled step whose choices are on their way from the device.
        self._pending: tuple[_Step, ChoiceCopy] | None = None
        self._samples: dict[str, _Sample] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """Return the model's `layers` with gates, and the `experts` and `top_k` of each gate.

        `layers` is empty where the model is not a mixture of experts.
        """
        first = self._layers[0] if self._layers else None
        return {
            "layers": [routed.layer for routed in self._layers],
            "experts": first.experts if first else 0,
            "top_k": first.top_k if first else 0,
        }

    def attach(self, layers: Sequence[RoutedLayer]) -> None:
        """Record the gates of these layers from now on, and no other gates."""
        self.detach()
        self._layers = layers
        for index, routed in enumerate(layers):
            routed.watch_choices(partial(self._on_choice, index))

    def follow(self, buffer: ChoiceBuffer) -> None:
        """Read choices from a buffer after each step (`stepped`) instead of through callbacks."""
        self._buffer = buffer
        self._layers = buffer.layers

    def detach(self) -> None:
        """Stop recording gates. Samples are kept."""
        if self._buffer is None:
            for routed in self._layers:
                routed.watch_choices(None)
        self._step = self._pending = None

    def stepped(self) -> None:
        """Sample the choices of a step from the buffer, if there is a buffer.

        The step may still be running on the device, and nothing waits for it: its choices are
        copied when it has ended, and counted after a later step.
        """
        if self._buffer is None or not self._layers:
            return
        if self._pending is not None and self._pending[1].arrived:
            self._count_pending()
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        self._steps_left = self._draw_distance()
        self._count_pending()
        if (step := self._begin()) is not None and step.tokens:
            self._pending = step, self._buffer.start_copy(step.tokens)

    def _count_pending(self) -> None:
        """Count the sampled step whose choices are on their way, and wait for them, if any are."""
        if self._pending is None:
            return
        (step, copy), self._pending = self._pending, None
        chosen = copy.wait()
        for index in range(len(self._layers)):
            self._add(step, index, chosen[:, index])
        self._end(step)

    def _on_choice(self, index: int, ids: torch.Tensor) -> None:
        """Record a router's choice for this step. `ids` has the shape (tokens, k)."""
        if index == 0:
            self._steps_left -= 1
            self._step = None
            if self._steps_left == 0:
                self._steps_left = self._draw_distance()
                self._step = self._begin()
        step = self._step
        if step is None:
            return
        # The rows after the last token are padding.
        self._add(step, index, np.asarray(ids.cpu())[: step.tokens])
        if index == len(self._layers) - 1:
            self._end(step)

    def _add(self, step: _Step, index: int, ids: NDArray[np.integer[Any]]) -> None:
        """Count one layer's choice, (tokens, k), for all tokens of a step."""
        chosen = _without_repeats(ids)
        load = step.sample.load[index]
        load += np.bincount(chosen[chosen >= 0], minlength=len(load))
        for rows, layers in step.kept:
            layers.append(chosen[rows].astype(np.int16))

    def _draw_distance(self) -> int:
        return self._chance.randint(1, 2 * self._every - 1)

    def _begin(self) -> _Step | None:
        batch = step_batch(self._runner)
        if batch is None or any(f"-{CANARY}" in name for name in batch.request_ids):
            return None  # the canary runs alone and must not be counted
        bounds = batch.bounds
        expert = self._running()
        sample = self._samples.get(expert)
        if sample is None:
            shape = (len(self._layers), self._layers[0].experts)
            sample = self._samples[expert] = _Sample(np.zeros(shape, np.int64))
        kept: list[tuple[slice, list[NDArray[np.int16]]]] = []
        for begin, end in pairwise(bounds):
            if len(sample.stretches) + len(kept) >= self._stretches:
                break
            if end - begin >= _MIN_STRETCH_TOKENS:
                kept.append((slice(begin, min(end, begin + self._tokens)), []))
        return _Step(sample, bounds[-1], kept)

    def _end(self, step: _Step) -> None:
        self._step = None
        step.sample.tokens += step.tokens
        for _, layers in step.kept:
            width = max(choice.shape[1] for choice in layers)
            # A layer that chooses fewer experts has -1 in the unused places.
            padded = [
                np.pad(choice, ((0, 0), (0, width - choice.shape[1])), constant_values=-1)
                for choice in layers
            ]
            step.sample.stretches.append(np.stack(padded))

    def snapshot(self) -> dict[str, Any]:
        """Return the samples since the last snapshot, by expert, as plain data, and reset them."""
        self._count_pending()
        samples, self._samples = self._samples, {}
        return {
            expert: {
                "tokens": sample.tokens,
                "load": sample.load.tobytes(),
                "stretches": [[*kept.shape, kept.tobytes()] for kept in sample.stretches],
            }
            for expert, sample in samples.items()
        }


def _without_repeats(ids: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Sort each token's experts in ascending order, and replace repeats by -1.

    A token with fewer experts than places repeats its first choice in the other places.
    """
    chosen = np.sort(ids, axis=1)
    repeats = chosen[:, 1:] == chosen[:, :-1]
    chosen[:, 1:][repeats] = -1
    return chosen


class CaptureExtension:
    """Methods that the engine calls through `collective_rpc`. Names begin with `coe_`."""

    # Set by vLLM's worker.
    model_runner: GPUModelRunner
    _coe_gate_capture: GateCapture | None = None
    _coe_initial_expert = ""
    # The buffer that captured graphs write to, or the reason why they can't. None: no graphs.
    _coe_choices: ChoiceBuffer | str | None = None

    def coe_call(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of this extension. The result has an `answer` or an `error`.

        Where one of several workers raises, vLLM's executor leaves the later workers' answers in
        its queues, and takes them for the answers to its next calls. So no worker ever raises.
        """
        try:
            return {"answer": getattr(self, method)(*args)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def coe_capture(self, expert: str, every: int, stretches: int, tokens: int) -> dict[str, Any]:
        """Start to sample steps, or stop where `every` is 0.

        Args:
            expert: The running expert, in an engine that does not swap.
            every: The average distance of sampled steps.
            stretches: The number of stretches of prompts that are kept for each expert.
            tokens: The largest number of tokens of a stretch.

        Returns:
            `GateCapture.shape`, or the reason under the key `refused`.
        """
        if self._coe_gate_capture is not None:
            self._coe_gate_capture.detach()
            self._coe_gate_capture = None
        self._coe_initial_expert = expert
        if every == 0:
            return {}
        if not has_batch(self.model_runner):
            return {"refused": _NO_BATCH}
        capture = GateCapture(
            self.model_runner,
            self._coe_running_expert,
            every=every,
            stretches=stretches,
            tokens=tokens,
            chance=random.Random(0),
        )
        try:
            if self._coe_choices is None:
                capture.attach(routed_layers(self.model_runner.model))
            elif isinstance(self._coe_choices, str):
                return {"refused": self._coe_choices}
            else:
                capture.follow(self._coe_choices)
        except ValueError as error:
            return {"refused": str(error)}
        self._coe_gate_capture = capture
        return capture.shape

    def _coe_stepped(self) -> None:
        if self._coe_gate_capture is not None:
            self._coe_gate_capture.stepped()

    def coe_captured(self) -> dict[str, Any]:
        return self._coe_gate_capture.snapshot() if self._coe_gate_capture is not None else {}

    def _coe_running_expert(self) -> str:
        return self._coe_initial_expert

    def _coe_watch_gates(self, model: torch.nn.Module) -> None:
        """Record the gates of another model, which runs from now on."""
        if self._coe_gate_capture is not None and self._coe_choices is None:
            self._coe_gate_capture.attach(routed_layers(model))
