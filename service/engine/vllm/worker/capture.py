"""The worker's side of watching routers: what they choose in sampled steps, by expert name.

vLLM's routers hand each choice to a function of ours. A step that is left out costs one call
per layer; in the others the load is counted, and of a few prompts whole stretches of tokens are
kept. Nothing leaves this process but numbers of routed experts.

What begins with `service.engine.vllm.engine` is all that imports vllm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.base import CANARY
from service.engine.vllm.worker.gates import RoutedLayer, routed_layers
from service.engine.vllm.worker.graph_capture import ChoiceBuffer

_NO_BATCH = (
    "vLLM's second model runner does not say which tokens of a step are whose; with "
    "VLLM_USE_V2_MODEL_RUNNER=0 in the pool's environment the first one runs"
)
# A shorter stretch tells nothing of a cache: it is as good as empty all along.
_LEAST_TOKENS = 32


@dataclass(slots=True)
class _Seen:
    """What has not been told yet of one expert: tokens, load by layer, stretches of prompts."""

    load: NDArray[np.int64]
    tokens: int = 0
    stretches: list[NDArray[np.int16]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """A step that is looked at: whose, how many tokens, and which stretches of it are kept."""

    seen: _Seen
    tokens: int
    kept: list[tuple[slice, list[NDArray[np.int16]]]]


class GateCapture:
    """Looks at one step of `every`, on average, of one worker.

    Steps are drawn by `chance`, from 1 to 2 · `every` - 1 after the one before: requests of one
    length would else be seen at the same places again and again. `stretches`: how many
    stretches of prompts are kept of each expert until they are told; `tokens`: their length at
    most. `running`: which expert the engine computes now.
    """

    def __init__(
        self,
        runner: Any,
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
        self._noted: ChoiceBuffer | None = None
        self._left = self._drawn()
        self._step: _Step | None = None
        self._seen: dict[str, _Seen] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """The layers that route, and how: `layers` is empty where the model is no MoE."""
        first = self._layers[0] if self._layers else None
        return {
            "layers": [one.layer for one in self._layers],
            "experts": first.experts if first else 0,
            "top_k": first.top_k if first else 0,
        }

    def attach(self, layers: Sequence[RoutedLayer]) -> None:
        """Look at these routers from now on, and at no others."""
        self.detach()
        self._layers = layers
        for place, one in enumerate(layers):
            one.router.set_capture_fn(partial(self._chosen, place))

    def follow(self, noted: ChoiceBuffer) -> None:
        """Look at what is written down there after each step (`stepped`), and call no routers."""
        self._noted = noted
        self._layers = noted.layers

    def detach(self) -> None:
        """Look at nothing any more; what was seen is kept."""
        if self._noted is None:
            for one in self._layers:
                one.router.set_capture_fn(None)
        self._step = None

    def stepped(self) -> None:
        """A step was computed, whose choices are written down where they are followed."""
        if self._noted is None or not self._layers:
            return
        self._left -= 1
        if self._left > 0:
            return
        self._left = self._drawn()
        if (step := self._begin()) is None or not step.tokens:
            return
        chosen = self._noted.chosen[: step.tokens].cpu().numpy()
        for place in range(len(self._layers)):
            self._add(step, place, chosen[:, place])
        self._end(step)

    def _chosen(self, place: int, ids: Any) -> None:
        """A router chose `ids`, (tokens, k), for every token of this step."""
        if place == 0:
            self._left -= 1
            self._step = None
            if self._left == 0:
                self._left = self._drawn()
                self._step = self._begin()
        step = self._step
        if step is None:
            return
        # Rows beyond the tokens are padding.
        self._add(step, place, np.asarray(ids.cpu())[: step.tokens])
        if place == len(self._layers) - 1:
            self._end(step)

    def _add(self, step: _Step, place: int, ids: NDArray[np.integer[Any]]) -> None:
        """One layer's choice, (tokens, k), for all tokens of a step."""
        chosen = _once(ids)
        load = step.seen.load[place]
        load += np.bincount(chosen[chosen >= 0], minlength=len(load))
        for rows, layers in step.kept:
            layers.append(chosen[rows].astype(np.int16))

    def _drawn(self) -> int:
        return self._chance.randint(1, 2 * self._every - 1)

    def _begin(self) -> _Step | None:
        batch = self._runner.input_batch
        if any(f"-{CANARY}" in name for name in batch.req_ids):
            return None  # our own question, asked alone
        begins = self._runner.query_start_loc.np[: batch.num_reqs + 1]
        expert = self._running()
        seen = self._seen.get(expert)
        if seen is None:
            shape = (len(self._layers), self._layers[0].experts)
            seen = self._seen[expert] = _Seen(np.zeros(shape, np.int64))
        kept: list[tuple[slice, list[NDArray[np.int16]]]] = []
        for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            if len(seen.stretches) + len(kept) >= self._stretches:
                break
            if end - begin >= _LEAST_TOKENS:
                kept.append((slice(begin, min(end, begin + self._tokens)), []))
        return _Step(seen, int(begins[-1]), kept)

    def _end(self, step: _Step) -> None:
        self._step = None
        step.seen.tokens += step.tokens
        for _, layers in step.kept:
            width = max(one.shape[1] for one in layers)
            # A layer that was told to choose fewer has none in the places that are left.
            step.seen.stretches.append(
                np.stack(
                    [
                        np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=-1)
                        for one in layers
                    ]
                )
            )

    def snapshot(self) -> dict[str, Any]:
        """What was seen since this was last asked for, by expert, as plain data; forgets it."""
        seen, self._seen = self._seen, {}
        return {
            expert: {
                "tokens": one.tokens,
                "load": one.load.tobytes(),
                "stretches": [[*kept.shape, kept.tobytes()] for kept in one.stretches],
            }
            for expert, one in seen.items()
        }


