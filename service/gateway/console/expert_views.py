"""The console's view of experts and pools, made from snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from service.broker.pool_state import PoolView
from service.config import Config

# Fields of a pool's details of an expert that snapshots do not have.
_DETAILS = ("pinned", "host_bytes", "weight_bytes", "last_swap", "tokens")


def describe_experts(config: Config) -> list[dict[str, Any]]:
    """The experts of the config, as JSON."""
    experts = []
    for name, expert in config.experts.items():
        made = "steered" if expert.profile else "lora"
        kind = "remote" if expert.remote else made if expert.base else "full"
        if expert.is_variant:
            kind = "variant"
        elif expert.command is not None:
            kind = "command"
        experts.append(
            {
                "name": name,
                "kind": kind,
                "base": expert.base,
                "form": expert.form if expert.base else None,
                "description": expert.description,
                "categories": list(expert.categories),
            }
        )
    return experts


def describe_pools(
    views: Iterable[PoolView],
    details: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rates: Mapping[tuple[str, str], float],
    gpus: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The pools with their experts, as JSON.

    Args:
        views: The state of every pool.
        details: Details of experts, by boot id and expert.
        rates: Tokens per second, by (boot id, expert).
        gpus: Memory of the GPUs, by boot id; nothing of pools on CPU.
    """
    return [
        {
            **_pool(view, {} if view.boot is None else details.get(view.boot, {}), rates),
            "gpus": [] if view.boot is None else gpus.get(view.boot, []),
        }
        for view in views
    ]


def _pool(
    view: PoolView,
    details: Mapping[str, Mapping[str, Any]],
    rates: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    snapshot = view.snapshot
    experts = {}
    for name, state in snapshot.experts.items():
        queue = snapshot.queues.get(name)
        speed = snapshot.speeds.get(name)
        rate = 0.0 if view.boot is None else rates.get((view.boot, name), 0.0)
        entry: dict[str, Any] = {
            "state": state.state.value,
            "reason": state.reason,
            "released": state.released,
            "eta_s": round(state.eta_s, 1),
            "swap_s": state.swap_s,
            "slot": state.slot,
            "waiting": queue.waiting if queue else 0,
            "running": queue.running if queue else 0,
            "capacity": snapshot.capacity.get(name, 0),
            "first_s": speed.first_s if speed else 0.0,
            "chunk_s": speed.chunk_s if speed else 0.0,
            "tokens_per_s": round(rate, 1),
        }
        more = details.get(name, {})
        experts[name] = entry | {key: more[key] for key in _DETAILS if key in more}
    return {
        "id": "remote" if view.boot is None else f"{snapshot.kind}-{view.boot[:6]}",
        "kind": snapshot.kind,
        "boot": view.boot,
        "age_s": round(view.age_s, 2),
        "draining": snapshot.draining,
        "experts": experts,
    }
