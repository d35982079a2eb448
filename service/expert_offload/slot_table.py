"""The slots of one layer of a mixture that holds fewer routed experts than it has.

The table says which expert lies in which slot, and divides a step into passes. A pass computes
experts that lie in slots at the same time. It is pure: the caller loads the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.expert_offload.slot_policies import SlotPolicy


@dataclass(frozen=True, slots=True)
class Load:
    """An expert whose weights must be copied into a slot."""

    expert: int
    slot: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Experts that are computed together.

    Attributes:
        experts: The experts of the pass, in ascending order.
        loads: The experts among them whose weights must be loaded first.
    """

    experts: tuple[int, ...]
    loads: tuple[Load, ...]


class SlotTable:
    """The slots of one layer.

    Attributes:
        slot_of: The slot of each expert, int32 (experts,). -1 means that it is in none.
        expert_in: The expert of each slot, int32 (slots,). -1 means that the slot is empty.
    """

    def __init__(self, experts: int, slots: int, policy: SlotPolicy) -> None:
        """Make a table with empty slots.

        Args:
            experts: The number of routed experts, at least 1.
            slots: The number of slots, from 1 to `experts`.
            policy: Says which expert goes first. The table tells it of each step.

        Raises:
            ValueError: There are no slots, or more than experts.
        """
        if not 1 <= slots <= experts:
            raise ValueError(f"{slots} slots for {experts} experts; allowed are 1 to {experts}")
        self.slot_of: NDArray[np.int32] = np.full(experts, -1, np.int32)
        self.expert_in: NDArray[np.int32] = np.full(slots, -1, np.int32)
        self._policy = policy

    @property
    def slots(self) -> int:
        """The number of slots."""
        return len(self.expert_in)

    def resident(self) -> NDArray[np.bool_]:
        """Return which experts are in slots, (experts,)."""
        return self.slot_of >= 0

    def passes(self, tokens: NDArray[np.int64]) -> Iterator[Pass]:
        """Divide a step into passes.

        The table changes as the passes are drawn, so the caller draws one, loads what it lacks,
        computes it, and draws the next. Every expert of the step is computed in one pass, and only
        experts that were in no slot at the step's start are loaded, each once.

        The first pass has the experts that are in slots already, and fills the slots that none of
        them needs. The following passes load in at most half of the slots, so that the experts that
        are worth most stay, and are loaded in ascending order of worth for the same reason.

        Args:
            tokens: The number of tokens of the step that use each expert, (experts,).
        """
        self._policy.observe(tokens)
        worth = self._policy.worth()
        needed = np.flatnonzero(tokens)
        held = self.slot_of[needed] >= 0
        ready = needed[held]
        missing = needed[~held]
        missing = missing[np.argsort(worth[missing], kind="stable")]
        room = self.slots - len(ready)
        streamed = max(1, self.slots // 2)
        while len(ready) or len(missing):
            coming, missing = missing[:room], missing[room:]
            loads = self._place(coming, keep=ready, worth=worth)
            members = np.sort(np.concatenate((ready, coming)))
            if len(members):
                yield Pass(tuple(members.tolist()), loads)
            ready, room = missing[:0], streamed

    def prefetch(self, wanted: NDArray[np.intp]) -> tuple[Load, ...]:
        """Give slots to experts that the next step will probably need.

        No expert among those wanted loses its slot for another. The policy is not told.

        Args:
            wanted: The experts, the most probable first. Those that find no slot are left out.

        Returns:
            The experts to load.
        """
        wanted = wanted[: self.slots]
        held = self.slot_of[wanted] >= 0
        return self._place(wanted[~held], keep=wanted[held], worth=self._policy.worth())

    def hottest(self) -> NDArray[np.intp]:
        """Return the experts that are worth most to the policy, as many as there are slots."""
        worth = self._policy.worth()
        order = np.argsort(-worth, kind="stable")[: self.slots]
        return order[worth[order] > 0]

    def forget(self, loads: tuple[Load, ...]) -> None:
        """Mark slots as empty whose weights could not be loaded."""
        for load in loads:
            self.slot_of[load.expert] = -1
            self.expert_in[load.slot] = -1

    def _place(
        self, coming: NDArray[np.intp], *, keep: NDArray[np.intp], worth: NDArray[np.float64]
    ) -> tuple[Load, ...]:
        if not len(coming):
            return ()
        # Empty slots come first, then the lowest worth. Slots to keep come last, out of reach.
        order = np.where(self.expert_in < 0, -np.inf, worth[self.expert_in])
        order[self.slot_of[keep]] = np.inf
        free = np.argsort(order, kind="stable")[: len(coming)]
        gone = self.expert_in[free]
        self.slot_of[gone[gone >= 0]] = -1
        self.expert_in[free] = coming
        self.slot_of[coming] = free
        return tuple(map(Load, coming.tolist(), free.tolist()))
