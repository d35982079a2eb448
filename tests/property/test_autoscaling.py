"""Autoscaling: bounds, monotony, and steadiness on a constant load."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.autoscaling import (
    Load,
    ScalingPolicy,
    ScalingState,
    desired_replicas,
    required_replicas,
)
from service.pool.autoscaling_load import LoadMeter, SlotLoad, pool_load
from service.pool.request_queue import Backlog

positive = st.floats(0, 200, allow_nan=False)
by_expert = st.dictionaries(st.sampled_from("abc"), positive, max_size=3)
loads = st.builds(
    Load,
    ongoing=positive,
    tokens_per_s=positive,
    offered=by_expert,
    backlog_s=by_expert,
    serving=st.integers(0, 20),
    start_s=positive,
    held=st.booleans(),
)
delays = st.sampled_from([0.0, 1.0, 5.0, 30.0])
targets = st.none() | st.floats(0.5, 50)


@st.composite
def policies(draw: st.DrawFn) -> ScalingPolicy:
    """Any policy that the config allows."""
    low = draw(st.integers(0, 5))
    return ScalingPolicy(
        min_replicas=low,
        max_replicas=draw(st.integers(max(1, low), 12)),
        target_ongoing_requests=draw(targets),
        target_wait_s=draw(targets),
        target_tokens_per_s=draw(targets),
        target_utilization=draw(st.floats(0.1, 1)),
        add_for_utilization=draw(st.booleans()),
        engines=draw(st.integers(1, 4)),
        upscale_delay_s=draw(delays),
        downscale_delay_s=draw(delays),
        downscale_to_zero_delay_s=draw(delays),
        upscale_factor=draw(st.floats(1.01, 4)),
    )


def followed(
    policy: ScalingPolicy, seen: list[tuple[float, Load]], target: int
) -> list[tuple[float, int]]:
    """The targets over time."""
    state, now_s, found = ScalingState(), 0.0, []
    for step_s, load in seen:
        now_s += step_s
        target, state = desired_replicas(load, policy, state, target=target, now_s=now_s)
        found.append((now_s, target))
    return found


@given(policies(), st.lists(st.tuples(st.floats(0, 20), loads), max_size=20), st.integers(0, 12))
@settings(deadline=None)
def test_desired_replicas_never_leave_the_bounds(
    policy: ScalingPolicy, seen: list[tuple[float, Load]], target: int
) -> None:
    for _, wanted in followed(policy, seen, target):
        assert policy.min_replicas <= wanted <= policy.max_replicas


@given(policies(), loads, loads, st.integers(0, 12))
@settings(deadline=None)
def test_desired_replicas_rise_with_the_load(
    policy: ScalingPolicy, load: Load, more: Load, target: int
) -> None:
    names = {*load.offered, *more.offered, *load.backlog_s, *more.backlog_s}
    larger = replace(
        load,
        ongoing=load.ongoing + more.ongoing,
        tokens_per_s=load.tokens_per_s + more.tokens_per_s,
        offered={n: load.offered.get(n, 0) + more.offered.get(n, 0) for n in names},
        backlog_s={n: load.backlog_s.get(n, 0) + more.backlog_s.get(n, 0) for n in names},
        held=load.held or more.held,
    )
    assert required_replicas(larger, policy) >= required_replicas(load, policy)
    step_s = max(policy.upscale_delay_s, policy.downscale_delay_s) + 40
    for seen in (1, 2):
        (_, low), (_, high) = (
            followed(policy, [(step_s, one)] * seen, target)[-1] for one in (load, larger)
        )
        assert high >= low


@given(policies(), loads, st.integers(0, 12), st.lists(st.floats(0.05, 3), min_size=40))
@settings(deadline=None)
def test_desired_replicas_turn_never_on_a_constant_load(
    policy: ScalingPolicy, load: Load, target: int, steps: list[float]
) -> None:
    target = max(policy.min_replicas, min(policy.max_replicas, target))
    seen = [target, *(wanted for _, wanted in followed(policy, [(s, load) for s in steps], target))]
    turns = {(b > a) - (b < a) for a, b in itertools.pairwise(seen)} - {0}
    assert len(turns) <= 1


@dataclass
class Fleet:
    """Replicas with one engine each, on a virtual clock. Requests go to the shortest queue.

    A replica serves `start_s` seconds after it was asked for.
    """

    policy: ScalingPolicy
    service_s: float
    places: int
    start_s: float
    clock_s: float = 0.0
    target: int = 1
    replicas: list[tuple[float, LoadMeter, list[float], list[tuple[float, object]]]] = field(
        default_factory=list
    )
    state: ScalingState = field(default_factory=ScalingState)
    targets: list[int] = field(default_factory=list)

    def _now(self) -> float:
        return self.clock_s

    def run(self, arrivals_per_s: float, seconds: float, rng: random.Random | None) -> None:
        """Let requests arrive, evenly or at random times."""
        end_s, next_s, tick_s = self.clock_s + seconds, self.clock_s, self.clock_s
        while self.clock_s < end_s:
            while next_s <= self.clock_s:
                ready = [one for one in self.replicas if one[0] <= self.clock_s]
                if ready:
                    _, meter, waiting, _ = min(ready, key=lambda r: len(r[2]) + len(r[3]))
                    meter.record_arrival("e", 1)
                    waiting.append(self.clock_s)
                gap_s = 1 / arrivals_per_s
                next_s += gap_s if rng is None else rng.expovariate(arrivals_per_s)
            self._serve()
            if tick_s <= self.clock_s:
                self._decide()
                tick_s += 0.5
            self.clock_s += 0.02

    def _serve(self) -> None:
        for _, meter, waiting, running in self.replicas:
            for one in [one for one in running if one[0] <= self.clock_s]:
                running.remove(one)
                one[1].__exit__(None, None, None)  # type: ignore[attr-defined]
            while waiting and len(running) < self.places:
                waiting.pop(0)
                run = meter.run("e", 1)
                run.__enter__()
                running.append((self.clock_s + self.service_s, run))

    def _decide(self) -> None:
        parts = []
        for since_s, meter, waiting, running in self.replicas:
            queue = Backlog(
                len(running), len(waiting), len(waiting), waiting[0] if waiting else None
            )
            slot = SlotLoad(self.places, {"e": queue}, since_s <= self.clock_s, self.start_s)
            parts.append(pool_load([slot], meter, self.clock_s))
        load = Load(
            ongoing=sum(part.ongoing for part in parts),
            offered={"e": sum(part.offered.get("e", 0) for part in parts)},
            backlog_s={"e": sum(part.backlog_s.get("e", 0) for part in parts)},
            serving=sum(part.serving for part in parts),
            start_s=self.start_s,
        )
        self.target, self.state = desired_replicas(
            load, self.policy, self.state, target=self.target, now_s=self.clock_s
        )
        while len(self.replicas) < self.target:
            self.replicas.append((self.clock_s + self.start_s, LoadMeter(self._now), [], []))
        # The youngest leaves; it serves what it has, which is left out here.
        del self.replicas[self.target :]
        self.targets.append(self.target)

    def turns(self) -> int:
        """How often the number of replicas changed its direction."""
        steps = [b - a for a, b in itertools.pairwise(self.targets) if a != b]
        return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))


@given(
    engines=st.floats(0.3, 4.5),
    service_s=st.sampled_from([0.3, 1.0, 4.0]),
    start_s=st.sampled_from([0.0, 5.0, 20.0]),
    by_wait=st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_replicas_settle_where_the_arrivals_fit(
    engines: float, service_s: float, start_s: float, by_wait: bool
) -> None:
    places = 4
    policy = ScalingPolicy(
        max_replicas=8,
        target_ongoing_requests=None if by_wait else 2.5 * places,
        target_wait_s=1.0 if by_wait else None,
        upscale_delay_s=2,
        downscale_delay_s=40,
    )
    fleet = Fleet(policy, service_s, places, start_s)
    fleet.run(engines * places / service_s, 400, None)
    settled = fleet.targets[len(fleet.targets) * 3 // 4 :]
    # One may come for the queue that grew while others started, and go again.
    assert fleet.turns() <= 1
    assert len({*settled}) == 1
    assert settled[0] >= engines
    assert settled[0] <= engines / policy.target_utilization + 2


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=5)
def test_replicas_rarely_turn_on_random_arrivals_of_a_constant_rate(seed: int) -> None:
    policy = ScalingPolicy(
        max_replicas=8, target_wait_s=1.0, upscale_delay_s=2, downscale_delay_s=60
    )
    fleet = Fleet(policy, 1.0, 4, 5.0)
    fleet.run(9.0, 400, random.Random(seed))
    assert fleet.turns() <= 3
    settled = fleet.targets[len(fleet.targets) // 2 :]
    assert 3 <= sum(settled) / len(settled) <= 5  # 2.25 engines' work, at 80 %
