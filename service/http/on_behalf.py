"""A request that the gateway makes itself, for a tenant and without an API key."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.types import Tenant

# The scope's key. No HTTP server puts it there, so no client can.
_KEY = "coe.on_behalf"

Settled = TypeVar("Settled")


@dataclass(frozen=True, slots=True)
class UsedByCalls:
    """What the calls of a request came to, also where it got no answer.

    Attributes:
        prompt_tokens: Tokens of prompts.
        completion_tokens: Tokens of answers.
        cost: Units of cost.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(slots=True)
class OnBehalf(Generic[Settled]):
    """The tenant of such a request, and what settles it.

    Attributes:
        tenant: The tenant for whom it is made.
        named: The model that the tenant named, where another name is asked that was chosen for it;
            None where there is no such name.
        settlements: What settles its claims, once it has ended. The maker delivers them.
        used: What its calls came to, once it has ended.
        ended: Set when `settlements` is complete.
    """

    tenant: Tenant
    named: str | None = None
    settlements: list[Settled] = field(default_factory=list)
    used: UsedByCalls = field(default_factory=UsedByCalls)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, scope: MutableMapping[str, Any]) -> None:
        """Put it into the request's ASGI scope."""
        scope[_KEY] = self


def on_behalf(scope: MutableMapping[str, Any]) -> OnBehalf[Any] | None:
    """The tenant for whom the gateway makes a request; None for requests of clients."""
    found: OnBehalf[Any] | None = scope.get(_KEY)
    return found
