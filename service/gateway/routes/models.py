"""`GET /v1/models`: the experts, recipes and aliases that a tenant may use, with their states.

A request with the header `anthropic-version` gets the form of Anthropic's API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from service.broker.pool_state import PoolView
from service.broker.recipe_steps import LEAST_RECRUITS
from service.broker.token_prices import prices_of
from service.config import Config
from service.config.aliases import ResolvedAlias
from service.errors import UnknownEndpointError, UnknownModelError
from service.gateway import anthropic_models
from service.gateway.dependencies import (
    CurrentTenant,
    GatewayServices,
    Services,
    headers_of,
    json_response,
)
from service.gateway.folder_redaction import without_folders
from service.gateway.request.parsing import AUTO, GENERAL
from service.gateway.routing.alias_resolution import AliasResolution
from service.gateway.routing.candidate_planner import PRESETS
from service.http.error_formats import ANTHROPIC_HEADER
from service.types import NOBODY, Residency, Tenant

router = APIRouter()

# An expert's state is the first of these that any pool reports.
_BEST_FIRST = (
    Residency.DEVICE,
    Residency.HOST,
    Residency.LOADING,
    Residency.DRAINING,
    Residency.DISK,
    Residency.FAILED,
)
# Capabilities that a recipe can have as well.
_RECIPE_CAPABILITIES = ("chat", "json", "vision", "audio")


@router.get("/v1/models")
async def list_models(request: Request, services: Services, tenant: CurrentTenant) -> Response:
    """Return OpenAI's list of models, or a page of Anthropic's."""
    states = public_states(services)
    created_s = services.state.created_s
    models = listing(services.config, states, created_s, tenant, services.aliases)
    if ANTHROPIC_HEADER in headers_of(request):
        return json_response(anthropic_models.page_of(models["data"], request.query_params))
    return json_response(models)


@router.get("/v1/models/{name:path}")
async def get_model(
    name: str, request: Request, services: Services, tenant: CurrentTenant
) -> Response:
    """Return one model."""
    if not name:
        raise UnknownEndpointError("there is no /v1/models/; did you mean /v1/models?")
    states = public_states(services)
    created_s = services.state.created_s
    model = entry(services.config, states, created_s, name, tenant, services.aliases)
    anthropic = ANTHROPIC_HEADER in headers_of(request)
    if model is None or (anthropic and not anthropic_models.chats(model)):
        raise UnknownModelError(f"the model {name[:128]!r} does not exist", param="model")
    return json_response(anthropic_models.model_of(model) if anthropic else model)


def public_states(services: GatewayServices) -> dict[str, dict[str, Any]]:
    """The states of all experts as clients may read them."""
    return redact_states(
        expert_states(services.config, services.views(), services.remote_failures())
    )


def expert_states(
    config: Config, views: Iterable[PoolView], remote_failures: dict[str, str | None]
) -> dict[str, dict[str, Any]]:
    """Each expert's state, by name: the best in any pool, with reason and context length.

    Args:
        config: The config that names the experts.
        views: The state of every pool.
        remote_failures: For each remote expert why it can't be used, or None.
    """
    states: dict[str, dict[str, Any]] = {}
    snapshots = [view.snapshot for view in views]
    for name, expert in config.experts.items():
        if expert.remote is not None:
            reason = remote_failures.get(name)
            states[name] = {"state": "failed", "reason": reason} if reason else {"state": "device"}
            continue
        found = [snapshot.experts[name] for snapshot in snapshots if name in snapshot.experts]
        if not found:
            states[name] = {
                "state": Residency.DISK.value,
                "reason": "no pool that holds it runs yet",
            }
            continue
        best = min(found, key=lambda state: _BEST_FIRST.index(state.state))
        state: dict[str, Any] = {"state": best.state.value}
        if best.reason:
            state["reason"] = best.reason
        if best.released:
            state["released"] = True
        if best.state is Residency.LOADING or best.released:
            state["eta_s"] = best.eta_s
        if best.max_model_len:
            state["max_model_len"] = best.max_model_len
        if best.engine:
            state["engine"] = best.engine
        states[name] = state
    return states


def _kind(config: Config, name: str) -> str:
    expert = config.experts[name]
    if expert.is_variant:
        return "variant"
    if expert.remote is not None:
        return "remote"
    if expert.command is not None:
        return "command"
    if expert.base is not None:
        return "steered" if expert.profile is not None else "lora"
    return "full"


def redact_states(states: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states as clients may read them: no reason names a folder of this machine."""
    return {
        name: {**state, "reason": without_folders(state["reason"])} if "reason" in state else state
        for name, state in states.items()
    }


def _expert(
    config: Config, name: str, state: dict[str, Any], created_s: int, tenant: Tenant
) -> dict[str, Any]:
    expert, price = config.experts[name], prices_of(config)[name]
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
            "price": {"prompt": price.prompt, "completion": price.completion},
            **state,
        },
    }
    if expert.base is not None and tenant.may_ask(expert.base):
        entry["parent"] = expert.base
    if "max_model_len" in state:
        entry["max_model_len"] = state["max_model_len"]
    return entry


