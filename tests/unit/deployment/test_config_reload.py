"""A config exchanged while it is in force: what may change, and how it is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import Config, load_config
from service.deployment import config_reload
from service.deployment.config_reload import (
    RunningConfig,
    config_file,
    current_config,
    follow,
    reload,
    version,
)
from service.errors import ArtifactError, ConfigError
from tests.support.polling import until

CONFIG: dict[str, Any] = {
    "experts": {"a": {"model": "m"}, "b": {"model": "m"}, "c": {"model": "m"}},
    "pools": {"p": {"engine": "simulated", "slots": 2}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a running service, whose port the command line has set."""
    source = tmp_path / "coe.yaml"
    source.write_text(yaml.safe_dump(CONFIG))
    read = load_config(source)
    server = read.server.model_copy(update={"port": 9999})
    file = config_file(tmp_path / "secret")
    RunningConfig(str(source), read, read.model_copy(update={"server": server})).save(file)
    return file


def write(file: Path, **changed: Any) -> None:
    """The user's config with other sections."""
    (file.parent / "coe.yaml").write_text(yaml.safe_dump({**CONFIG, **changed}))


def test_config_in_force_knows_which_keys_were_set(file: Path) -> None:
    experts = {
        "a": {"model": "m", "capabilities": ["chat"], "media": {"image_tokens": 9}},
        "b": {"model": "m"},
        "v": {"base": "a", "defaults": {"stop": "END", "temperature": 0}},
        "far": {"remote": {"url": "https://far/v1", "model": "x"}},
        "w": {"base": "far", "defaults": {}},
    }
    write(file, experts=experts)
    reload(file)
    read = load_config(file.parent / "coe.yaml")
    config = current_config(file, "")
    assert config.experts == read.experts
    for name, expert in read.experts.items():
        assert config.experts[name].model_fields_set == expert.model_fields_set
        assert config.experts[name].media.model_fields_set == expert.media.model_fields_set
    # Where the config says nothing of capabilities, the model's folder does.
    assert "capabilities" in config.experts["v"].model_fields_set
    assert "capabilities" not in config.experts["b"].model_fields_set


def test_reload_reports_added_removed_and_changed_experts(file: Path) -> None:
    write(file, experts={"a": {"model": "other"}, "b": {"model": "m"}, "d": {"model": "m"}})
    assert reload(file) == {"added": ["d"], "removed": ["c"], "changed": ["a"]}
    config = current_config(file, "")
    assert list(config.experts) == ["a", "b", "d"]
    assert config.server.port == 9999
    assert not file.stat().st_mode & 0o077


def test_reload_steering_profile_with_new_content_is_a_change(file: Path) -> None:
    experts = {**CONFIG["experts"], "v": {"base": "a", "profile": "./v.safetensors"}}
    (file.parent / "v.safetensors").write_text("one")
    write(file, experts=experts)
    assert reload(file)["added"] == ["v"]
    assert reload(file)["changed"] == []
    (file.parent / "v.safetensors").write_text("another")
    assert reload(file) == {"added": [], "removed": [], "changed": ["v"]}
    assert reload(file)["changed"] == []


def test_reload_changed_limits_and_budgets_are_applied(file: Path) -> None:
    budgets = {"all": {"amount": 5, "period": "day"}}
    write(file, tenants={"a": {"requests_per_min": 7}}, budgets=budgets)
    reload(file)
    config = current_config(file, "")
    assert config.tenants["a"].requests_per_min == 7
    assert config.budgets["all"].amount == 5


def test_reload_changed_shadow_and_savings_are_applied(file: Path) -> None:
    shadow = {"share": 0.5, "budget": {"amount": 5}}
    write(file, shadow=shadow, savings={"against": ["a"]}, tenants={"t": {"shadow": True}})
    reload(file)
    config = current_config(file, "")
    assert config.shadow.share == 0.5
    assert config.savings.against == ("a",)
    assert config.tenants["t"].shadow


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"keys": {"a": {"key_env": "NOT_SET_ANYWHERE"}}}, "keys.a: the environment variable"),
        ({"store": {"lease_s": 5}}, "store: can't be changed"),
        ({"server": {"drain_s": 1}}, "server: can't be changed"),
        ({"experts": {"a": {"base": "nobody", "adapter": "x"}}}, "nobody"),
        ({"experts": {}}, "experts"),
    ],
)
def test_reload_of_an_unchangeable_key_raises_and_keeps_the_config(
    file: Path, changed: dict[str, Any], why: str
) -> None:
    before = file.read_bytes()
    write(file, **changed)
    with pytest.raises(ConfigError, match=why):
        reload(file)
    assert file.read_bytes() == before


def test_reload_missing_router_artifact_raises(file: Path) -> None:
    """Else pools would go on by the new config, and gateways by the old one."""
    before = file.read_bytes()
    write(file, router={"artifact": "./nowhere"})
    with pytest.raises(ArtifactError, match="nowhere"):
        reload(file)
    assert file.read_bytes() == before


def test_reload_config_that_can_not_be_saved_raises_and_keeps_serving(file: Path) -> None:
    running = RunningConfig.load(file)
    nowhere = file.parent / "gone" / "config.json"
    with pytest.raises(ConfigError, match="cannot write the config in force: No such file"):
        running.save(nowhere)
    assert [path.name for path in file.parent.iterdir() if "config.json" in path.name] == [
        "config.json"
    ]


