"""Steering where graphs are captured: a rule that stands in each router for good.

A captured graph goes on with the kernels and the addresses that it was captured with, so a
router can't be given another rule later. Before anything is captured each is given one that
makes vLLM's own choice and the steered one, and takes whichever a table on the device says;
the table holds what the steered choice is made with, too. Another profile is other numbers
in that table: a copy of some kilobytes. All shapes are fixed, and nothing waits for the device.

Written against vLLM's CUDA build; where there is no GPU, it has run on CPU only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from service.engine.steering_spec import PLACES
from service.engine.vllm.worker.gates import RoutedLayer
from service.engine.vllm.worker.steering import CHOOSES, gate_for, gates_of, why_not

# Kernels that take as many experts for a token as they are given, whatever the model says.
_ANY_WIDTH = ("TritonExperts", "CPUUnquantizedExperts", "X86CPUUnquantizedExperts")


class SteeringRule:
    """One router's. `row` is its part of the table: see `_row`. `own`: vLLM's choice.

    A choice has `places` places, whatever the profile's top-k: what is left of them has weight
    0 and names the token's first choice again.
    """

    def __init__(self, own: Any, row: torch.Tensor, gate: RoutedLayer, places: int) -> None:
        experts = gate.experts
        self.own = own
        self.barred, self.boost = row[:experts], row[experts : 2 * experts]
        self.top_k, self.top_p, self.active = row[2 * experts :].unbind()
        self.rank = torch.arange(places, device=row.device)
        self.renormalize = bool(gate.router.renormalize)

    def __call__(
        self, hidden_states: Any, router_logits: torch.Tensor, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of a router's own choice: weights and ids, (T, places)."""
        own_weights, own_ids = self.own(hidden_states, router_logits, *more, **named)
        free = len(self.rank) - own_ids.shape[1]
        if free:
            own_weights = torch.nn.functional.pad(own_weights, (0, free))
            own_ids = torch.cat((own_ids, own_ids[:, :1].expand(-1, free)), dim=1)
        weights, ids = self.steered(router_logits)
        # A row that only fills a batch up has ids of -1, by which kernels know it.
        steers = (self.active > 0) & (own_ids[:, :1] >= 0)
        return (
            torch.where(steers, weights.to(own_weights.dtype), own_weights),
            torch.where(steers, ids.to(own_ids.dtype), own_ids),
        )

    def steered(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`service.moe.steering.steer`, in as many places as there are."""
        probability = torch.softmax(logits.float() + self.barred, dim=-1)
        weights, ids = torch.sort(probability, dim=-1, descending=True, stable=True)
        weights, ids = weights[:, : len(self.rank)], ids[:, : len(self.rank)]
        before = torch.cumsum(weights, dim=-1) - weights
        stays = (self.rank < self.top_k) & (before < self.top_p)
        weights = torch.where(stays, weights, 0.0)
        ids = torch.where(stays, ids, ids[:, :1])
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.boost[ids], ids


@dataclass(frozen=True, slots=True)
class SteeringTable:
    """A steered expert's table, in host memory."""

    table: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return int(self.table.numel() * self.table.element_size())


class GraphSteering:
    """The standing rules of one model, and the table that they read."""

    def __init__(self, model: Any, places: int) -> None:
        """Put them in. `places`: the most experts that a profile chooses for a token.

        Raises ValueError where its gates can't be steered; then nothing was changed. Where its
        kernels can't take so many, there are as many places as the model itself needs.
        """
        self._gates = gates_of(model)
        for gate in self._gates.values():
            if (why := why_not(gate)) is not None:
                raise ValueError(why)
        narrow = [one for one in self._gates.values() if one.kernel not in _ANY_WIDTH]
        self._made_for = "this engine was started"
        if narrow:
            places = min([places, *(one.top_k for one in narrow)])
            self._made_for = (
                f"{narrow[0].kernel}, which computes them, is made (vllm.moe_backend: triton takes "
                "any number)"
            )
        self.places = places
        self._neutral = SteeringTable(_table(self._gates, {"layers": ()}))
        self.written = self._neutral
        # Tensors of inference can't be written to outside of it.
        with torch.inference_mode(False):
            self.table = self._neutral.table.to(next(model.parameters()).device, copy=True)
            for gate, row in zip(self._gates.values(), self.table, strict=True):
                own = getattr(gate.router, CHOOSES)
                gate.router.__dict__[CHOOSES] = SteeringRule(own, row, gate, places)

    def steering(self, told: Mapping[str, Any]) -> SteeringTable:
        """The table of what `told` (a `Steering` as a mapping) asks for. Raises ValueError."""
        for layer in told["layers"]:
            gate = gate_for(self._gates, int(layer["layer"]), told)
            k = layer["top_k"] or gate.top_k
            if k > self.places:
                raise ValueError(
                    f"layer {gate.layer}: top_k is {k}, and {self._made_for} for at most "
                    f"{self.places} experts for a token"
                )
        return SteeringTable(_table(self._gates, told))

    def write(self, written: SteeringTable | None) -> None:
        """From now on the routers choose so; None: as vLLM has made them."""
        self.written = written if written is not None else self._neutral
        with torch.no_grad():
            self.table.copy_(self.written.table)

    def holds(self) -> bool:
        """Whether the table on the device is what was written there last."""
        return bool(torch.equal(self.table.cpu(), self.written.table))


def _table(gates: Mapping[int, RoutedLayer], told: Mapping[str, Any]) -> torch.Tensor:
    """A row for each gate, float32; those that `told` leaves out are not active."""
    layers = {int(layer["layer"]): layer for layer in told["layers"]}
    with torch.inference_mode(False):
        table = torch.stack([_row(gate, layers.get(index)) for index, gate in gates.items()])
        return table.pin_memory() if torch.cuda.is_available() else table


def _row(gate: RoutedLayer, layer: Mapping[str, Any] | None) -> torch.Tensor:
    """Bias, or -inf where masked, of E; boost of E; top-k; top-p (inf: none); 1 where active."""
    if layer is None:
        plain = [0.0] * gate.experts + [1.0] * gate.experts
        return torch.tensor([*plain, gate.top_k, float("inf"), 0.0], dtype=torch.float32)
    mask = torch.tensor(layer["mask"], dtype=torch.bool)
    barred = torch.tensor(layer["bias"], dtype=torch.float32).masked_fill(mask, float("-inf"))
    top_p = layer["top_p"] if layer["top_p"] is not None else float("inf")
    rest = [*layer["boost"], layer["top_k"] or gate.top_k, top_p, 1.0]
    return torch.cat((barred, torch.tensor(rest, dtype=torch.float32)))


class SteeringMixin:
    """A vLLM worker in whose model rules stand, put in before graphs are captured.

    `_coe_standing`: them, or why there can be none, told to whoever asks for a steered expert.
    """

    # Set by vLLM's worker.
    vllm_config: Any
    model_runner: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load it as vLLM does; then the rules."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # the worker's
        places = int(self.vllm_config.additional_config.get(PLACES, 0))
        if not places:
            return
        try:
            self._coe_standing: GraphSteering | str = GraphSteering(
                self.model_runner.get_model(), places
            )
        except ValueError as error:
            self._coe_standing = str(error)