def _once(ids: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Each token's experts in order; -1 for those named again.

    A token that is given fewer than there are places has its first choice again in the others.
    """
    chosen = np.sort(ids, axis=1)
    again = chosen[:, 1:] == chosen[:, :-1]
    chosen[:, 1:][again] = -1
    return chosen


class CaptureExtension:
    """Methods that the engine calls through `collective_rpc`. Names begin with `coe_`."""

    # Set by vLLM's worker.
    model_runner: Any
    _coe_capturing: GateCapture | None = None
    _coe_named = ""
    # Where captured graphs write down what they choose, or why they can't; None: they don't.
    _coe_noted: ChoiceBuffer | str | None = None

    def coe_capture(self, expert: str, every: int, stretches: int, tokens: int) -> dict[str, Any]:
        """Look at one step of `every` from now on; 0: at none.

        `expert`: whose weights run, where they stay. The model's shape, or `refused` and why.
        """
        if self._coe_capturing is not None:
            self._coe_capturing.detach()
            self._coe_capturing = None
        self._coe_named = expert
        if every == 0:
            return {}
        if not hasattr(self.model_runner, "input_batch"):
            return {"refused": _NO_BATCH}
        capture = GateCapture(
            self.model_runner,
            self._coe_runs,
            every=every,
            stretches=stretches,
            tokens=tokens,
            chance=random.Random(0),
        )
        try:
            if self._coe_noted is None:
                capture.attach(routed_layers(self.model_runner.model))
            elif isinstance(self._coe_noted, str):
                return {"refused": self._coe_noted}
            else:
                capture.follow(self._coe_noted)
        except ValueError as error:
            return {"refused": str(error)}
        self._coe_capturing = capture
        return capture.shape

    def _coe_stepped(self) -> None:
        """The worker has computed a step."""
        if self._coe_capturing is not None:
            self._coe_capturing.stepped()

    def coe_captured(self) -> dict[str, Any]:
        """See `GateCapture.told`."""
        return self._coe_capturing.snapshot() if self._coe_capturing is not None else {}

    def _coe_runs(self) -> str:
        """The expert that the engine computes now."""
        return self._coe_named

    def _coe_watch(self, model: Any) -> None:
        """Another model runs from now on: look at its routers instead."""
        if self._coe_capturing is not None and self._coe_noted is None:
            self._coe_capturing.attach(routed_layers(model))
