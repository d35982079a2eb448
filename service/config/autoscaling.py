"""Sections `pools.KIND.autoscaling` and `server.gateways`: how many replicas run, and when."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from service.config.section_base import Section, shown

_MOST_GATEWAYS = 64


class AutoscalingConfig(Section):
    """When replicas of a kind of pool are added and removed. `{}`: the defaults.

    The signal that asks for the most replicas counts.
    """

    initial_replicas: int | None = Field(
        None, ge=0, description="Replicas at the start. Default: min_replicas."
    )
    target_ongoing_requests: float | None = Field(
        16.0,
        gt=0,
        description="Signal: running and waiting requests per replica. A request counts once per "
        "answer; while it waits, at least once per 2,048 tokens of its prompt. null: not used.",
    )
    target_wait_s: float | None = Field(
        None,
        gt=0,
        description="Signal: longest estimated wait in a replica's queue, in s. Replicas are added "
        "for the load that arrives, at target_utilization, and for what waits already. Needs no "
        "estimate of how many requests a replica bears. Default: not used.",
    )
    target_tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="Signal: completion tokens per second and replica. It should be less than a "
        "replica can make. Default: not used.",
    )
    target_utilization: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of the places of an engine (max_num_seqs) that may be busy. Replicas "
        "are removed only if the others stay below it; with target_wait_s they are added for it.",
    )
    upscale_delay_s: float = Field(
        2.0, ge=0, description="Time that a load must last before replicas are added, in s."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0, description="Time without the load before replicas are removed, in s."
    )
    downscale_to_zero_delay_s: float | None = Field(
        None,
        ge=0,
        description="Time without any request before the last replica is removed, in s. Default: "
        "downscale_delay_s.",
    )
    upscale_factor: float = Field(
        2.0,
        gt=1,
        description="At most this many times the replicas that serve are wanted at once, because "
        "the queue grows while further ones start. With target_wait_s, the load that arrives may "
        "ask for more.",
    )
    downscale_drain_s: float = Field(
        900.0,
        ge=0,
        description="Time in which running requests may finish in a replica that is removed, in s. "
        "At a stop of the service, server.drain_s counts.",
    )

    @model_validator(mode="after")
    def _check_signals(self) -> AutoscalingConfig:
        if not (self.target_ongoing_requests or self.target_wait_s or self.target_tokens_per_s):
            raise ValueError(
                "needs at least one of target_ongoing_requests, target_wait_s, target_tokens_per_s"
            )
        return self


class GatewaysConfig(Section):
    """Gateway replicas: processes without a GPU. A number means that many at all times."""

    min_replicas: int = Field(1, ge=1, le=_MOST_GATEWAYS, description="Gateways kept running.")
    max_replicas: int | None = Field(
        None, ge=1, le=_MOST_GATEWAYS, description="Gateways under load. Default: min_replicas."
    )
    target_utilization: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Signal: share of a core that a gateway uses. Its event loop has one.",
    )
    target_in_flight_requests: float | None = Field(
        None, gt=0, description="Signal: requests in a gateway. Default: not used."
    )
    upscale_delay_s: float = Field(
        10.0, ge=0, description="Time that a load must last before gateways are added, in s."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0, description="Time without the load before gateways are removed, in s."
    )
    upscale_factor: float = Field(
        2.0, gt=1, description="At most this many times the running gateways are wanted at once."
    )
    downscale_drain_s: float = Field(
        900.0,
        ge=0,
        description="Time in which running requests may finish in a gateway that is removed, in s. "
        "At a stop of the service, server.drain_s counts.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, given: Any) -> Any:
        if isinstance(given, dict | GatewaysConfig):
            return given
        if not isinstance(given, int) or isinstance(given, bool):
            raise ValueError(
                "input should be a number of gateways, or a mapping with min_replicas and "
                f"max_replicas, not {shown(given)}"
            )
        if not 1 <= given <= _MOST_GATEWAYS:
            raise ValueError(f"input should be from 1 to {_MOST_GATEWAYS}, not {given}")
        return {"min_replicas": given}

    @model_validator(mode="after")
    def _check_replicas(self) -> GatewaysConfig:
        if self.most_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        if not self.scales:
            refuse_changes(self, ("min_replicas", "max_replicas"))
        return self

    @property
    def most_replicas(self) -> int:
        """The value of `max_replicas`, or its default."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas

    @property
    def scales(self) -> bool:
        """Whether the number of gateways changes with the load."""
        return self.most_replicas > self.min_replicas


def refuse_changes(section: Section, allowed: tuple[str, ...] = ()) -> None:
    """Refuse values that differ from the defaults of a section that has no effect.

    A config that this program has written names every field.

    Raises:
        ValueError: A field other than those `allowed` has another value than its default.
    """
    fields = type(section).model_fields
    changed = [
        name
        for name, field in fields.items()
        if name not in allowed and getattr(section, name) != field.default
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: without effect, because max_replicas is not above min_replicas"
        )
