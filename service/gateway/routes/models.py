"""What `/v1/models` and `/ready` tell of the experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from service.broker.pool_state import PoolView
from service.config import Config
from service.gateway.redaction import without_folders
from service.gateway.request.parsing import AUTO
from service.gateway.routing.candidates import PRESETS
from service.types import NOBODY, Residency, Tenant

# Which of several pools' states speaks for an expert.
_BEST_FIRST = (
    Residency.DEVICE,
    Residency.HOST,
    Residency.LOADING,
    Residency.DRAINING,
    Residency.DISK,
    Residency.FAILED,
)


def states(
    config: Config, views: Iterable[PoolView], remotes: dict[str, str | None]
) -> dict[str, dict[str, Any]]:
    """Each expert's state, by name: the best that any pool has, with reason and context length.

    `remotes`: remote experts, each with the reason why it can't be used, or None.
    """
    told: dict[str, dict[str, Any]] = {}
    known = [view.snapshot for view in views]
    for name, expert in config.experts.items():
        if expert.remote is not None:
            why = remotes.get(name)
            told[name] = {"state": "failed", "reason": why} if why else {"state": "device"}
            continue
        found = [snapshot.experts[name] for snapshot in known if name in snapshot.experts]
        if not found:
            told[name] = {"state": Residency.DISK.value, "reason": "no pool that holds it runs yet"}
            continue
        best = min(found, key=lambda state: _BEST_FIRST.index(state.state))
        entry: dict[str, Any] = {"state": best.state.value}
        if best.reason:
            entry["reason"] = best.reason
        if best.state is Residency.LOADING:
            entry["eta_s"] = best.eta_s
        if best.max_model_len:
            entry["max_model_len"] = best.max_model_len
        if best.engine:
            entry["engine"] = best.engine
        told[name] = entry
    return told


def _kind(config: Config, name: str) -> str:
    expert = config.experts[name]
    if expert.remote is not None:
        return "remote"
    if expert.base is not None:
        return "steered" if expert.profile is not None else "lora"
    return "full"


def for_clients(told: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states as clients may read them: no reason names a folder of this machine."""
    return {
        name: {**one, "reason": without_folders(one["reason"])} if "reason" in one else one
        for name, one in told.items()
    }


def _expert(
    config: Config, name: str, state: dict[str, Any], created_s: int, tenant: Tenant
) -> dict[str, Any]:
    expert = config.experts[name]
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": _kind(config, name),
            "description": expert.description,
            "categories": list(expert.categories),
            "capabilities": list(expert.capabilities),
            **state,
        },
    }
    if expert.base is not None and tenant.may_ask(expert.base):
        entry["parent"] = expert.base
    if "max_model_len" in state:
        entry["max_model_len"] = state["max_model_len"]
    return entry


def _auto(config: Config, name: str, created_s: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": "auto",
            "description": "the expert that fits the prompt",
            "categories": sorted(config.category_map()),
            "capabilities": sorted({c for e in config.experts.values() for c in e.capabilities}),
        },
    }


def _recipe(config: Config, name: str, created_s: int) -> dict[str, Any]:
    recipe = config.recipes[name]
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": recipe.kind,
            "members": list(recipe.members),
            "later": list(recipe.later),
            "capabilities": _common(config, (*recipe.members, *recipe.later)),
        },
    }


def may_ask(config: Config, name: str, tenant: Tenant) -> bool:
    """Whether a tenant may ask for an expert or recipe of the config, with all whom it asks."""
    recipe = config.recipes.get(name)
    asked = (name,) if recipe is None else (*recipe.members, *recipe.later)
    return all(map(tenant.may_ask, asked))


def _common(config: Config, experts: Iterable[str]) -> list[str]:
    """What all experts of a recipe can do, of what recipes answer."""
    able = [set(config.experts[name].capabilities) for name in experts]
    return [one for one in ("chat", "json", "vision", "audio") if all(one in a for a in able)]


def listing(
    config: Config, now: dict[str, dict[str, Any]], created_s: int, tenant: Tenant = NOBODY
) -> dict[str, Any]:
    """OpenAI's list of models: `auto`, and the experts (failed ones with their reason) and
    recipes that this tenant may ask for."""
    names = [name for name in (*config.experts, *config.recipes) if may_ask(config, name, tenant)]
    entries = [entry(config, now, created_s, name, tenant) for name in names]
    return {"object": "list", "data": [_auto(config, AUTO, created_s), *entries]}


def entry(
    config: Config,
    now: dict[str, dict[str, Any]],
    created_s: int,
    name: str,
    tenant: Tenant = NOBODY,
) -> dict[str, Any] | None:
    """What may be asked for by this name, or None: there is no such thing, or not for this
    tenant."""
    if name in config.recipes or name in config.experts:
        if not may_ask(config, name, tenant):
            return None
        if name in config.recipes:
            return _recipe(config, name, created_s)
        return _expert(config, name, now[name], created_s, tenant)
    head, slash, category = name.partition("/")
    base, colon, preset = head.partition(":")
    known = not slash or category in config.category_map()
    if base == AUTO and known and (preset in PRESETS and (preset or not colon)):
        return _auto(config, name, created_s)
    return None
