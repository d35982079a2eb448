"""Section `server.breaker`: circuit breakers and retries."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section


class BreakerConfig(Section):
    """Circuit breakers and retries, for each expert in each pool and each remote endpoint."""

    failures: int = Field(5, ge=1, description="Consecutive failures that open a breaker.")
    open_duration_s: float = Field(
        2.0,
        gt=0,
        description="Time that a breaker stays open before it lets one request through as a "
        "probe, in s. It doubles after each failed probe.",
    )
    max_open_duration_s: float = Field(
        60.0, gt=0, description="Longest time that a breaker stays open, in s."
    )
    min_hang_s: float = Field(
        20.0,
        gt=0,
        description="A missed deadline counts as a failure only if the expert had at least this "
        "time, in s, so that short deadlines of clients open no breaker.",
    )
    retry_budget_ratio: float = Field(
        0.2, ge=0, le=1, description="Retries by the gateway, as a share of requests."
    )
    retry_budget_min: float = Field(
        64.0, ge=0, description="Retries that are allowed beyond that share."
    )
