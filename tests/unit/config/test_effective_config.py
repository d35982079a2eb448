"""The config with added experts: what it adds, what it leaves out, and what it never changes."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config
from service.config.effective_config import (
    AddedExperts,
    parse_added_expert,
    with_added,
)
from service.config.loader import validated_config
from service.errors import ConfigError

EXAMPLES = ["Can I sue?", "Is it legal?", "Who pays the court?"]


def config(**more: Any) -> Config:
    data = {
        "experts": {"general": {"model": "m", "categories": ["chat"]}, "other": {"model": "n"}},
        "pools": {"p": {"engine": "simulated", "vllm": {"spare_adapters": 2}}},
    }
    return Config.model_validate({**data, **more})


def added(*bodies: dict[str, Any], served: bool = True) -> AddedExperts:
    found = AddedExperts()
    for body in bodies:
        name, one = parse_added_expert({"base": "general", "adapter": "/a/x", **body}, 1.0)
        found = found.including(name, one.model_copy(update={"served": served}), 1.0)
    return found


def test_config_without_added_experts_is_itself() -> None:
    given = config()
    assert with_added(given, AddedExperts()).config is given
    assert with_added(given, added({"name": "x"}, served=False)).config is given


@pytest.mark.parametrize("pools", [None, ["general", "other"], ["general"]])
def test_added_expert_is_in_the_pools_of_its_base(pools: list[str] | None) -> None:
    kinds: dict[str, Any] = {"p": {"engine": "simulated", "vllm": {"spare_adapters": 2}}}
    kinds["q"] = {"engine": "simulated", "experts": ["other"]}
    if pools is not None:
        kinds["p"]["experts"] = pools
    found = with_added(config(pools=kinds), added({"name": "x"}))
    assert not found.left_out
    assert "x" in found.config.local_experts("p")
    assert "x" not in found.config.local_experts("q")


def test_nothing_of_the_config_changes() -> None:
    given = config()
    more = {"name": "x", "price": {"prompt": 3}, "examples": {"law": EXAMPLES}, "pinned": True}
    found = with_added(given, added(more, {"name": "y"}), built_in_artifact="/built-in")
    assert not found.left_out
    for name, expert in given.experts.items():
        assert found.config.experts[name] is expert
    assert found.config.fallback == given.fallback
    assert found.config.computation_rate == given.computation_rate
    assert found.config.category_map() == {**given.category_map(), "law": "x"}
    # The built-in artifact would go where categories with examples come.
    assert (given.router.artifact, found.config.router.artifact) == (None, "/built-in")
    for name in Config.model_fields.keys() - {"experts", "categories", "router", "prices", "pools"}:
        assert getattr(found.config, name) == getattr(given, name)


def test_quality_is_that_of_the_base_unless_it_is_given() -> None:
    found = with_added(
        config(),
        added(
            {"name": "x"},
            {"name": "v", "base": "x", "adapter": None, "defaults": {"seed": 1}},
            {"name": "y", "quality_from": "other"},
        ),
    )
    assert not found.left_out
    froms = {name: one.quality_from for name, one in found.config.experts.items()}
    assert froms == {"general": None, "other": None, "x": "general", "v": "general", "y": "other"}


def test_experts_that_clash_are_left_out_and_no_others() -> None:
    variant = {"name": "v", "base": "x", "adapter": None, "defaults": {"seed": 1}}
    wanted = added({"name": "x"}, variant, {"name": "y"})
    own = {"general": {"model": "m"}, "x": {"base": "general", "defaults": {"seed": 2}}}
    found = with_added(config(experts=own), wanted)
    assert found.left_out.keys() == {"x", "v"}
    assert "the config has an expert of this name" in found.left_out["x"]
    # The config's `x` is a way of asking itself.
    assert "is a variant itself" in found.left_out["v"]
    assert found.config.experts["y"].base == "general"


def test_expert_whose_folder_is_not_allowed_any_more_is_left_out() -> None:
    def folder_of(adapter: str) -> str:
        if adapter == "/secret":
            raise ConfigError("the folder lies below none of /srv")
        return adapter

    wanted = added({"name": "x", "adapter": "/secret"}, {"name": "y"})
    found = with_added(config(), wanted, folder_of=folder_of)
    assert found.left_out == {"x": "expert 'x': adapter: the folder lies below none of /srv"}
    assert "y" in found.config.experts


@pytest.mark.parametrize("bad", [{3}, {0}, {31}, {1, 2, 30}, set(range(32)), set(range(16, 32))])
def test_each_expert_that_does_not_fit_is_left_out_at_little_cost(
    bad: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = []

    def count(*args: Any) -> Config:
        merges.append(1)
        return validated_config(*args)

    monkeypatch.setattr("service.config.effective_config.validated_config", count)
    bodies = [
        {
            "name": f"v{i}",
            "adapter": None,
            "defaults": {"seed": i},
            "base": "gone" if i in bad else "general",
        }
        for i in range(32)
    ]
    found = with_added(config(), added(*bodies))
    assert found.left_out.keys() == {f"v{i}" for i in bad}
    assert set(found.config.experts) == {
        "general",
        "other",
        *(f"v{i}" for i in range(32) if i not in bad),
    }
    # At most two a level of the halving for each that is left out.
    assert len(merges) <= 1 + 2 * 5 * len(bad)


def test_room_counts_adapters_and_not_ways_of_asking() -> None:
    three = [{"name": name} for name in "xyz"]
    variants = [{"name": f"v{i}", "adapter": None, "defaults": {"seed": i}} for i in range(5)]
    found = with_added(config(), added(*variants, *three))
    assert set(found.left_out) == {"z"}
    assert "spare_adapters is 2" in found.left_out["z"]


def test_merged_adapter_needs_a_slot_where_every_expert_has_its_own() -> None:
    def left_out(slots: int | None) -> str:
        pool = {"engine": "simulated", **({"slots": slots} if slots else {})}
        merged = added({"name": "x", "form": "merged"})
        return with_added(config(pools={"p": pool}), merged).left_out.get("x", "")

    # Two experts: they take turns in one slot, and have their own in two.
    assert [left_out(slots) for slots in (None, 1, 3)] == ["", "", ""]
    assert "pools.p.slots is 2" in left_out(2)


@pytest.mark.parametrize("name", ["a/../b", "a/./b", "a/..", "a//b", "a/"])
def test_name_that_paths_lose_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no part between its slashes"):
        added({"name": name})


@pytest.mark.parametrize("name", ["a/b", "law:latest", "a..b", "org/x.y-2", "AUTO"])
def test_name_that_paths_keep_is_taken(name: str) -> None:
    assert name in added({"name": name}).experts


def test_json_keeps_everything() -> None:
    one = added({"name": "x", "examples": {"law": EXAMPLES}, "defaults": {"system": "s"}})
    assert AddedExperts.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"revision": 1},
        {"revision": "x", "experts": {}},
        {"revision": 1, "experts": 3},
        {"revision": 1, "experts": {"x": {"expert": {"model": "secret words"}}}},
    ],
)
def test_damaged_json_is_refused_without_its_text(data: Any) -> None:
    with pytest.raises(ConfigError, match="damaged") as error:
        AddedExperts.from_json(data)
    assert "secret" not in str(error.value)


def test_revision_grows_with_every_change() -> None:
    empty = AddedExperts()
    _, one = parse_added_expert({"name": "x", "base": "general", "adapter": "/a"}, 0.0)
    first = empty.including("x", one, 5.0)
    assert first.revision == 5000
    # A clock that stands, or goes back, changes nothing of that.
    assert first.without("x", 0.0).revision == 5001
