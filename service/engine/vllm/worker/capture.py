"""The worker's side of MoE routing capture: the choices of gates in sampled steps, by expert.

vLLM's routers pass each choice to a function of ours. A step that is not sampled costs one call per
layer; in a sampled step the load is counted, and of a few prompts whole stretches of tokens are
kept. Only numbers of routed experts leave this process.
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

from service.engine.base import CANARY
from service.engine.vllm.worker.gates import RoutedLayer, routed_layers
from service.engine.vllm.worker.graph_capture import ChoiceBuffer
from service.engine.vllm.worker.model_access import batch_bounds, batch_request_ids, has_batch

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_NO_BATCH = (
    "vLLM's second model runner does not tell which tokens of a step are whose; with "
    "VLLM_USE_V2_MODEL_RUNNER=0 in the pool's environment the first one runs"
)
# In a shorter stretch a cache of routed experts would hardly fill.
_MIN_STRETCH_TOKENS = 32


@dataclass(slots=True)
class _Sample:
    """The choices of one expert since the last snapshot.

    Attributes:
        load: int64 (layers, experts): tokens that each routed expert got.
        tokens: How many tokens were seen.
        stretches: int16 (layers, tokens, k): choices for consecutive tokens of prompts.
    """

    load: NDArray[np.int64]
    tokens: int = 0
    stretches: list[NDArray[np.int16]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """A sampled step.

    Attributes:
        sample: The sample of the expert that runs.
        tokens: Tokens of the step.
        kept: Rows of the stretches that are kept, each with its choices by layer.
    """

    sample: _Sample
    tokens: int
    kept: list[tuple[slice, list[NDArray[np.int16]]]]


class GateCapture:
    """Samples one step of `every`, on average, of one worker.

    The distance to the next sampled step is drawn from 1 to 2 · `every` - 1: with a fixed one,
    requests of one length would always be seen at the same places.

    Args:
        runner: vLLM's model runner.
        running: Returns the expert that the engine runs now.
        every: Steps for each sampled one, on average.
        stretches: How many stretches of prompts are kept of each expert until a snapshot.
        tokens: The most tokens of a stretch.
        chance: Draws the distances.
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
        self._samples: dict[str, _Sample] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """`layers` with gates, empty where the model is no MoE; `experts` and `top_k` of each."""
        first = self._layers[0] if self._layers else None
        return {
            "layers": [routed.layer for routed in self._layers],
            "experts": first.experts if first else 0,
            "top_k": first.top_k if first else 0,
        }

    def attach(self, layers: Sequence[RoutedLayer]) -> None:
        """Watch the gates of these layers from now on, and no others."""
        self.detach()
        self._layers = layers
        for index, routed in enumerate(layers):
            routed.watch_choices(partial(self._on_choice, index))

    def follow(self, buffer: ChoiceBuffer) -> None:
        """Read choices from a buffer after each step (`stepped`); routers then call nothing."""
        self._buffer = buffer
        self._layers = buffer.layers

    def detach(self) -> None:
        """Watch no gates any more. Samples are kept."""
        if self._buffer is None:
            for routed in self._layers:
                routed.watch_choices(None)
        self._step = None

    def stepped(self) -> None:
        """A step was computed: sample its choices from the buffer, if one is followed."""
        if self._buffer is None or not self._layers:
            return
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        self._steps_left = self._draw_distance()
        if (step := self._begin()) is None or not step.tokens:
            return
        chosen = self._buffer.chosen[: step.tokens].cpu().numpy()
        for index in range(len(self._layers)):
            self._add(step, index, chosen[:, index])
        self._end(step)

    def _on_choice(self, index: int, ids: torch.Tensor) -> None:
        """A router chose `ids`, (tokens, k), for every token of this step."""
        if index == 0:
            self._steps_left -= 1
            self._step = None
            if self._steps_left == 0:
                self._steps_left = self._draw_distance()
                self._step = self._begin()
        step = self._step
        if step is None:
            return
        # Rows beyond the tokens are padding.
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
        if any(f"-{CANARY}" in name for name in batch_request_ids(self._runner)):
            return None  # it checks the engine, and runs alone
        bounds = batch_bounds(self._runner)
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
            # A layer that chooses fewer experts has -1 in the other places.
            padded = [
                np.pad(choice, ((0, 0), (0, width - choice.shape[1])), constant_values=-1)
                for choice in layers
            ]
            step.sample.stretches.append(np.stack(padded))

    def snapshot(self) -> dict[str, Any]:
        """The samples since the last snapshot, by expert, as plain data; forgets them."""
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
    """Each token's experts in ascending order, with -1 in place of repeats.

    A token with fewer experts than places has its first choice again in the others.
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
    # The buffer that captured graphs write to, or why they can't; None: there are no graphs.
    _coe_choices: ChoiceBuffer | str | None = None

    def coe_capture(self, expert: str, every: int, stretches: int, tokens: int) -> dict[str, Any]:
        """Sample one step of `every` from now on; 0: none.

        Args:
            expert: The expert that runs, in an engine that does not swap.
            every: Steps for each sampled one, on average.
            stretches: How many stretches of prompts are kept of each expert.
            tokens: The most tokens of a stretch.

        Returns:
            `GateCapture.shape`, or the reason as `refused`.
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
        """Watch the gates of another model, which runs from now on."""
        if self._coe_gate_capture is not None and self._coe_choices is None:
            self._coe_gate_capture.attach(routed_layers(model))
