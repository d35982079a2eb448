"""Routed experts of a layer in fewer slots than there are experts, filled from a file.

The kernel computes with the slots as if they were all experts of the layer. The ids of the chosen
experts are replaced by those of their slots. A step that needs more experts than there are slots is
computed in passes, whose results are added in float32.

A step in one pass calls the kernel with the same tokens, weights and order as the resident model.
Its result is then the same bit for bit. Passes add the experts of a token in another order, and
round each part to the dtype of the activations, so that the result may differ in the last bits.

Nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from service.expert_offload.expert_file import ExpertFile, ExpertFileError
from service.expert_offload.slot_policies import PolicyName, slot_policy
from service.expert_offload.slot_table import Load, SlotTable

# Of tokens (T, hidden), weights (T, k) and slots (T, k): the sum over k, (T, hidden).
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Of tokens (T, hidden): the experts that a layer will probably choose for them, (T, k).
Prediction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class SlotCounters:
    """Counts of one layer since the start.

    Attributes:
        steps: The number of steps.
        passes: The number of passes of all steps.
        uses: The experts that the steps needed, each once for each step.
        waits: The loads that a step waited for.
        prefetched: The loads that were begun ahead of a step.
        read_bytes: The bytes of all loads.
        waited_s: The time that steps waited for loads.
    """

    steps: int = 0
    passes: int = 0
    uses: int = 0
    waits: int = 0
    prefetched: int = 0
    read_bytes: int = 0
    waited_s: float = 0.0


class SlotLayer:
    """The slots of one layer.

    One thread computes; the readers write only into slots that the table has given to a load.

    Attributes:
        experts: The number of routed experts.
        counters: What has happened so far.
    """

    def __init__(
        self,
        place: int,
        experts: int,
        parts: Sequence[torch.Tensor],
        policy: PolicyName,
        file: ExpertFile,
        readers: ThreadPoolExecutor,
    ) -> None:
        """Make the layer with empty slots.

        Args:
            place: The place of the layer in the file.
            experts: The number of routed experts.
            parts: The tensors that the kernel computes with, each (slots, ...) and contiguous.
            policy: The policy by which experts keep their slots.
            file: The file with all experts.
            readers: The threads that read.
        """
        self._place = place
        self.experts = experts
        slots = parts[0].shape[0]
        self._table = SlotTable(experts, slots, slot_policy(policy, experts, slots))
        # Each slot's memory, part by part. The views keep the tensors alive.
        self._memory = [[_bytes_of(part[slot]) for part in parts] for slot in range(slots)]
        self._file = file
        self._readers = readers
        self._coming: list[tuple[Load, Future[None]]] = []
        self._next: tuple[SlotLayer, Prediction] | None = None
        self._fetches_hottest = False
        self.counters = SlotCounters()

    def prefetch_for(self, following: SlotLayer, predict: Prediction) -> None:
        """Fetch what the next layer will probably need, as soon as this layer gets its tokens."""
        self._next = following, predict

    def prefetch_hottest(self) -> None:
        """Fetch the experts that the policy finds worth most, after each step."""
        self._fetches_hottest = True

    def compute(
        self, kernel: Kernel, tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Compute the routed experts of a step.

        Args:
            kernel: Computes with the slots.
            tokens: The activations, (T, hidden).
            weights: The weights of the chosen experts, (T, k).
            ids: The chosen experts, (T, k). Negative ids are passed on.

        Returns:
            The weighted sum over the chosen experts, (T, hidden).

        Raises:
            ExpertFileError: An expert can't be read.
        """
        self._settle()
        chosen = ids.numpy().astype(np.int64, copy=False)
        used = np.bincount(chosen[chosen >= 0], minlength=self.experts)
        needed = int(np.count_nonzero(used))
        self.counters.steps += 1
        self.counters.uses += needed
        total: torch.Tensor | None = None
        looked_ahead = False
        for part in self._table.passes(used):
            self.counters.passes += 1
            reading = self._begin(part.loads)
            if not looked_ahead:
                # The reads for this layer are before those for the next one.
                self._look_ahead(tokens)
                looked_ahead = True
            self._wait(part.loads, reading)
            slots = np.where(chosen < 0, chosen, self._table.slot_of[chosen])
            if len(part.experts) == needed:
                total = kernel(tokens, weights, _ids_like(slots, ids))
                break
            if total is None:
                total = torch.zeros(tokens.shape, dtype=torch.float32)
            self._add_part(total, kernel, tokens, weights, ids, slots, part.experts)
        if total is None:
            # No token chooses an expert.
            return torch.zeros_like(tokens)
        if self._fetches_hottest:
            self.prefetch(self._table.hottest())
        return total.to(tokens.dtype)

    def _add_part(
        self,
        total: torch.Tensor,
        kernel: Kernel,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        slots: NDArray[np.int64],
        experts: Sequence[int],
    ) -> None:
        """Add what the experts of a pass compute to the sum.

        The kernel takes the same number of experts for each token, so that the tokens are grouped
        by how many of their experts are in this pass.
        """
        here = np.zeros(self.experts + 1, np.bool_)
        here[list(experts)] = True
        chosen = ids.numpy()
        kept = here[np.where(chosen < 0, self.experts, chosen)]
        counts = kept.sum(axis=1)
        for width in np.unique(counts[counts > 0]).tolist():
            rows = np.flatnonzero(counts == width)
            places = kept[rows]
            index = torch.from_numpy(rows)
            own = weights[index][torch.from_numpy(places)].view(-1, width)
            found = kernel(
                tokens[index],
                own.contiguous(),
                _ids_like(slots[rows][places].reshape(-1, width), ids),
            )
            total.index_add_(0, index, found.float())

    def _look_ahead(self, tokens: torch.Tensor) -> None:
        if self._next is None:
            return
        following, predict = self._next
        wanted = np.bincount(predict(tokens).numpy().ravel(), minlength=following.experts)
        order = np.argsort(-wanted, kind="stable")
        following.prefetch(order[wanted[order] > 0])

    def prefetch(self, wanted: NDArray[np.intp]) -> None:
        """Begin to read the experts that will probably be needed, the most probable first."""
        self._settle()
        loads = self._table.prefetch(wanted)
        self.counters.prefetched += len(loads)
        self._coming = list(zip(loads, self._begin(loads), strict=True))

    def _settle(self) -> None:
        """Wait for what was fetched ahead. What failed is loaded again when it is needed."""
        if not self._coming:
            return
        began_s = perf_counter()
        for load, reading in self._coming:
            try:
                reading.result()
            except ExpertFileError:
                self._table.forget((load,))
        self._coming = []
        self.counters.waited_s += perf_counter() - began_s

    def _begin(self, loads: Sequence[Load]) -> list[Future[None]]:
        self.counters.read_bytes += len(loads) * self._file.sizes.expert_bytes
        return [
            self._readers.submit(self._file.read, self._place, load.expert, self._memory[load.slot])
            for load in loads
        ]

    def _wait(self, loads: Sequence[Load], reading: Sequence[Future[None]]) -> None:
        if not loads:
            return
        began_s = perf_counter()
        # All of them end before an error leaves this layer, so that no slot is written later.
        errors = [(load, one.exception()) for load, one in zip(loads, reading, strict=True)]
        self.counters.waits += len(loads)
        self.counters.waited_s += perf_counter() - began_s
        failed = [(load, error) for load, error in errors if error is not None]
        if failed:
            self._table.forget(tuple(load for load, _ in failed))
            raise failed[0][1]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy()).cast("B")


def _ids_like(slots: NDArray[np.int64], ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(slots)).to(ids.dtype)
