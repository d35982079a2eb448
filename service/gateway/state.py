"""What a gateway has counted and learned, whatever its config says: it outlives every config.

A gateway by another config goes on with the same object, so that a reload loses no counter,
length or breaker. All of it is kept by the names of experts and recipes. What was learned of an
expert that went, or that is another one under the same name, is forgotten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from random import random
from typing import Any

from service.broker.breaker import BreakerPolicy, Breakers, RetryBudget
from service.broker.cost_model import Lengths
from service.config import BreakerConfig, Config, ExpertConfig
from service.gateway.console.event_stream import HISTORY
from service.gateway.console.request_history import RequestHistory
from service.gateway.dispatch.circuit_breakers import Place
from service.gateway.metrics import GatewayMetrics
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.gateway.routing.quality import Escalations

# What may change of an expert that still answers with the same weights.
_ASIDE = {"pinned", "categories", "quality", "price", "description", "capabilities"}
# Of a remote one, these too.
_ASIDE_REMOTE = {"max_in_flight", "max_queued_requests", "connect_timeout_s", "stall_timeout_s"}


@dataclass(slots=True)
class GatewayState:
    """See the module.

    Attributes:
        breakers: Circuit breakers of places: (expert, pool's boot id).
        retries: How many requests may still be sent a second time.
        metrics: Every counter of this gateway.
        recent: The last requests, for the console.
        history: The console's graphs.
        prefix_affinity: Where conversations are in prefix caches.
        lengths: How long answers are.
        escalations: How often cascades ask their later experts.
        created_s: When the gateway began, in seconds since 1970.
    """

    breakers: Breakers[Place]
    retries: RetryBudget
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    recent: RequestHistory = field(default_factory=RequestHistory)
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    prefix_affinity: PrefixAffinity = field(default_factory=PrefixAffinity)
    lengths: Lengths = field(default_factory=Lengths)
    escalations: Escalations = field(default_factory=Escalations)
    created_s: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def new(cls, config: BreakerConfig) -> GatewayState:
        """That of a gateway which has seen nothing."""
        policy = BreakerPolicy(config.failures, config.open_duration_s, config.max_open_duration_s)
        return cls(
            Breakers(policy, random),
            RetryBudget(config.retry_budget_ratio, config.retry_budget_min),
        )

    def forget(self, experts: Collection[str]) -> None:
        """These experts went, or are others than they were."""
        if not experts:
            return
        self.breakers.forget(lambda place: place[0] in experts)
        self.prefix_affinity.forget(experts)
        self.lengths.forget(experts)
        self.escalations.forget(experts)


def replaced(
    old: Config, new: Config, old_files: Mapping[str, str], new_files: Mapping[str, str]
) -> set[str]:
    """The experts of a config that are gone in another one, or have other weights there.

    `old_files`, `new_files`: for each expert another text whenever what its files hold is.
    """
    return {
        name
        for name in old.experts
        if name not in new.experts
        or old_files.get(name) != new_files.get(name)
        or _weights(old, name) != _weights(new, name)
    }


def _weights(config: Config, name: str) -> list[dict[str, Any]]:
    """What an expert's answers come from, its base's included."""
    expert = config.experts[name]
    told = [_of(expert)]
    if expert.base is not None:
        told.append(_of(config.experts[expert.base]))
    return told


def _of(expert: ExpertConfig) -> dict[str, Any]:
    told = expert.model_dump(exclude=_ASIDE)
    if expert.remote is not None:
        told["remote"] = expert.remote.model_dump(exclude=_ASIDE_REMOTE)
    return told
