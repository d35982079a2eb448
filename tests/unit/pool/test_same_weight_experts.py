"""Which experts of a pool have the same weights, and under which names they are held."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import Config
from service.pool.same_weight_experts import WeightSharing, share_weights

GPU = {"gpus": 1}


def config(experts: Mapping[str, Any], **pool: Any) -> Config:
    return Config.model_validate({"experts": experts, "pools": {"p": GPU | pool}})


def folder(config: Config, expert: str) -> str | None:
    """Return a folder that two names of a model have in common, such as m and m@1."""
    return str(config.experts[expert].model).partition("@")[0]


def shared(experts: Mapping[str, Any], before: Config | None = None) -> WeightSharing:
    return share_weights(config(experts), "p", before, folder)


BASES: dict[str, Any] = {"a": {"model": "m"}, "b": {"model": "m@1"}, "c": {"model": "n"}}
LORA = {"base": "a", "adapter": "/x"}
MERGED = LORA | {"form": "merged"}
STEERED = {"base": "a", "profile": "/p"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"model": "m"}, {"model": "m"}, True),
        ({"model": "m"}, {"model": "m@1", "price": {"prompt": 3}, "description": "d"}, True),
        ({"model": "m"}, {"model": "m", "pinned": True, "categories": ["law"]}, True),
        ({"model": "m"}, {"model": "n"}, False),
        ({"model": "m"}, {"model": "m", "vllm": {"moe_backend": "triton"}}, False),
        ({"model": "m"}, {"model": "m", "capabilities": ["embeddings"]}, False),
        ({"model": "m"}, {"base": "a", "defaults": {}}, True),
        (LORA, LORA, True),
        (LORA, LORA | {"base": "b"}, True),
        (LORA, LORA | {"adapter": "/y/../x"}, True),
        (LORA, LORA | {"base": "c"}, False),
        (LORA, LORA | {"adapter": "/y"}, False),
        (LORA, MERGED, False),
        (LORA, {"base": "one", "defaults": {"temperature": 0}}, True),
        (MERGED, MERGED | {"base": "b"}, True),
        (MERGED, MERGED | {"strength": 0.5}, False),
        (STEERED, STEERED | {"base": "b"}, True),
        (STEERED, STEERED | {"profile": "/q"}, False),
        (STEERED, {"base": "a", "defaults": {}}, False),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_share_weights_same_origin_holds_them_once(
    first: dict[str, Any], second: dict[str, Any], same: bool, turned: bool
) -> None:
    pair = {"one": first, "two": second}
    found = shared({**dict(reversed(pair.items())), **BASES} if turned else {**BASES, **pair})
    held = found.held
    assert (held["one"] == held["two"]) is same
    assert held["a"] == held["b"] != held["c"]
    # Each held name is one expert of the pool's config, on a base that is held as well.
    assert set(held.values()) == set(found.config.experts)
    assert set(found.config.local_experts("p")) == set(found.config.experts)
    for expert in found.config.experts.values():
        assert expert.base is None or expert.base in found.config.experts
    # Whoever has no weights of its own is told with the one that has them.
    assert ("two" in found.shared or "one" in found.shared) or not same
    for name, other in found.shared.items():
        assert held[name] == held[other]
        assert other not in found.shared


def test_share_weights_pins_what_any_of_them_pins_and_keeps_remote_experts() -> None:
    far = {"remote": {"url": "https://a/v1", "model": "x"}}
    found = shared({"a": {"model": "m"}, "far": far, "b": {"model": "m", "pinned": True}})
    assert found.held == {"a": "a", "b": "a"}
    assert found.config.experts["a"].pinned
    assert found.config.experts["far"].remote is not None


def test_share_weights_in_a_simulated_pool_needs_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for model, same in (("./nowhere", False), (str(tmp_path / "m"), True)):
        experts = {"a": {"model": model}, "b": {"model": model}}
        experts["c"] = {"base": "a", "defaults": {}}
        found = share_weights(config(experts, engine="simulated"), "p")
        assert (found.held["a"] == found.held["b"]) is same
        assert found.held["c"] == "a"
    experts = {"a": {"model": str(tmp_path / "m")}, "b": {"model": str(tmp_path / "link")}}
    assert share_weights(config(experts), "p").held == {"a": "a", "b": "a"}


SOURCES: tuple[dict[str, Any], ...] = (
    {"model": "m"},
    {"model": "m@2"},
    {"model": "n"},
    {"base": "root", "adapter": "/x"},
    {"base": "root", "adapter": "/y"},
    {"base": "root", "adapter": "/x", "form": "merged"},
    {"base": "root", "profile": "/p"},
    {"base": "root", "defaults": {}},
)
NAMES = "abcd"
CONFIGS = st.builds(
    lambda root, chosen: {"root": root, **chosen},
    st.sampled_from(SOURCES[:3]),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(SOURCES)),
)


@settings(deadline=None)
@given(steps=st.lists(CONFIGS, min_size=2, max_size=5))
def test_share_weights_over_reloads_keeps_the_names_of_weights_that_stay(
    steps: list[dict[str, Any]],
) -> None:
    before: WeightSharing | None = None
    for experts in steps:
        now = shared(experts, before.config if before is not None else None)
        alone = shared(experts)
        # The same experts share, whatever came before.
        for one, other in itertools.combinations(experts, 2):
            same = alone.held[one] == alone.held[other]
            assert (now.held[one] == now.held[other]) is same
        assert set(now.held) == set(experts)
        assert set(now.held.values()) == set(now.config.experts)
        for held, expert in now.config.experts.items():
            assert expert.base is None or expert.base in now.config.experts
            # The weights are those that the name's experts ask for.
            named = next(name for name in experts if now.held[name] == held)
            assert origin(now.config, held) == origin(config(experts), named)
        if before is not None:
            _assert_kept(before, now)
        before = now


def origin(whole: Config, name: str) -> tuple[Any, ...]:
    name = whole.owner_of(name)
    expert = whole.experts[name]
    if expert.base is None:
        return (folder(whole, name),)
    return (*origin(whole, expert.base), expert.form, expert.adapter, expert.profile)


def _assert_kept(before: WeightSharing, now: WeightSharing) -> None:
    """Check that weights that stay have the name and the settings that they had."""

    def here(sharing: WeightSharing) -> dict[tuple[Any, ...], str]:
        return {origin(sharing.config, held): held for held in sharing.config.experts}

    was, stays = here(before), here(now)
    for key in was.keys() & stays.keys():
        assert was[key] == stays[key]
        old, new = before.config.experts[was[key]], now.config.experts[was[key]]
        assert old.model_copy(update={"pinned": new.pinned}) == new


def test_share_weights_that_take_a_name_in_use_get_a_name_that_no_expert_has() -> None:
    first = shared({"a": {"model": "m"}, "b": {"model": "m"}})
    second = shared({"a": {"model": "n"}, "b": {"model": "m"}}, first.config)
    assert second.held == {"a": "a~2", "b": "a"}
    third = shared({"a": {"model": "n"}, "c": {"model": "m"}}, second.config)
    assert third.held == {"a": "a~2", "c": "a"}
    assert shared({"a": {"model": "n"}}, third.config).held == {"a": "a~2"}
