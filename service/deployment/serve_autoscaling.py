"""Ray Serve's autoscaling of pools and gateways, by `service.broker.autoscaling`.

Serve calls a policy in its controller ten times a second with what replicas have reported, and
starts or stops replicas accordingly. Delays and bounds are our policy's own; Serve's are set to
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from service.broker.autoscaling import Load, ScalingPolicy, ScalingState, desired_replicas
from service.config import Config, GatewaysConfig
from service.pool.autoscaling_load import PoolLoad

# Names of what replicas report. Those by expert go on with a colon and the expert's name.
_ONGOING, _TOKENS, _SERVING, _START = "ongoing", "tokens_per_s", "serving", "start_s"
_OFFERED, _BACKLOG = "offered", "backlog_s"
# Serve warns below its default push interval of 10 s, although ours is 1 s
# (`launch.ray_environment`).
_LOOK_BACK_S = 11.0
_STATE = "state"
# The load of a gateway is not by expert. Its one event loop is the engine.
_LOOP = "loop"


def pool_stats(load: PoolLoad, boot_s: float = 0.0) -> dict[str, float]:
    """Return a pool's load as Serve carries it.

    Args:
        load: The load.
        boot_s: Seconds that the pool's process took before it started an engine.
    """
    stats = {
        _ONGOING: load.ongoing,
        _TOKENS: load.tokens_per_s,
        _SERVING: float(load.serving),
        _START: boot_s + load.start_s,
    }
    stats |= {f"{_OFFERED}:{expert}": value for expert, value in load.offered.items()}
    return stats | {f"{_BACKLOG}:{expert}": value for expert, value in load.backlog_s.items()}


def gateway_stats(in_flight: int, cpu_share: float) -> dict[str, float]:
    """Return a gateway's load as Serve carries it.

    Args:
        in_flight: Requests in the gateway.
        cpu_share: The share of a core that it uses.
    """
    return {_ONGOING: float(in_flight), _SERVING: 1.0, f"{_OFFERED}:{_LOOP}": cpu_share}


def total_load(reported: Mapping[str, Mapping[Any, Any]], *, held: bool) -> Load:
    """Add up what replicas have reported.

    Args:
        reported: By name and replica, values with their times (Serve's `raw_metrics`).
        held: Whether requests wait outside the replicas.
    """
    # A name that is missing in a replica's last report had no load then.
    last_s: dict[Any, float] = {}
    for by_replica in reported.values():
        for replica, series in by_replica.items():
            if series:
                last_s[replica] = max(last_s.get(replica, 0.0), series[-1].timestamp)
    sums: dict[str, float] = {}
    starts = [0.0]
    by_expert: dict[str, dict[str, float]] = {_OFFERED: {}, _BACKLOG: {}}
    for name, by_replica in reported.items():
        now = [
            float(series[-1].value)
            for replica, series in by_replica.items()
            if series and series[-1].timestamp >= last_s[replica]
        ]
        kind, _, expert = name.partition(":")
        if name == _START:
            starts += now
        elif kind in by_expert:
            by_expert[kind][expert] = sum(now)
        else:
            sums[name] = sum(now)
    return Load(
        ongoing=sums.get(_ONGOING, 0.0),
        tokens_per_s=sums.get(_TOKENS, 0.0),
        offered=by_expert[_OFFERED],
        backlog_s=by_expert[_BACKLOG],
        serving=round(sums.get(_SERVING, 0.0)),
        start_s=max(starts),
        held=held,
    )


class ReplicaPolicy:
    """The policy of one deployment, as Serve calls it. `policy`: fields of `ScalingPolicy`."""

    def __init__(self, **policy: Any) -> None:
        self._policy = ScalingPolicy(**policy)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        # Gateways hold a request while there is no pool for it. Serve counts their `wake` calls.
        held = context.total_num_requests > 0
        wanted, state = desired_replicas(
            total_load(context.raw_metrics or {}, held=held),
            self._policy,
            context.policy_state.get(_STATE) or ScalingState(),
            target=context.target_num_replicas,
            now_s=context.current_time or 0.0,
        )
        return wanted, {_STATE: state}


def pool_scaling(config: Config, kind: str) -> ServeAutoscaling:
    """Return Serve's autoscaling of a kind of pool."""
    pool = config.pools[kind]
    given = pool.scaling
    to_zero_s = given.downscale_to_zero_delay_s
    policy = ScalingPolicy(
        min_replicas=pool.min_replicas,
        max_replicas=pool.most_replicas,
        target_ongoing_requests=given.target_ongoing_requests,
        target_wait_s=given.target_wait_s,
        target_tokens_per_s=given.target_tokens_per_s,
        target_utilization=given.target_utilization,
        engines=max(1, pool.slots or len(config.groups(kind))),
        upscale_delay_s=given.upscale_delay_s,
        downscale_delay_s=given.downscale_delay_s,
        downscale_to_zero_delay_s=given.downscale_delay_s if to_zero_s is None else to_zero_s,
        upscale_factor=given.upscale_factor,
    )
    return _serve_scaling(policy, given.initial_replicas)


def gateway_scaling(given: GatewaysConfig) -> ServeAutoscaling:
    """Return Serve's autoscaling of the gateways."""
    policy = ScalingPolicy(
        min_replicas=given.min_replicas,
        max_replicas=given.most_replicas,
        target_ongoing_requests=given.target_in_flight_requests,
        target_utilization=given.target_utilization,
        add_for_utilization=True,
        upscale_delay_s=given.upscale_delay_s,
        downscale_delay_s=given.downscale_delay_s,
        upscale_factor=given.upscale_factor,
    )
    return _serve_scaling(policy, None)


def _serve_scaling(policy: ScalingPolicy, initial: int | None) -> ServeAutoscaling:
    return ServeAutoscaling(
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        initial_replicas=initial,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=f"{ReplicaPolicy.__module__}:{ReplicaPolicy.__name__}",
            policy_kwargs=asdict(policy),
        ),
    )