def test_reload_that_was_overtaken_puts_no_older_config_in_force(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = dict(CONFIG["experts"])
    write(file, experts={**experts, "old": {"model": "m"}})
    faster: list[dict[str, list[str]]] = []

    def slow(config: Config) -> None:
        # While the first one fetches models, the user changes the file, and reloads again.
        if "old" in config.experts:
            write(file, experts={**experts, "new": {"model": "m"}})
            faster.append(reload(file))

    monkeypatch.setattr(config_reload, "configured", slow)
    told = reload(file)
    assert [one["added"] for one in faster] == [["new"]]
    assert told == {"added": [], "removed": [], "changed": []}
    assert set(current_config(file, "").experts) == {*experts, "new"}


def test_reload_gives_up_where_others_always_are_faster(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = RunningConfig.load(file)
    monkeypatch.setattr(config_reload, "configured", lambda _: running.save(file))
    with pytest.raises(ConfigError, match="by others at the same time"):
        reload(file)


def test_reload_tells_what_becomes_of_pools_and_refuses_what_ray_has_not(tmp_path: Path) -> None:
    pools: dict[str, Any] = {"p": {"engine": "simulated", "slots": 3}}
    source = tmp_path / "coe.yaml"
    source.write_text(yaml.safe_dump({**CONFIG, "pools": pools}))
    file = config_file(tmp_path / "secret")
    RunningConfig(str(source), load_config(source), load_config(source)).save(file)
    experts = {**CONFIG["experts"], "d": {"model": "m"}}
    write(file, experts=experts, pools=pools)
    told = ["replicas of p drain and are replaced: experts changed"]
    assert reload(file, {"CPU": 1})["pools"] == told
    pools["p"] |= {"min_replicas": 9}
    write(file, experts=experts, pools=pools)
    with pytest.raises(ConfigError, match="Ray was started with 1"):
        reload(file, {"CPU": 1})
    assert reload(file, {"CPU": 5})["pools"] == ["other numbers of replicas: p"]


@pytest.mark.parametrize("fault", [ConfigError("it can't be put in force"), KeyError("a")])
async def test_follow_reports_each_config_and_survives_an_invalid_one(
    file: Path, fault: Exception
) -> None:
    heard: list[list[str]] = []

    async def apply(config: Config) -> None:
        heard.append(list(config.experts))
        if len(heard) == 1:
            raise fault

    # What is in force was read at some time before: nothing that came since is missed.
    task = asyncio.create_task(follow(file, version(file), apply))
    write(file, experts={"a": {"model": "m"}, "b": {"model": "m"}, "d": {"model": "m"}})
    await asyncio.to_thread(reload, file)
    await until(lambda: len(heard) == 1, "the first")
    write(file)
    await asyncio.to_thread(reload, file)
    await until(lambda: len(heard) == 2, "the second")
    task.cancel()
    assert heard == [["a", "b", "d"], ["a", "b", "c"]]


@pytest.mark.parametrize("failures", [1, 3])
async def test_follow_failed_config_is_retried_until_it_is_applied(
    file: Path, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.deployment.config_reload._POLL_S", 0.01)
    monkeypatch.setattr("service.deployment.config_reload._FIRST_RETRY_S", 0.02)
    tried: list[list[str]] = []

    async def apply(config: Config) -> None:
        tried.append(list(config.experts))
        if len(tried) <= failures:
            raise OSError("the store is away for a moment")

    task = asyncio.create_task(follow(file, version(file), apply))
    write(file, experts={"a": {"model": "m"}, "d": {"model": "m"}})
    await asyncio.to_thread(reload, file)
    await until(lambda: len(tried) == failures + 1, "it is in force")
    await asyncio.sleep(0.3)
    task.cancel()
    assert tried == [["a", "d"]] * (failures + 1), "and is not applied once more"


async def test_follow_newer_config_replaces_one_that_failed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.deployment.config_reload._POLL_S", 0.01)
    monkeypatch.setattr("service.deployment.config_reload._FIRST_RETRY_S", 0.3)
    tried: list[list[str]] = []

    async def apply(config: Config) -> None:
        tried.append(list(config.experts))
        if "d" in config.experts:
            raise OSError("this one never works")

    task = asyncio.create_task(follow(file, version(file), apply))
    write(file, experts={"a": {"model": "m"}, "d": {"model": "m"}})
    await asyncio.to_thread(reload, file)
    await until(lambda: len(tried) == 1, "the first was tried")
    write(file, experts={"a": {"model": "m"}, "e": {"model": "m"}})
    await asyncio.to_thread(reload, file)
    await until(lambda: ["a", "e"] in tried, "the second is in force")
    await asyncio.sleep(0.5)
    task.cancel()
    assert tried[-1] == ["a", "e"]
    assert tried.count(["a", "e"]) == 1


def test_running_config_without_a_file_is_the_given_one(tmp_path: Path) -> None:
    given = Config.model_validate(CONFIG)
    assert current_config(tmp_path / "none", given.model_dump_json()) == given
