"""Simulates expert slots on recorded choices of gates: hits, loads and bytes per token.

The reference is what a cache could reach that knows all coming steps (L. A. Belady, "A study of
replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from service.config.moe_options import ExpertPrefetch
from service.expert_offload.slot_policies import PolicyName, slot_policy
from service.expert_offload.slot_table import SlotTable

PrefetchName = ExpertPrefetch
PREFETCH_NAMES: tuple[PrefetchName, ...] = get_args(PrefetchName)


@dataclass(frozen=True, slots=True, eq=False)
class GateTrace:
    """The choices of a model's gates in consecutive steps.

    Attributes:
        experts: The number of routed experts of each layer.
        choices: The experts of each token, (layers, tokens, k). -1 fills unused places.
        steps: The number of tokens of each step. Their sum is the number of tokens.
        predicted: What the gate of each layer chooses when it gets the input of the gate before it,
            as `choices`; the first layer's has no meaning. None where it was not recorded.
    """

    experts: int
    choices: NDArray[np.int16]
    steps: tuple[int, ...]
    predicted: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: The tokens of the steps are not those of the choices, or an expert is
                unknown.
        """
        if sum(self.steps) != self.choices.shape[1] or min(self.steps, default=1) < 1:
            raise ValueError(
                f"the steps have {sum(self.steps)} tokens and the choices {self.choices.shape[1]}; "
                "both must be the same, and every step needs a token"
            )
        if self.predicted is not None and self.predicted.shape != self.choices.shape:
            raise ValueError(
                f"predicted is {self.predicted.shape}, choices are {self.choices.shape}; "
                "both must be the same"
            )
        for array in (self.choices, self.predicted):
            if (
                array is not None
                and array.size
                and not -1 <= array.min() <= array.max() < self.experts
            ):
                raise ValueError(f"an expert is not in -1 to {self.experts - 1}")

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.choices.shape[0])

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return int(self.choices.shape[1])


@dataclass(frozen=True, slots=True)
class OffloadOutcome:
    """What a trace costs with a number of slots.

    Attributes:
        uses: The experts that the steps need, each once for each step and layer.
        waits: The loads that a step waits for.
        loads: All loads, with those ahead of a step.
        tokens: The number of tokens.
    """

    uses: int
    waits: int
    loads: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """The share of uses whose expert is in its slot when the step needs it."""
        return 1 - self.waits / self.uses if self.uses else 1.0

    def bytes_per_token(self, expert_bytes: int) -> float:
        """Return the bytes that are loaded for a token.

        Args:
            expert_bytes: The bytes of one expert of one layer.
        """
        return self.loads * expert_bytes / self.tokens if self.tokens else 0.0


def step_counts(trace: GateTrace, choices: NDArray[np.int16]) -> NDArray[np.int64]:
    """Return how many tokens use each expert, (layers, steps, experts).

    Args:
        trace: The trace, for its steps.
        choices: Its `choices` or its `predicted`.
    """
    step = np.repeat(np.arange(len(trace.steps)), trace.steps)[:, None]
    width = trace.experts + 1
    counts = np.empty((trace.layers, len(trace.steps), width), np.int64)
    for layer in range(trace.layers):
        # -1 is counted in a place of its own, which is cut below.
        places = (step * width + choices[layer] % width).ravel()
        counts[layer] = np.bincount(places, minlength=counts[layer].size).reshape(-1, width)
    return counts[:, :, :-1]


