"""Autoscaling in the config: what is read, and what is refused with one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from service.config import Config, parse_config
from service.errors import ConfigError

POOL = {"engine": "simulated", "min_replicas": 0, "max_replicas": 4}


def config(pool: dict[str, Any] | None = None, gateways: Any = 1) -> Config:
    """A config with this pool and these gateways."""
    data = {
        "server": {"gateways": gateways},
        "store": {"kind": "redis", "url": "redis://localhost"},
        "experts": {"one": {"model": "m"}},
        "pools": {"main": {**POOL, **(pool or {})}},
    }
    return parse_config(yaml.safe_dump(data), "coe.yaml")


@pytest.mark.parametrize(
    ("gateways", "least", "most"),
    [
        (3, 3, 3),
        ({"min_replicas": 2}, 2, 2),
        ({"max_replicas": 4}, 1, 4),
        ({"min_replicas": 2, "max_replicas": 5, "target_utilization": 0.5}, 2, 5),
    ],
)
def test_gateways_are_a_number_or_a_range(gateways: Any, least: int, most: int) -> None:
    read = config(gateways=gateways)
    found = read.server.gateways
    assert (found.min_replicas, found.most_replicas, found.scales) == (least, most, least < most)
    # Replicas read what the supervisor has written.
    assert Config.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize(
    "autoscaling",
    [
        {},
        {"target_wait_s": 2, "target_ongoing_requests": None},
        {"target_tokens_per_s": 900, "initial_replicas": 4, "downscale_to_zero_delay_s": 600},
    ],
)
def test_pool_autoscaling_is_read_and_written(autoscaling: dict[str, Any]) -> None:
    read = config({"autoscaling": autoscaling})
    assert read.pools["main"].scaling.model_dump(include={*autoscaling}) == autoscaling
    assert Config.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"gateways": 0},
            "server.gateways: input should be from 1 to 64, not 0",
        ),
        (
            {"gateways": "many"},
            "server.gateways: input should be a number of gateways, or a mapping with "
            "min_replicas and max_replicas, not 'many'",
        ),
        (
            {"gateways": {"min_replicas": 3, "max_replicas": 2}},
            "server.gateways: max_replicas must be at least min_replicas",
        ),
        (
            {"gateways": {"min_replicas": 2, "target_utilization": 0.5}},
            "server.gateways: target_utilization: without effect, because max_replicas is not "
            "above min_replicas",
        ),
        (
            {"gateways": {"max": 3}},
            "server.gateways.max: unknown key; allowed: "
            "downscale_delay_s, downscale_drain_s, max_replicas, min_replicas, "
            "target_in_flight_requests, target_utilization, upscale_delay_s, upscale_factor",
        ),
        (
            {"pool": {"max_replicas": 1, "min_replicas": 1, "autoscaling": {"target_wait_s": 1}}},
            "pools.main: autoscaling: target_wait_s: without effect, because max_replicas is not "
            "above min_replicas",
        ),
        (
            {"pool": {"autoscaling": {"initial_replicas": 5}}},
            "pools.main: autoscaling.initial_replicas: input should be from 0 (min_replicas) to 4 "
            "(max_replicas), not 5",
        ),
        (
            {"pool": {"min_replicas": 1, "autoscaling": {"downscale_to_zero_delay_s": 9}}},
            "pools.main: autoscaling.downscale_to_zero_delay_s: without effect, because "
            "min_replicas is 1 and not 0",
        ),
        (
            {"pool": {"autoscaling": {"target_ongoing_requests": None}}},
            "pools.main.autoscaling: needs at least one of target_ongoing_requests, "
            "target_wait_s, target_tokens_per_s",
        ),
        (
            {"pool": {"autoscaling": {"upscale_factor": 1}}},
            "pools.main.autoscaling.upscale_factor: input should be greater than 1, not 1",
        ),
        (
            {"pool": {"autoscaling": {"target_wait": 1}}},
            "pools.main.autoscaling.target_wait: unknown key; did you mean 'target_wait_s'? "
            "allowed: downscale_delay_s, downscale_drain_s, downscale_to_zero_delay_s, "
            "initial_replicas, target_ongoing_requests, target_tokens_per_s, target_utilization, "
            "target_wait_s, upscale_delay_s, upscale_factor",
        ),
    ],
)
def test_autoscaling_error_message_is_exact(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert caught.value.message == f"coe.yaml: {expected}"
