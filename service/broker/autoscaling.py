"""How many replicas of a deployment are wanted. Pure.

`desired_replicas` turns the load that replicas report into a number. Two sliding windows keep it
steady, as in Kubernetes' horizontal autoscaler: replicas are added once the load has asked for them
during the whole upscale delay, and removed once it has done without them during the whole downscale
delay. So a peak within the downscale delay keeps its replicas.

The load of a replica has four parts:

- ongoing: requests that run or wait;
- offered: by expert, the share of an engine that its arriving requests keep busy (arrivals per
  second × seconds of service ÷ places of the engine; an offered load in erlangs by places). It does
  not depend on the number of replicas, so that it is right while replicas start;
- backlog: by expert, the seconds in which one engine would serve what waits;
- tokens: completion tokens per second.

An expert has at most one engine in a replica. A hot expert therefore needs as many replicas as it
needs engines, although the other engines of these replicas may idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# A replica is removed only if the load could grow by this factor before it came back.
_HYSTERESIS = 1.1
# A replica that is started for a backlog should have that much work of it, in s.
_LEAST_WORK_S = 15.0
# Sums of floats must not ask for one replica more.
_ROUNDING = 1e-6
# More replicas than there can be. Extreme targets and factors must not ask for infinitely many.
_MANY = 1e9


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """The bounds, targets and delays of one deployment.

    Attributes:
        min_replicas: Fewest replicas; 0 allows none.
        max_replicas: Most replicas.
        target_ongoing_requests: Running and waiting requests per replica; None: no signal.
        target_wait_s: Longest estimated wait in a queue, in s; None: no signal.
        target_tokens_per_s: Completion tokens per second and replica; None: no signal.
        target_utilization: Share of an engine that may be busy. Replicas are removed only if the
            others stay below it.
        add_for_utilization: Whether replicas are added for it even without `target_wait_s`.
        engines: Engines of a replica.
        upscale_delay_s: Time that a load must last before replicas are added, in s.
        downscale_delay_s: Time without the load before replicas are removed, in s.
        downscale_to_zero_delay_s: Time without any request before the last replica is removed.
        upscale_factor: At most this many times the replicas that serve are wanted at once, unless
            the offered load needs more.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None
    target_wait_s: float | None = None
    target_tokens_per_s: float | None = None
    target_utilization: float = 0.8
    add_for_utilization: bool = False
    engines: int = 1
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 0.0
    downscale_to_zero_delay_s: float = 0.0
    upscale_factor: float = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a deployment, summed over its replicas.

    Attributes:
        ongoing: Running and waiting requests.
        tokens_per_s: Completion tokens per second.
        offered: Engines that each expert's arriving requests keep busy.
        backlog_s: Seconds in which one engine would serve each expert's waiting requests.
        serving: Replicas with an engine that runs.
        start_s: Seconds until another replica serves.
        held: Whether requests wait outside the replicas because there are none.
    """

    ongoing: float = 0.0
    tokens_per_s: float = 0.0
    offered: Mapping[str, float] = field(default_factory=dict)
    backlog_s: Mapping[str, float] = field(default_factory=dict)
    serving: int = 0
    start_s: float = 0.0
    held: bool = False

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits anywhere."""
        return self.ongoing <= 0 and not self.held