def _auto(config: Config, name: str, created_s: int, tenant: Tenant) -> dict[str, Any]:
    able = [expert for known, expert in config.experts.items() if tenant.may_ask(known)]
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": "auto",
            "description": "the expert that fits the prompt",
            "categories": categories(config, tenant),
            "capabilities": sorted(
                {capability for expert in able for capability in expert.capabilities}
            ),
        },
    }


def _recipe(config: Config, name: str, created_s: int, tenant: Tenant) -> dict[str, Any]:
    recipe = config.recipes[name]
    experts = [expert for expert in recipe.recipe().experts if tenant.may_ask(expert)]
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": recipe.kind,
            "members": [name for name in recipe.recipe().members if tenant.may_ask(name)],
            "later": list(recipe.later),
            "capabilities": _common(config, experts),
        },
    }


def _alias(
    config: Config,
    states: dict[str, dict[str, Any]],
    created_s: int,
    name: str,
    tenant: Tenant,
    resolved: ResolvedAlias,
) -> dict[str, Any]:
    """An alias with the targets that the tenant may use, and what all of these can do."""
    targets = [entry(config, states, created_s, target, tenant) for target in resolved.targets]
    abilities = [set(target["coe"]["capabilities"]) for target in targets if target is not None]
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "coe",
        "coe": {
            "kind": "alias",
            "targets": dict(resolved.targets),
            "capabilities": sorted(set.intersection(*abilities)) if abilities else [],
        },
    }
    known = [target for target in targets if target is not None and "max_model_len" in target]
    if known and len(known) == len(targets):
        model["max_model_len"] = min(target["max_model_len"] for target in known)
    return model


def categories(config: Config, tenant: Tenant) -> list[str]:
    """The categories of which a tenant may ask an expert, and `general`, which everybody has."""
    named = {
        category
        for name, expert in config.experts.items()
        if tenant.may_ask(name)
        for category in expert.categories
    }
    return sorted(named | {GENERAL})


def may_ask(config: Config, name: str, tenant: Tenant) -> bool:
    """Whether a tenant may use an expert, or every expert of a recipe."""
    recipe = config.recipes.get(name)
    if recipe is None:
        return tenant.may_ask(name)
    found = recipe.recipe()
    enough = found.recruitment is None or (
        sum(map(tenant.may_ask, found.members)) >= LEAST_RECRUITS
    )
    return enough and all(map(tenant.may_ask, found.required))


def _common(config: Config, experts: Iterable[str]) -> list[str]:
    """The capabilities that all experts of a recipe have, of those that a recipe can have."""
    each = [set(config.experts[name].capabilities) for name in experts]
    return [
        capability
        for capability in _RECIPE_CAPABILITIES
        if all(capability in able for able in each)
    ]


def listing(
    config: Config,
    states: dict[str, dict[str, Any]],
    created_s: int,
    tenant: Tenant = NOBODY,
    aliases: AliasResolution | None = None,
) -> dict[str, Any]:
    """OpenAI's list of models: `auto`, and every expert, recipe and alias that the tenant may use.

    Aliases with `*` have no names that could be listed.

    Args:
        config: The config that names them.
        states: Each expert's state, as `expert_states` returns them.
        created_s: When the gateway started, in seconds since 1970.
        tenant: The tenant that the list is for.
        aliases: The config's aliases; None leaves them out.
    """
    names = [name for name in (*config.experts, *config.recipes) if may_ask(config, name, tenant)]
    entries = [entry(config, states, created_s, name, tenant) for name in names]
    if aliases is not None:
        entries += [
            _alias(config, states, created_s, name, tenant, resolved)
            for name, resolved in aliases.exact(tenant)
        ]
    return {"object": "list", "data": [_auto(config, AUTO, created_s, tenant), *entries]}


def entry(
    config: Config,
    states: dict[str, dict[str, Any]],
    created_s: int,
    name: str,
    tenant: Tenant = NOBODY,
    aliases: AliasResolution | None = None,
) -> dict[str, Any] | None:
    """One model of the list; None where it doesn't exist, or the tenant may not use it.

    With `aliases` any name that an alias of them matches is a model, too.
    """
    if name in config.recipes or name in config.experts:
        if not may_ask(config, name, tenant):
            return None
        if name in config.recipes:
            return _recipe(config, name, created_s, tenant)
        return _expert(config, name, states[name], created_s, tenant)
    if aliases is not None and (resolved := aliases.find(name, tenant)) is not None:
        return _alias(config, states, created_s, name, tenant, resolved)
    head, slash, category = name.partition("/")
    base, colon, preset = head.partition(":")
    known = not slash or category in categories(config, tenant)
    if base == AUTO and known and (preset in PRESETS and (preset or not colon)):
        return _auto(config, name, created_s, tenant)
    return None
