"""Steering under captured graphs: each router gets one permanent rule.

A captured graph always runs the same kernels on the same addresses, so that a router can't get
another rule later. Each router therefore gets a rule before the capture. The rule computes both
vLLM's own choice and the steered choice, and a table on the device selects one of them. The table
also holds the parameters of the steered choice, so that another profile is a copy of some
kilobytes. All shapes are fixed, and no code waits for the device. Where the kernel skips what
vLLM's expert map leaves out, it computes only the places that are used.

The code is written for vLLM's CUDA build. Without a GPU it was run only on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from service.engine.steering_data import PLACES_KEY
from service.engine.vllm.worker.eager_steering import gate_for, gates_of
from service.engine.vllm.worker.gate_access import Choice, RoutedLayer, choice_of, replace_choice
from service.engine.vllm.worker.kept_choices import mapped_kept_choices, replace_apply

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# These kernels can compute any number of experts for a token, independent of the model's top-k.
_ANY_WIDTH = ("TritonExperts", "CPUUnquantizedExperts", "X86CPUUnquantizedExperts")


class SteeringRule:
    """The rule of one router: vLLM's own choice or the steered choice.

    A choice always has `places` places, independent of the profile's top-k. Unused places have
    weight 0 and repeat the token's first choice.

    Args:
        own: vLLM's own choice.
        row: The router's row of the table, as `_row` builds it.
        gate: The gate of the router.
        places: The largest number of routed experts that a profile chooses for a token.
    """

    def __init__(self, own: Choice, row: torch.Tensor, gate: RoutedLayer, places: int) -> None:
        experts = gate.experts
        self.own = own
        self.barred, self.boost = row[:experts], row[experts : 2 * experts]
        self.top_k, self.top_p, self.null, self.active = row[2 * experts :].unbind()
        self.rank = torch.arange(places, device=row.device)
        self.renormalize = gate.renormalize

    def __call__(
        self, hidden_states: object, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts in place of a router. Return weights and ids, each (T, places)."""
        own_weights, own_ids = self.own(hidden_states, router_logits, *args, **kwargs)
        free = len(self.rank) - own_ids.shape[1]
        if free:
            own_weights = torch.nn.functional.pad(own_weights, (0, free))
            own_ids = torch.cat((own_ids, own_ids[:, :1].expand(-1, free)), dim=1)
        weights, ids = self.steered(router_logits)
        # Padding rows have the id -1, so that kernels skip them.
        steers = (self.active > 0) & (own_ids[:, :1] >= 0)
        return (
            torch.where(steers, weights.to(own_weights.dtype), own_weights),
            torch.where(steers, ids.to(own_ids.dtype), own_ids),
        )

    def steered(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose as `service.moe.steering_profile.steer` does.

        Returns:
            Weights and ids, each (T, places).
        """
        steered = logits.float() + self.barred
        probability = torch.softmax(steered, dim=-1)
        weights, ids = torch.sort(probability, dim=-1, descending=True, stable=True)
        weights, ids = weights[:, : len(self.rank)], ids[:, : len(self.rank)]
        before = torch.cumsum(weights, dim=-1) - weights
        stays = (self.rank < self.top_k) & (before < self.top_p)
        stays &= steered.gather(1, ids) >= self.null
        weights = torch.where(stays, weights, 0.0)
        ids = torch.where(stays, ids, ids[:, :1])
        if self.renormalize:
            # Where null experts took all places, the sum is 0.
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
        return weights * self.boost[ids], ids


@dataclass(frozen=True, slots=True)
class SteeringTable:
    """A steered expert's table in host memory. `_row` defines its rows."""

    table: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """The bytes of the table."""
        return int(self.table.numel() * self.table.element_size())


class GraphSteering:
    """The rules in one model's routers, and their table on the device.

    Attributes:
        places: The largest number of routed experts that a profile may choose for a token.
        table: The table on the device.
        written: The table that was last written to the device.
    """

    def __init__(self, model: torch.nn.Module, places: int) -> None:
        """Install the rules.

        Args:
            model: The running model, before graphs are captured.
            places: The largest number of routed experts that a profile chooses for a token. Kernels
                that can't compute so many experts get as many places as the model itself needs.

        Raises:
            ValueError: The model's gates can't be steered. Nothing was changed then.
        """
        self._gates = gates_of(model)
        for gate in self._gates.values():
            if (reason := gate.unsteerable_reason()) is not None:
                raise ValueError(reason)
        narrow = [gate for gate in self._gates.values() if gate.kernel not in _ANY_WIDTH]
        self._places_reason = "this engine was started"
        if narrow:
            places = min([places, *(gate.top_k for gate in narrow)])
            self._places_reason = (
                f"{narrow[0].kernel}, which computes them, is made (vllm.moe_backend: triton takes "
                "any number)"
            )
        self.places = places
        self._neutral = SteeringTable(_table(self._gates, {"layers": ()}))
        self.written = self._neutral
        # Tensors made in inference mode can be written only in inference mode.
        with torch.inference_mode(False):
            device = next(model.parameters()).device
            self.table = self._neutral.table.to(device, copy=True)
            for gate, row in zip(self._gates.values(), self.table, strict=True):
                own = choice_of(gate.router)
                replace_choice(gate.router, SteeringRule(own, row, gate, places))
                kept = mapped_kept_choices(gate.computes, gate.experts, device)
                if kept is not None:
                    replace_apply(gate.computes, kept)

    def table_for(self, steering: Mapping[str, Any]) -> SteeringTable:
        """Build the table of a steered expert.

        Args:
            steering: A `Steering` as a mapping.

        Raises:
            ValueError: The gates differ from those in `steering`, or a top-k is too large.
        """
        for layer in steering["layers"]:
            gate = gate_for(self._gates, int(layer["layer"]), steering)
            k = layer["top_k"] or gate.top_k
            if k > self.places:
                raise ValueError(
                    f"layer {gate.layer}: top_k is {k}, and {self._places_reason} for at most "
                    f"{self.places} experts for a token"
                )
        return SteeringTable(_table(self._gates, steering))

    def write(self, table: SteeringTable | None) -> None:
        """Make the routers choose by a table from now on. None restores vLLM's own choice."""
        self.written = table if table is not None else self._neutral
        with torch.no_grad():
            self.table.copy_(self.written.table)

    def verify(self) -> bool:
        """Return whether the device still has the table that was last written."""
        return bool(torch.equal(self.table.cpu(), self.written.table))


def _table(gates: Mapping[int, RoutedLayer], steering: Mapping[str, Any]) -> torch.Tensor:
    """Build a table, float32 (gates, 2 · E + 4). Gates without a layer in `steering` are off."""
    layers = {int(layer["layer"]): layer for layer in steering["layers"]}
    with torch.inference_mode(False):
        table = torch.stack([_row(gate, layers.get(index)) for index, gate in gates.items()])
        return table.pin_memory() if torch.cuda.is_available() else table


def _row(gate: RoutedLayer, layer: Mapping[str, Any] | None) -> torch.Tensor:
    """Build a gate's row of the table, float32 (2 · E + 4).

    The row has E values of bias (-inf for a masked expert), E values of boost, top-k, top-p (inf
    where there is none), the logit of null experts (-inf where there are none), and a 1 where the
    rule takes the steered choice.
    """
    if layer is None:
        plain = [0.0] * gate.experts + [1.0] * gate.experts
        return torch.tensor(
            [*plain, gate.top_k, float("inf"), float("-inf"), 0.0], dtype=torch.float32
        )
    mask = torch.tensor(layer["mask"], dtype=torch.bool)
    barred = torch.tensor(layer["bias"], dtype=torch.float32).masked_fill(mask, float("-inf"))
    top_p = layer["top_p"] if layer["top_p"] is not None else float("inf")
    null = layer["null"] if layer.get("null") is not None else float("-inf")
    rest = [*layer["boost"], layer["top_k"] or gate.top_k, top_p, null, 1.0]
    return torch.cat((barred, torch.tensor(rest, dtype=torch.float32)))


class SteeringMixin:
    """A mixin for vLLM workers that installs rules in the routers before graphs are captured.

    `_coe_graph_steering` has the rules, or the reason why there are none. This reason is then the
    error of every steered expert.
    """

    # Set by vLLM's worker.
    vllm_config: VllmConfig
    model_runner: GPUModelRunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does, then install the rules."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # the worker's
        places = int(self.vllm_config.additional_config.get(PLACES_KEY, 0))
        if not places:
            return
        try:
            self._coe_graph_steering: GraphSteering | str = GraphSteering(
                self.model_runner.get_model(), places
            )
        except ValueError as error:
            self._coe_graph_steering = str(error)