Window = tuple[tuple[float, int], ...]
"""Wanted replicas by time, from old to new, without those that can't be the extreme any more."""


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What a decision needs to know of earlier ones. Times are in s of one clock.

    Attributes:
        fewest: Replicas that the load asked for, within the upscale delay; their minimum counts.
        most: Replicas that the load could use, within the downscale delay; their maximum counts.
        busy_at_s: When there was a request last.
    """

    fewest: Window = ()
    most: Window = ()
    busy_at_s: float | None = None


def required_replicas(load: Load, policy: ScalingPolicy) -> float:
    """Return how many replicas the load asks for by the largest of its signals. Not bounded."""
    wanted = [0.0]
    if policy.target_ongoing_requests is not None:
        wanted.append(load.ongoing / policy.target_ongoing_requests)
    if policy.target_tokens_per_s is not None:
        wanted.append(load.tokens_per_s / policy.target_tokens_per_s)
    offered = busy_replicas(load.offered, policy.engines)
    if adds_for_offered(policy):
        wanted.append(offered / policy.target_utilization)
    if policy.target_wait_s is not None and estimated_wait_s(load, policy) > policy.target_wait_s:
        # What waits is served beside what arrives. A replica is not worth starting for a backlog
        # that is gone before it serves, or soon afterwards.
        horizon_s = max(policy.target_wait_s, load.start_s, _LEAST_WORK_S)
        wanted.append(offered + busy_replicas(load.backlog_s, policy.engines) / horizon_s)
    return max(wanted)


def adds_for_offered(policy: ScalingPolicy) -> bool:
    """Return whether replicas are added for the offered load."""
    return policy.add_for_utilization or policy.target_wait_s is not None


def estimated_wait_s(load: Load, policy: ScalingPolicy) -> float:
    """Return the wait of a new request for the expert with the longest backlog, in s."""
    return busy_replicas(load.backlog_s, policy.engines) / max(1, load.serving)


def busy_replicas(by_expert: Mapping[str, float], engines: int) -> float:
    """Return the replicas that a load of engines fills, by expert.

    One expert uses one engine of a replica, and all of them together use all engines.
    """
    # `fsum` is exact, so that the order of the experts can't decide on a replica.
    return max(max(by_expert.values(), default=0.0), math.fsum(by_expert.values()) / engines)


def desired_replicas(
    load: Load, policy: ScalingPolicy, state: ScalingState, *, target: int, now_s: float
) -> tuple[int, ScalingState]:
    """Decide how many replicas there should be.

    Args:
        load: The load now.
        policy: The bounds, targets and delays.
        state: The state after the last decision; `ScalingState()` at first.
        target: Replicas that there should be according to the last decision.
        now_s: The current time in s.

    Returns:
        The number, within the policy's bounds, and the state for the next decision.
    """
    required = required_replicas(load, policy)
    fewest = _whole(required)
    busy = busy_replicas(load.offered, policy.engines) / policy.target_utilization
    most = max(fewest, _whole(required * _HYSTERESIS), _whole(busy))
    if not load.idle:
        fewest, most = max(1, fewest), max(1, most)
    busy_at_s = state.busy_at_s
    if busy_at_s is None or not load.idle:
        busy_at_s = now_s
    # At first the windows hold the present target, as if the load had always asked for it.
    before_fewest = state.fewest or ((now_s, target),)
    before_most = state.most or ((now_s, target),)
    state = ScalingState(
        fewest=_extended(before_fewest, now_s, fewest, policy.upscale_delay_s, -1),
        most=_extended(before_most, now_s, most, policy.downscale_delay_s, 1),
        busy_at_s=busy_at_s,
    )
    up, down = state.fewest[0][1], state.most[0][1]
    wanted = target
    if target == 0:
        wanted = 0 if load.idle else 1  # without delay, because a request waits already
    elif up > target:
        # The offered load is right while replicas start. A queue grows meanwhile, and asks for
        # too many.
        cap = _whole(load.serving * min(policy.upscale_factor, _MANY))
        wanted = max(target, min(up, max(cap, _whole(busy) if adds_for_offered(policy) else 0)))
    elif target == 1:
        is_due = now_s - busy_at_s >= policy.downscale_to_zero_delay_s
        wanted = 0 if load.idle and is_due else 1
    elif down < target:
        wanted = max(1, down)
    return max(policy.min_replicas, min(policy.max_replicas, wanted)), state


def _whole(replicas: float) -> int:
    return math.ceil(min(replicas, _MANY) - _ROUNDING)


def _extended(window: Window, now_s: float, value: int, span_s: float, sign: int) -> Window:
    """Add a value to a window, and drop what is too old or can't be the extreme any more.

    Args:
        window: The window before.
        now_s: The time of the value in s.
        value: The value.
        span_s: Length of the window in s.
        sign: 1 where the maximum counts, -1 where the minimum does. It stands first in the window.
    """
    kept: Iterable[tuple[float, int]] = (
        (at_s, old) for at_s, old in window if now_s - at_s < span_s and sign * old > sign * value
    )
    return (*kept, (now_s, value))
