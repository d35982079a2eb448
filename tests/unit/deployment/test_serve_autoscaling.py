"""What replicas report to Ray Serve, and what Serve's policy makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingPolicy

from service.broker.autoscaling import Load
from service.config import Config
from service.deployment.serve_autoscaling import (
    ReplicaPolicy,
    gateway_scaling,
    gateway_stats,
    pool_scaling,
    pool_stats,
    total_load,
)
from service.pool.autoscaling_load import PoolLoad

CONFIG: dict[str, Any] = {
    "server": {"gateways": {"max_replicas": 4, "target_in_flight_requests": 50}},
    "store": {"kind": "redis", "url": "redis://localhost"},
    "experts": {"a": {"model": "m"}, "b": {"model": "n"}},
    "pools": {
        "main": {
            "engine": "simulated",
            "min_replicas": 0,
            "max_replicas": 3,
            "autoscaling": {"initial_replicas": 1, "downscale_delay_s": 20},
        }
    },
}


def reported(*replicas: tuple[float, dict[str, float]]) -> dict[str, dict[Any, Any]]:
    """Reports as Serve keeps them, each with the time of its last value."""
    series: dict[str, dict[Any, Any]] = {}
    for i, (at_s, stats) in enumerate(replicas):
        for name, value in stats.items():
            points = [TimeStampedValue(at_s - 1, 77.0), TimeStampedValue(at_s, value)]
            series.setdefault(name, {})[f"replica-{i}"] = points
    return series


def test_total_load_adds_up_what_replicas_reported_last() -> None:
    left = PoolLoad(3, 10.0, {"a": 0.5}, {"a": 2.0}, serving=True, start_s=4)
    right = PoolLoad(1, 5.0, {"a": 0.25, "b": 1.0}, {}, serving=False, start_s=9)
    found = reported((100, pool_stats(left)), (103, pool_stats(right, 2.5)))
    # `b` had a backlog before, and was not reported any more.
    found["backlog_s:b"] = {"replica-1": [TimeStampedValue(101, 30.0)]}
    found["running_requests"] = {"replica-1": []}
    assert total_load(found, held=True) == Load(
        ongoing=4,
        tokens_per_s=15,
        offered={"a": 0.75, "b": 1.0},
        backlog_s={"a": 2.0, "b": 0},
        serving=1,
        start_s=11.5,
        held=True,
    )
    assert total_load({}, held=False) == Load()


def test_total_load_of_gateways() -> None:
    found = reported((1, gateway_stats(30, 0.5)), (1, gateway_stats(9, 0.25)))
    assert total_load(found, held=False) == Load(ongoing=39, offered={"loop": 0.75}, serving=2)


def test_policy_survives_the_way_to_serve_s_controller() -> None:
    config = Config.model_validate(CONFIG)
    scaling = pool_scaling(config, "main")
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)
    given = scaling.policy
    sent = AutoscalingPolicy.from_serialized_policy_def(
        given.model_dump(), given.get_serialized_policy_def() or b""
    )
    policy = sent.get_policy()(**sent.policy_kwargs)
    state: dict[str, Any] = {}
    wanted = []
    for now_s in range(4):
        context = SimpleNamespace(
            total_num_requests=0,
            raw_metrics=reported((now_s, pool_stats(PoolLoad(ongoing=40, serving=True)))),
            policy_state=cloudpickle.loads(cloudpickle.dumps(state)),
            target_num_replicas=1,
            current_time=float(now_s),
        )
        replicas, state = policy(context)
        wanted.append(replicas)
    assert wanted == [1, 1, 2, 2]  # after upscale_delay_s, and twice as many at once


def test_policy_starts_a_pool_for_a_request_that_a_gateway_holds() -> None:
    policy = ReplicaPolicy(
        **pool_scaling(Config.model_validate(CONFIG), "main").policy.policy_kwargs
    )
    context: Any = SimpleNamespace(
        total_num_requests=1, raw_metrics=None, policy_state={}, target_num_replicas=0,
        current_time=5.0,
    )  # fmt: skip
    assert policy(context)[0] == 1


def test_gateways_are_added_for_processor_time() -> None:
    config = Config.model_validate(CONFIG)
    kwargs = {**gateway_scaling(config.server.gateways).policy.policy_kwargs, "upscale_delay_s": 0}
    for stats, replicas in [((10, 0.9), 2), ((90, 0.2), 2), ((10, 0.2), 1)]:
        context: Any = SimpleNamespace(
            total_num_requests=3,
            raw_metrics=reported((1, gateway_stats(*stats))),
            policy_state={},
            target_num_replicas=1,
            current_time=1.0,
        )
        assert ReplicaPolicy(**kwargs)(context)[0] == replicas


@pytest.mark.parametrize(("slots", "engines"), [(None, 2), (1, 1)])
def test_policy_knows_the_engines_of_a_replica(slots: int | None, engines: int) -> None:
    pool = {**CONFIG["pools"]["main"], "slots": slots}
    config = Config.model_validate({**CONFIG, "pools": {"main": pool}})
    assert pool_scaling(config, "main").policy.policy_kwargs["engines"] == engines
