"""Plans a placement from recorded loads: the file of loads, the compared plans, vLLM's options.

vLLM 0.32 takes no map of experts to devices. It has `expert_placement_strategy`, which is the same
for every layer, and EPLB, which moves experts by the loads that it measures itself. EPLB uses the
rule of `placement.longest_first`, with a fixed number of redundant experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from router_models.moe.expert_placement import (
    Floats,
    Placed,
    copied,
    exact,
    least_possible,
    linear,
    longest_first,
    round_robin,
)
from service.errors import ArtifactError

FORMAT = "coe.placement/1"
_SMALL = 256
"""Experts times devices of a layer, up to which the exact solver is tried."""
_CLOSE = 1e-6
_WORTH = 1.02
"""EPLB is not worth its moving about for less than two parts in a hundred."""


class PlacementError(ArtifactError):
    """Loads can't be read, or experts not placed so."""

    code = "no_placement"


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """A placement of all layers, with its cost per step relative to perfectly shared work.

    cost: the sum over layers of the busiest device's load, by that of the mean device's: 1 is
    perfect, 2 takes twice as long. worst: of the layer where that is largest. exact: layers
    for which nothing better is possible.
    """

    name: str
    cost: float
    worst: float
    exact: int
    layers: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All ways compared, and the best. `layers` are the model's layer numbers."""

    layers: tuple[int, ...]
    loads: tuple[Floats, ...]
    devices: int
    replicas: int
    ways: tuple[PlacementResult, ...]

    @property
    def best(self) -> PlacementResult:
        """The placement with the least cost. The simplest placement wins a tie."""
        return min(self.ways, key=lambda way: way.cost)


def read_loads(path: Path) -> tuple[tuple[int, ...], tuple[Floats, ...]]:
    """Read layers and their experts' loads from a reply of `GET /admin/experts/NAME/moe`."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        rows = {int(row["layer"]): np.array(row["load"], np.float64) for row in payload["layers"]}
    except OSError as error:
        raise PlacementError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise PlacementError(
            f'{path}: expected {{"layers": [{{"layer": 0, "load": [...]}}]}}: {error!r}'
        ) from None
    if not rows:
        raise PlacementError(f"{path}: no layers in it")
    count = next(iter(rows.values())).size
    for layer, load in rows.items():
        if load.shape != (count,) or count < 2:
            raise PlacementError(
                f"{path}: layer {layer} has loads {load.shape}; the first layer has {count}"
            )
        if not np.isfinite(load).all() or (load < 0).any():
            raise PlacementError(f"{path}: layer {layer}: loads are finite numbers from 0 on")
        if not load.any():
            raise PlacementError(f"{path}: layer {layer} has no load; record some traffic first")
    return tuple(sorted(rows)), tuple(rows[layer] for layer in sorted(rows))


def make_plan(
    layers: tuple[int, ...],
    loads: tuple[Floats, ...],
    *,
    devices: int,
    replicas: int = 0,
    time_limit_s: float = 60.0,
    clock: Callable[[], float],
) -> Plan:
    """Compare all ways. `time_limit_s` is for the exact solver, over all layers.

    Raises PlacementError.
    """
    experts = len(loads[0])
    try:
        before = [
            _way(name, loads, devices, [place(experts, devices)] * len(loads))
            for name, place in (("linear", linear), ("round_robin", round_robin))
            if experts % devices == 0
        ]
        copies = [copied(load, replicas, devices) for load in loads]
        quick = [longest_first(load, c, devices) for load, c in zip(loads, copies, strict=True)]
    except ValueError as error:
        raise PlacementError(str(error)) from None
    ways = [*before, _way("longest first", loads, devices, quick)]
    end = clock() + time_limit_s
    best = []
    for load, count, one in zip(loads, copies, quick, strict=True):
        left = end - clock()
        done = one.busiest(load) <= least_possible(load, count, devices) * (1 + _CLOSE)
        if not done and experts * devices <= _SMALL and left > 0:
            found = exact(load, count, devices, time_limit_s=left)
            if found is not None:
                one, done = min(found, one, key=lambda placed: placed.busiest(load)), True
        best.append((one, done))
    proven = sum(done for _, done in best)
    if any(one is not other for (one, _), other in zip(best, quick, strict=True)) or proven:
        ways.append(_way("exact", loads, devices, [one for one, _ in best], proven))
    return Plan(layers, loads, devices, replicas, tuple(ways))


def vllm_options(plan: Plan) -> dict[str, Any]:
    """Return the options for a pool's `vllm` section: EPLB, if it gains anything."""
    options: dict[str, Any] = {
        "tensor_parallel_size": plan.devices,
        "enable_expert_parallel": True,
    }
    plain = next((way.cost for way in plan.ways if way.name == "linear"), np.inf)
    if not plan.replicas and plain <= plan.best.cost * _WORTH:
        return options | {"expert_placement_strategy": "linear"}
    options["enable_eplb"] = True
    if plan.replicas:
        options["eplb_config"] = {"num_redundant_experts": plan.replicas}
    return options


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs, and what `--out` holds. layers[].devices: each device's experts."""
    best = plan.best
    return {
        "format": FORMAT,
        "devices": plan.devices,
        "replicas": plan.replicas,
        "best": best.name,
        "ways": [
            {"name": w.name, "cost": w.cost, "worst_layer": w.worst, "exact_layers": w.exact}
            for w in plan.ways
        ],
        "layers": [
            {
                "layer": layer,
                "devices": [list(held) for held in placed.devices],
                "load": placed.device_load(load).tolist(),
            }
            for layer, load, placed in zip(plan.layers, plan.loads, best.layers, strict=True)
        ],
        "vllm": vllm_options(plan),
        "simulated": True,
    }


def _way(
    name: str, loads: tuple[Floats, ...], devices: int, placed: list[Placed], proven: int = 0
) -> PlacementResult:
    busiest = np.array(
        [layer_placement.busiest(load) for layer_placement, load in zip(placed, loads, strict=True)]
    )
    mean = np.array([load.sum() / devices for load in loads])
    return PlacementResult(
        name,
        float(busiest.sum() / mean.sum()),
        float((busiest / mean).max()),
        proven,
        tuple(placed),
    )
