"""What Ray Serve does for a change of the pools, and what needs a restart of the service."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.config.pools import PoolConfig
from service.deployment.live_changes import (
    PoolChanges,
    check_fixed,
    check_resources,
    fixed_sections,
    pool_changes,
)
from service.deployment.serve_application import DeployedPool, application
from service.errors import ConfigError

BASE: dict[str, Any] = {
    "experts": {name: {"model": "m"} for name in "abc"},
    "pools": {
        "p": {"engine": "simulated", "experts": ["a", "b"], "slots": 2},
        "q": {"engine": "simulated", "experts": ["c"]},
    },
}


def config(**pools: Any) -> Config:
    """The base config with other pools; None leaves one out."""
    data = copy.deepcopy(BASE)
    for kind, changed in pools.items():
        if changed is None:
            del data["pools"][kind]
        else:
            given = data["pools"].setdefault(kind, {"engine": "simulated"})
            data["pools"][kind] = {**given, **changed}
    return Config.model_validate(data)


@pytest.mark.parametrize(
    ("pools", "changes"),
    [
        ({}, PoolChanges()),
        ({"q": {"experts": ["a", "c"]}}, PoolChanges()),
        ({"p": {"experts": ["a", "c"]}, "q": {"experts": ["b"]}}, PoolChanges()),
        ({"p": {"swap": {"min_stay_s": 9}}}, PoolChanges()),
        ({"r": {"experts": ["a"]}}, PoolChanges(added=("r",))),
        (
            {"q": None, "p": {"experts": ["a", "b", "c"], "slots": 3}},
            PoolChanges(removed=("q",), replaced={"p": ("slots",)}),
        ),
        ({"p": {"slots": 1}}, PoolChanges(replaced={"p": ("slots",)})),
        ({"p": {"slots": None}}, PoolChanges(replaced={"p": ("slots",)})),
        # Three experts no longer have an engine each, so that they take turns.
        ({"p": {"experts": ["a", "b", "c"]}}, PoolChanges(replaced={"p": ("experts",)})),
        (
            {"p": {"max_queued_requests": 1, "cpus": 2}},
            PoolChanges(replaced={"p": ("cpus", "max_queued_requests")}),
        ),
        ({"q": {"min_replicas": 3}}, PoolChanges(scaled=("q",))),
        ({"q": {"max_replicas": 3}}, PoolChanges(scaled=("q",))),
        (
            {"q": {"min_replicas": 2, "cpus": 1}, "p": None, "r": {}},
            PoolChanges(("r",), ("p",), {"q": ("cpus",)}),
        ),
    ],
)
def test_pool_changes_say_what_becomes_of_each_kind(
    pools: dict[str, Any], changes: PoolChanges
) -> None:
    found = pool_changes(config(), config(**pools))
    assert found == changes
    told = " ".join(found.sentences())
    for kind in {*changes.added, *changes.removed, *changes.replaced, *changes.scaled}:
        assert kind in told
    assert bool(found) == bool(found.sentences())


@pytest.mark.parametrize("key", [k for k in PoolConfig.model_fields if k != "engine"])
def test_pool_changes_know_what_each_key_of_a_pool_needs(key: str) -> None:
    """No key is forgotten: it is live, Serve's, or replaces the replicas."""
    values: dict[str, Any] = {
        "experts": ["c", "a"],
        "slots": 1,
        "min_replicas": 2,
        "max_replicas": 2,
        "autoscaling": {"target_wait_s": 1},
        "gpus": 1,
        "cpus": 0.25,
        "memory_bytes": "1GiB",
        "max_queued_requests": 1,
        "vllm": {"max_num_seqs": 3},
        "swap": {"min_stay_s": 9},
        "simulated": {"tokens": 3},
    }
    before = config(q={"max_replicas": 4}) if key == "autoscaling" else config()
    after = {"max_replicas": 4, key: values[key]} if key == "autoscaling" else {key: values[key]}
    found = pool_changes(before, config(q=after))
    if key in ("experts", "swap"):
        assert not found
    elif key in ("min_replicas", "max_replicas", "autoscaling"):
        assert found == PoolChanges(scaled=("q",))
    else:
        assert found == PoolChanges(replaced={"q": (key,)})


@pytest.mark.parametrize("section", ["server", "store", "prices", "feedback"])
def test_fixed_sections_are_refused_by_name(section: str) -> None:
    new = config().model_copy(update={section: object()})
    assert fixed_sections(config(), new) == (section,)
    with pytest.raises(ConfigError, match=f"{section}: can't be changed"):
        check_fixed(config(), new)


@pytest.mark.parametrize(
    ("pools", "have", "why"),
    [
        ({"q": {"cpus": 8}}, {"CPU": 4}, "cpus add up to 8.5, and Ray was started with 4"),
        ({"q": {"cpus": 1, "max_replicas": 4}}, {"CPU": 4}, "cpus add up to 4.5"),
        ({"q": {"gpus": 1}}, {"CPU": 4}, "Ray finds none"),
        ({"q": {"gpus": 1, "min_replicas": 3}}, {"CPU": 4, "GPU": 2}, "need 3 GPUs"),
        ({}, {"CPU": 4}, None),
        ({"q": {"gpus": 1}}, {"CPU": 4, "GPU": 1}, None),
    ],
)
def test_check_resources_refuses_pools_that_would_never_start(
    pools: dict[str, Any], have: dict[str, float], why: str | None
) -> None:
    if why is None:
        check_resources(config(**pools), have)
        return
    with pytest.raises(ConfigError, match=why):
        check_resources(config(**pools), have)


def test_application_keeps_the_versions_of_what_does_not_change(tmp_path: Path) -> None:
    """Serve replaces replicas where the version or the actor's options differ."""
    far = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "KEY_OF_FAR"}
    data = copy.deepcopy(BASE)
    data["experts"]["far"] = {"remote": far}
    data["pools"]["q"]["min_replicas"] = 2
    old, new = config(), Config.model_validate(data)
    deployed = {"p": DeployedPool("1", old), "q": DeployedPool("2", new)}
    made = []
    for one in (old, new):
        app = application(
            one, tmp_path / "secret", tmp_path / "key", host="127.0.0.1", deployed=deployed
        )
        (gateway,) = [app._bound_deployment]
        pools = gateway.init_args[3]
        made.append({"gateway": gateway, **{k: a._bound_deployment for k, a in pools.items()}})
    before, after = made
    assert [after[name].version for name in ("gateway", "p", "q")] == ["1", "1", "2"]
    for name in ("gateway", "p"):
        assert before[name].ray_actor_options == after[name].ray_actor_options
    assert "KEY_OF_FAR" not in after["p"].ray_actor_options["runtime_env"]["env_vars"]
    assert "KEY_OF_FAR" in after["q"].ray_actor_options["runtime_env"]["env_vars"]
    assert (before["q"].num_replicas, after["q"].num_replicas) == (1, 2)
    # A pool that goes may finish its requests for as long as one that autoscaling removes.
    assert after["p"]._deployment_config.graceful_shutdown_timeout_s > 900
