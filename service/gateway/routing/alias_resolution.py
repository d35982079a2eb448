"""Puts the target of an alias into requests that name the alias."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from service.broker.model_aliases import (
    AliasChoice,
    AliasTable,
    draw_target,
    is_auto,
    weights_for,
)
from service.config import Config
from service.config.aliases import ResolvedAlias, resolve_aliases
from service.errors import ForbiddenError
from service.gateway.request.conversation_turns import turn_state
from service.gateway.request.parsing import InferenceRequest
from service.gateway.routing.session_affinity import session_name
from service.http.prompt_endpoints import TABLE
from service.types import Tenant


class AliasResolution:
    """The aliases of one config.

    Args:
        config: The config.
        left_out: Returns the targets of an alias that were rolled back.
    """

    def __init__(
        self,
        config: Config,
        left_out: Callable[[str | None], Collection[str]] = lambda _alias: (),
    ) -> None:
        self._left_out = left_out
        resolved = resolve_aliases(config.aliases)
        self._table = AliasTable(resolved, {*config.experts, *config.recipes})
        self._experts = {name: frozenset({name}) for name in config.experts}
        self._experts |= {
            name: frozenset((*recipe.members, *recipe.later))
            for name, recipe in config.recipes.items()
        }

    def resolve(self, request: InferenceRequest, named: str | None = None) -> InferenceRequest:
        """Return the request with the target of its alias as its model, if it names an alias.

        Everything behind, such as allowed experts, limits and caches, sees the target only.

        Args:
            request: The request.
            named: The name for which its model was chosen before, as for a line of a batch; None
                where the model is what the client named. The alias of this name counts the request.

        Raises:
            ForbiddenError: The key may use none of the alias's targets.
        """
        if named is not None and named != request.model:
            chosen = self._chosen_before(named, request)
            if chosen is not None:
                return replace(request, alias=chosen)
        found = self._table.find(request.model)
        if found is None:
            return request
        alias, resolved = found
        weights = weights_for(
            resolved,
            lambda target: self._may_ask(request.tenant, target),
            self._left_out(resolved.shared_by),
        )
        if not weights:
            raise ForbiddenError(f"this key may not use what {alias!r} stands for", param="model")
        target = next(iter(weights))
        if len(weights) > 1:
            shared_by = resolved.shared_by or alias
            target = draw_target(weights, shared_by, request.tenant.name, _session(request))
        return replace(
            request,
            model=target,
            data={**request.data, "model": target},
            raw=b"",
            alias=AliasChoice(alias, target, resolved.shared_by),
        )

    def _chosen_before(self, named: str, request: InferenceRequest) -> AliasChoice | None:
        """The target of an alias that led to a request's model; None where the name is no alias.

        It is the model itself, or the name of `auto` for which a plan has chosen the model.
        """
        found = self._table.find(named)
        if found is None:
            return None
        alias, resolved = found
        target = request.model
        if target not in resolved.targets:
            autos = {name: share for name, share in resolved.targets.items() if is_auto(name)}
            if not autos:
                return None
            seed = (resolved.shared_by or alias, request.tenant.name, _session(request))
            target = draw_target(autos, *seed)
        return AliasChoice(alias, target, resolved.shared_by)

    def still_answers(self, name: str, target: str, tenant: Tenant) -> bool:
        """Whether what was chosen for a request some time ago may answer it now.

        Args:
            name: The model that the request names.
            target: The expert or recipe that was chosen for it.
            tenant: The tenant whose request it is, with its key.
        """
        if target not in self._experts or not self._may_ask(tenant, target):
            return False
        found = self._table.find(name)
        return found is None or target not in self._left_out(found[1].shared_by)

    def exact(self, tenant: Tenant) -> Iterator[tuple[str, ResolvedAlias]]:
        """Yield the aliases without `*` that a tenant may use, with the targets it may use."""
        for name, resolved in self._table.exact.items():
            if (allowed := self._allowed(resolved, tenant)) is not None:
                yield name, allowed

    def find(self, name: str, tenant: Tenant) -> ResolvedAlias | None:
        """What a name stands for; None where it is no alias, or the tenant may use no target."""
        found = self._table.find(name)
        return None if found is None else self._allowed(found[1], tenant)

    def _allowed(self, resolved: ResolvedAlias, tenant: Tenant) -> ResolvedAlias | None:
        weights = weights_for(resolved, lambda target: self._may_ask(tenant, target))
        return ResolvedAlias(resolved.shared_by, weights) if weights else None

    def _may_ask(self, tenant: Tenant, target: str) -> bool:
        # `auto` chooses only among experts that the tenant may use.
        return all(map(tenant.may_ask, self._experts.get(target, ())))


def _session(request: InferenceRequest) -> str:
    """The name of a request's session; of a request without one the request's own id."""
    if (name := session_name(request)) is not None:
        return name
    if TABLE[request.endpoint].needs == "chat":
        # Tokens are counted by the expert that answers the conversation.
        counted = replace(request, turn=turn_state(request.data))
        return session_name(counted) or request.request_id
    return request.request_id
