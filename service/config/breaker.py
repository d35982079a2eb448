"""Section `server.breaker`: when an expert is left alone for a while, and how often is retried."""

from __future__ import annotations

from pydantic import Field

from service.config.base import Section


class BreakerConfig(Section):
    """Circuit breakers and retries: of each expert in each pool, and each remote endpoint."""

    failures: int = Field(5, ge=1, description="Failures in a row that open a breaker.")
    open_duration_s: float = Field(
        2.0,
        gt=0,
        description="How long it stays open before one request is let through as a probe, in s; "
        "twice as long after each probe that failed.",
    )
    max_open_duration_s: float = Field(60.0, gt=0, description="Bound on that, in s.")
    min_hang_s: float = Field(
        20.0,
        gt=0,
        description="An expert that gave no answer within a request's deadline has failed only if "
        "it had at least this long, in s: a client's haste is not its fault.",
    )
    retry_budget_ratio: float = Field(
        0.2, ge=0, le=1, description="Retries by the gateway, as a share of requests."
    )
    retry_budget_min: float = Field(
        64.0, ge=0, description="Retries that may come on top of that share, until earned again."
    )
