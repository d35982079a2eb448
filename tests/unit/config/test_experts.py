"""Experts without weights of their own: what a config may say of them, and what they inherit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.config import Config, load_config, parse_config
from service.default_prices import with_default_prices
from service.errors import ConfigError

FAR = {"remote": {"url": "https://far/v1", "model": "x", "logprobs": True}}
EXPERTS: dict[str, Any] = {
    "full": {"model": "m", "price": {"prompt": 2}, "capabilities": ["chat", "json"]},
    "lora": {"base": "full", "adapter": "/x"},
    "far": FAR,
}


def config(pool: dict[str, Any] | None = None, **experts: Any) -> Config:
    whole = {"experts": EXPERTS | experts, "pools": {"p": {"engine": "simulated"} | (pool or {})}}
    return Config.model_validate(whole)


def variant(base: str = "full", **more: Any) -> dict[str, Any]:
    return {"base": base, "defaults": {}, **more}


def test_variant_has_its_base_s_capabilities_price_and_endpoint_unless_it_sets_them() -> None:
    found = config(
        a=variant(),
        b=variant(capabilities=["chat"], price={"prompt": 5}),
        c=variant("lora"),
        d=variant("far"),
    )
    a, b, d = (found.experts[name] for name in "abd")
    assert a.capabilities == ("chat", "json")
    assert b.capabilities == ("chat",)
    assert d.remote == found.experts["far"].remote
    prices = {name: one.price for name, one in with_default_prices(found).experts.items()}
    assert [prices[name].prompt for name in "abcd"] == [2, 5, 2, 0]  # type: ignore[union-attr]
    assert [found.owner_of(name) for name in ("full", *"abcd")] == [
        "full",
        "full",
        "full",
        "lora",
        "far",
    ]


def test_variant_is_in_its_base_s_pools_and_in_no_unit() -> None:
    found = config({"experts": ["full"]}, lora=FAR, a=variant())
    assert found.local_experts("p") == ("full", "a")
    assert found.units("p") == (("full",),)
    assert found.model_sources() == {}
    whole = config(a=variant("lora"))
    assert whole.local_experts("p") == ("full", "lora", "a")
    assert whole.units("p") == (("full", "lora"),)


def test_variant_of_a_config_in_force_is_read_again_as_it_was() -> None:
    first = config(a=variant(), d=variant("far"), c=variant("lora", defaults={"stop": "x"}))
    again = Config.model_validate(first.model_dump(mode="json"))
    assert again.experts == first.experts


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (
            {"v": {"base": "full"}},
            "v: base goes together with adapter, profile, defaults or thinking",
        ),
        ({"v": variant("ful")}, "v.base: no expert 'ful'; did you mean 'full'?"),
        (
            {"v": variant(), "w": variant("v")},
            "w.base: 'v' is a variant itself; name its base, 'full'",
        ),
        (
            {"v": variant(), "w": {"base": "v", "adapter": "/x"}},
            "w.base: 'v' has no full weights of its own",
        ),
        ({"v": variant(remote=FAR["remote"])}, "v.remote: a variant has its base's endpoint"),
        ({"v": variant(model="m")}, "v: needs exactly one of model, base"),
        (
            {"v": variant(vllm={"moe_backend": "triton"})},
            "v: vllm is for experts with full weights",
        ),
        (
            {"v": variant(capabilities=["chat", "tools"])},
            "v.capabilities: its base 'full' lacks tools; it has chat, json",
        ),
        (
            {
                "v": variant(
                    capabilities=["chat"], defaults={"response_format": {"type": "json_object"}}
                )
            },
            "v.defaults.response_format: the expert lacks the capability json",
        ),
        ({"v": variant(defaults={"temprature": 1})}, "v.defaults.temprature: unknown key"),
        ({"v": variant(defaults={"temperature": 3})}, "v.defaults.temperature: "),
        ({"v": variant(defaults={"max_tokens": 2, "min_tokens": 3})}, "min_tokens must not be"),
        ({"v": variant(defaults={"response_format": {"type": "xml"}})}, "text, json_object or"),
        (
            {"v": variant(defaults={"response_format": {"type": "json_schema"}})},
            "needs json_schema with name and schema",
        ),
        ({"v": variant(defaults={"stop": ["a", "b", "c", "d", "e"]})}, "v.defaults.stop"),
    ],
)
def test_variant_that_can_not_be_is_refused_with_what_is_allowed(
    experts: dict[str, Any], said: str
) -> None:
    whole = {"experts": EXPERTS | experts, "pools": {"p": {"engine": "simulated"}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(whole), "coe.yaml")
    assert said in caught.value.message


def test_unknown_default_names_the_ones_that_are_allowed(tmp_path: Any) -> None:
    file = tmp_path / "coe.yaml"
    file.write_text(
        "experts:\n  a: {model: m}\n  v: {base: a, defaults: {temprature: 1}}\n"
        "pools: {p: {engine: simulated}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "temperature" in caught.value.message
    assert "chat_template_kwargs" in caught.value.message


def test_variant_listed_in_a_pool_without_its_base_is_refused() -> None:
    with pytest.raises(ValueError, match="'v' is a variant of 'full', which is not in this pool"):
        config({"experts": ["v"]}, v=variant())


def test_idle_settings_are_refused_where_nothing_could_follow_them() -> None:
    def read(pool: dict[str, Any], **expert: Any) -> Config:
        experts = {"a": {"model": "m", **expert}}
        return Config.model_validate({"experts": experts, "pools": {"p": pool}})

    keep = {"swap": {"idle_keep": "host"}}
    with pytest.raises(ValueError, match=r"idle_keep: host needs swap\.method sleep"):
        read(keep)
    read({**keep, "engine": "simulated"})
    read({"swap": {"idle_keep": "host", "method": "sleep"}, "gpus": 1})
    read({"swap": {"idle_keep": "disk", "idle_unload_s": 60}}, idle_unload_s=0)
    remote = {"url": "http://far/v1", "model": "m"}
    with pytest.raises(ValueError, match="a remote one holds no memory"):
        read({}, model=None, remote=remote, idle_unload_s=5)
