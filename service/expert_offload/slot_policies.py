"""Which routed experts of a layer keep their slots, where there are fewer slots than experts.

A policy sees how many tokens of each step use each expert, and says what each expert is worth. The
expert in a slot that is worth least goes first. All policies count time in steps of the layer. A
use counts in proportion to the step's most used expert, so that one long prompt does not outweigh
all that was generated before it.

The policies, each for one layer:

- `lru`: The last use.
- `lfu`: The uses since the start.
- `segment`: The uses in the last `SEGMENT_STEPS` steps, then the last use. A segment is the unit of
  the local routing consistency in https://arxiv.org/abs/2505.16056.
- `decay`: The uses, each halved every `HALF_LIFE_STEPS` steps.
- `cacheable`: As `decay`, with the half-life that would have kept the most hits in this layer. The
  paper shows that layers differ in how long they stay with the same experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from service.config.moe_options import SlotPolicyName

PolicyName = SlotPolicyName
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
# As long as a segment of `service.moe.load_statistics`.
SEGMENT_STEPS = 16
HALF_LIFE_STEPS = 32.0
# From a few words to all that was ever seen.
_HALF_LIVES_STEPS = (2.0, 8.0, 32.0, 128.0, float("inf"))
# The hits by which half-lives are compared are forgotten at this rate.
_HITS_HALF_LIFE_STEPS = 256.0

Floats = NDArray[np.float64]


class SlotPolicy(Protocol):
    """What the experts of one layer are worth."""

    def observe(self, tokens: NDArray[np.int64]) -> None:
        """Take note of a step.

        Args:
            tokens: The number of tokens of the step that use each expert, (experts,).
        """

    def worth(self) -> Floats:
        """Return what each expert is worth now, (experts,). The lowest goes first."""


class Lru:
    """The least recently used expert goes first; of one step, the one with the fewest tokens."""

    def __init__(self, experts: int) -> None:
        self._last: Floats = np.zeros(experts)
        self._step = 0

    def observe(self, tokens: NDArray[np.int64]) -> None:
        """Take note of a step."""
        self._step += 1
        used = tokens > 0
        # Less than one step between two experts of the same step.
        self._last[used] = self._step + tokens[used] / (tokens.sum() + 1)

    def worth(self) -> Floats:
        """Return the last use of each expert, in steps."""
        return self._last


class Decayed:
    """The expert with the fewest uses goes first. A use loses half its weight every half-life."""

    def __init__(self, experts: int, half_life_steps: float) -> None:
        self._kept = 0.5 ** (1 / half_life_steps)
        self._uses: Floats = np.zeros(experts)

    def observe(self, tokens: NDArray[np.int64]) -> None:
        """Take note of a step."""
        self._uses *= self._kept
        self._uses += _shares(tokens)

    def worth(self) -> Floats:
        """Return the weighted uses of each expert."""
        return self._uses


class Segment:
    """The expert with the fewest uses in `SEGMENT_STEPS` steps goes first, then the oldest."""

    def __init__(self, experts: int) -> None:
        self._recent: deque[Floats] = deque(maxlen=SEGMENT_STEPS)
        self._last = Lru(experts)
        self._uses: Floats = np.zeros(experts)

    def observe(self, tokens: NDArray[np.int64]) -> None:
        """Take note of a step."""
        self._recent.append(_shares(tokens))
        self._last.observe(tokens)
        # Summed anew, so that rounding does not add up.
        self._uses = np.sum(self._recent, axis=0)

    def worth(self) -> Floats:
        """Return the recent uses of each expert, and less than the smallest use for recency."""
        last = self._last.worth()
        worth: Floats = self._uses + 1e-9 * last / (last.max() + 1)
        return worth


class Cacheable:
    """As `Decayed`, with the half-life whose best `slots` experts would have had most hits."""

    def __init__(self, experts: int, slots: int) -> None:
        self._slots = min(slots, experts)
        self._kept = 0.5 ** (1 / np.array(_HALF_LIVES_STEPS))[:, None]
        self._uses: Floats = np.zeros((len(_HALF_LIVES_STEPS), experts))
        self._hits: Floats = np.zeros(len(_HALF_LIVES_STEPS))

    @property
    def half_life_steps(self) -> float:
        """The half-life that is followed now."""
        return _HALF_LIVES_STEPS[self._best]

    @property
    def _best(self) -> int:
        return int(self._hits.argmax())

    def observe(self, tokens: NDArray[np.int64]) -> None:
        """Take note of a step."""
        shares = _shares(tokens)
        kept = np.argpartition(self._uses, -self._slots, axis=1)[:, -self._slots :]
        self._hits *= 0.5 ** (1 / _HITS_HALF_LIFE_STEPS)
        self._hits += (tokens > 0)[kept].sum(axis=1)
        self._uses *= self._kept
        self._uses += shares

    def worth(self) -> Floats:
        """Return the weighted uses of each expert."""
        best: Floats = self._uses[self._best]
        return best


def slot_policy(name: PolicyName, experts: int, slots: int) -> SlotPolicy:
    """Make the policy of one layer.

    Args:
        name: The policy's name.
        experts: The number of the layer's routed experts.
        slots: The number of the layer's slots.
    """
    made: dict[PolicyName, Callable[[], SlotPolicy]] = {
        "lru": lambda: Lru(experts),
        "lfu": lambda: Decayed(experts, float("inf")),
        "segment": lambda: Segment(experts),
        "decay": lambda: Decayed(experts, HALF_LIFE_STEPS),
        "cacheable": lambda: Cacheable(experts, slots),
    }
    return made[name]()


def _shares(tokens: NDArray[np.int64]) -> Floats:
    share: Floats = tokens / max(1, int(tokens.max()))
    return share
