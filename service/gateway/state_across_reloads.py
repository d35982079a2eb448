"""Counters and learned values of a gateway, which outlive every config.

The gateway of the next config uses the same object, so that a reload loses no counter, length or
breaker. The keys of the values are names of experts and recipes. A reload forgets the values of an
expert that is gone, or that has other weights under the same name.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from random import random
from typing import Any

from service.broker.circuit_breaker import BreakerPolicy, Breakers, RetryBudget
from service.broker.cost_model import Lengths
from service.broker.round_gains import RoundGains
from service.broker.savings import SavingsTotal
from service.broker.thinking_lengths import ThinkingLengths
from service.config import BreakerConfig, Config, ExpertConfig
from service.gateway.console.event_stream import HISTORY
from service.gateway.console.request_history import RequestHistory
from service.gateway.dispatch.circuit_breakers import BreakerKey, RemoteUrl
from service.gateway.request_metrics import GatewayMetrics
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.gateway.routing.quality_model import Escalations
from service.gateway.routing.session_memory import SessionMemory

# Keys of an expert's config that do not influence its answers.
_NOT_WEIGHTS = {
    "pinned",
    "idle_unload_s",
    "categories",
    "quality",
    "quality_from",
    "price",
    "description",
    "capabilities",
}
# Keys of the section of a remote expert that do not influence its answers.
_NOT_WEIGHTS_REMOTE = {
    "max_in_flight",
    "max_queued_requests",
    "connect_timeout_s",
    "stall_timeout_s",
}


@dataclass(slots=True)
class GatewayState:
    """The values that one gateway keeps.

    Attributes:
        breakers: Circuit breakers, by place or by the URL of remote experts.
        retries: The retry budget.
        metrics: Every counter of this gateway.
        recent: The last requests, for the console.
        history: The points of the console's graphs.
        prefix_affinity: The engines that have conversations in their prefix caches.
        sessions: The conversations of each tenant, with the experts that answered them.
        lengths: Learned lengths of answers.
        thinking: Learned lengths of thinking.
        review_lengths: Learned lengths of reviews.
        escalations: Learned frequency of the later steps of recipes.
        round_gains: Learned gains of further rounds of deliberations.
        savings: What requests saved since the gateway's start, by baseline, of all tenants.
        created_s: When the gateway was started, in seconds since 1970.
    """

    breakers: Breakers[BreakerKey]
    retries: RetryBudget
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    recent: RequestHistory = field(default_factory=RequestHistory)
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    prefix_affinity: PrefixAffinity = field(default_factory=PrefixAffinity)
    sessions: SessionMemory = field(default_factory=SessionMemory)
    lengths: Lengths = field(default_factory=Lengths)
    thinking: ThinkingLengths = field(default_factory=ThinkingLengths)
    review_lengths: Lengths = field(default_factory=Lengths)
    escalations: Escalations = field(default_factory=Escalations)
    round_gains: RoundGains = field(default_factory=RoundGains)
    savings: dict[str, SavingsTotal] = field(default_factory=dict)
    created_s: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def new(cls, config: BreakerConfig) -> GatewayState:
        """Create the state of a new gateway."""
        policy = BreakerPolicy(config.failures, config.open_duration_s, config.max_open_duration_s)
        return cls(
            Breakers(policy, random),
            RetryBudget(config.retry_budget_ratio, config.retry_budget_min),
        )

    def forget(self, experts: Collection[str]) -> None:
        """Forget the values of experts that are gone or have other weights now."""
        if not experts:
            return
        self.breakers.forget(lambda key: not isinstance(key, RemoteUrl) and key[0] in experts)
        self.prefix_affinity.forget(experts)
        self.lengths.forget(experts)
        self.thinking.forget(experts)
        self.review_lengths.forget(experts)
        self.escalations.forget(experts)
        self.round_gains.forget(experts)


def replaced(
    old: Config, new: Config, old_files: Mapping[str, str], new_files: Mapping[str, str]
) -> set[str]:
    """Return the experts of a config that are gone or have other weights in the next config.

    Args:
        old: The config.
        new: The next config.
        old_files: A fingerprint of each expert's files.
        new_files: The same for the next config.
    """
    return {
        name
        for name in old.experts
        if name not in new.experts
        or old_files.get(old.owner_of(name)) != new_files.get(new.owner_of(name))
        or _weights(old, name) != _weights(new, name)
    }


def _weights(config: Config, name: str) -> list[dict[str, Any]]:
    """The parts of the config that determine an expert's answers, with those of its base."""
    sources = []
    at: str | None = name
    while at is not None:
        sources.append(_of(config.experts[at]))
        at = config.experts[at].base
    return sources


def _of(expert: ExpertConfig) -> dict[str, Any]:
    source = expert.model_dump(exclude=_NOT_WEIGHTS)
    if expert.remote is not None:
        source["remote"] = expert.remote.model_dump(exclude=_NOT_WEIGHTS_REMOTE)
    return source