def simulate(
    trace: GateTrace, slots: int, policy: PolicyName, prefetch: PrefetchName = "none"
) -> OffloadOutcome:
    """Simulate a trace with equally many slots in each layer. They are empty at the start.

    A prefetch is taken to be complete when the step needs the expert.

    Args:
        trace: The choices.
        slots: The slots of each layer, from 1 to the number of experts.
        policy: Which expert goes first.
        prefetch: What is loaded ahead of a layer's step: nothing, the experts that the policy finds
            worth most, or those that the layer's gate predicts.

    Raises:
        ValueError: There are no slots or more than experts, or the trace has no predictions.
    """
    if prefetch == "next_gate" and trace.predicted is None:
        raise ValueError("this trace has no predictions of the next gate; record them first")
    counts = step_counts(trace, trace.choices)
    ahead = None
    if prefetch == "next_gate" and trace.predicted is not None:
        ahead = step_counts(trace, trace.predicted)
    uses = int(np.count_nonzero(counts))
    waits = early = 0
    for layer in range(trace.layers):
        table = SlotTable(trace.experts, slots, slot_policy(policy, trace.experts, slots))
        for at, tokens in enumerate(counts[layer]):
            if ahead is not None and layer:
                wanted = np.argsort(-ahead[layer, at], kind="stable")
                early += len(table.prefetch(wanted[ahead[layer, at][wanted] > 0]))
            elif prefetch == "frequency":
                early += len(table.prefetch(table.hottest()))
            waits += sum(len(part.loads) for part in table.passes(tokens))
    return OffloadOutcome(uses, waits, waits + early, trace.tokens)


def belady(trace: GateTrace, slots: int) -> OffloadOutcome:
    """Return the fewest loads with which any policy could serve a trace without prefetching.

    A step that needs no more experts than there are slots leaves all of them in their slots, as a
    single pass does. After a larger step any experts may be left. Of all others, those stay whose
    next use comes first.

    Args:
        trace: The choices.
        slots: The slots of each layer, at least 1.
    """
    needed = step_counts(trace, trace.choices) > 0
    loads = sum(_belady_loads(layer, slots) for layer in needed)
    return OffloadOutcome(int(needed.sum()), loads, loads, trace.tokens)


def _belady_loads(needed: NDArray[np.bool_], slots: int) -> int:
    steps, experts = needed.shape
    following = np.full((steps + 1, experts), steps, np.int64)
    for at in range(steps - 1, -1, -1):
        following[at] = np.where(needed[at], at, following[at + 1])
    held = np.zeros(experts, np.bool_)
    loads = 0
    for at in range(steps):
        now = needed[at]
        loads += int((now & ~held).sum())
        held |= now
        if held.sum() > slots:
            coming = following[at + 1].copy()
            if now.sum() <= slots:
                coming[now] = -1
            coming[~held] = steps + 1
            held[:] = False
            held[np.argsort(coming, kind="stable")[:slots]] = True
    return loads


def prefetch_accuracy(trace: GateTrace) -> tuple[float, ...]:
    """Return the share of uses that the gate before predicts, for each layer but the first.

    Raises:
        ValueError: The trace has no predictions.
    """
    if trace.predicted is None:
        raise ValueError("this trace has no predictions of the next gate; record them first")
    found: list[float] = []
    for chosen, guessed in zip(trace.choices[1:], trace.predicted[1:], strict=True):
        used = chosen >= 0
        right = (chosen[:, :, None] == guessed[:, None, :]).any(axis=2) & used
        found.append(float(right.sum() / max(1, used.sum())))
    return tuple(found)


def gap_closed(outcome: OffloadOutcome, lru: OffloadOutcome, best: OffloadOutcome) -> float | None:
    """Return the share of the loads between LRU and Belady that a policy saves. None: no gap."""
    gap = lru.waits - best.waits
    return (lru.waits - outcome.waits) / gap if gap > 0 else None


def one_by_one(stretches: Sequence[NDArray[np.int16]], experts: int, at_once: int) -> GateTrace:
    """Return a trace in which texts are generated token by token, some of them together.

    Args:
        stretches: The choices for each text, (layers, tokens, k).
        experts: The number of routed experts of each layer.
        at_once: How many texts are generated at the same time.

    Raises:
        ValueError: There are no texts.
    """
    if not stretches:
        raise ValueError("there are no choices to simulate")
    parts: list[NDArray[np.int16]] = []
    steps: list[int] = []
    for first in range(0, len(stretches), at_once):
        group = stretches[first : first + at_once]
        for token in range(max(text.shape[1] for text in group)):
            rows = [text[:, token : token + 1] for text in group if token < text.shape[1]]
            parts.extend(rows)
            steps.append(len(rows))
    return GateTrace(experts, np.concatenate(parts, axis=1), tuple(steps))
