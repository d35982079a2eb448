"""Default prices: active parameters of local experts, and what replaces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.broker.token_prices import Price, prices_of
from service.config import Config
from service.default_prices import (
    active_parameters,
    billions_in_name,
    price_warnings,
    with_default_prices,
)
from tests.unit.models.test_model_inspection import CONFIG, Tensors, make_model


def config(experts: dict[str, Any], **sections: Any) -> Config:
    named = {name: settings for name, settings in experts.items() if "remote" not in settings}
    pools = {"p": {"engine": "simulated"}} if named else {}
    return Config.model_validate({"experts": experts, "pools": pools, **sections})


def near(prompt: float, completion: float) -> Price:
    """A price that equals one of nearly the same figures."""
    prompt_, completion_ = pytest.approx(prompt), pytest.approx(completion)
    return Price(prompt_, completion_)  # type: ignore[arg-type]


def prices(experts: dict[str, Any], **sections: Any) -> dict[str, Price]:
    return prices_of(with_default_prices(config(experts, **sections)))


REMOTE = {"url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7.0),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 3.0),
        ("Qwen/Qwen2.5-0.5B", 0.5),
        ("smollm2-135m-instruct", 0.135),
        ("mistralai/Mixtral-8x7B-v0.1", 14.0),
        ("ORG/model-70b-chat@0123456789abcdef", 70.0),
        ("01-ai/Yi-34B", 34.0),
        ("microsoft/phi-4", None),
        ("org/abc7be", None),
        ("org/0B", None),
        ("70B/folder", None),
        # One size alone is taken for that of a dense model.
        ("allenai/OLMoE-1B-7B-0924", 1),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 17),
        ("openai/gpt-oss-120b", 120),
    ],
)
def test_billions_in_name_reads_the_active_size(name: str, billions: float | None) -> None:
    assert billions_in_name(name) == (None if billions is None else pytest.approx(billions))


def test_default_price_is_the_active_parameters_of_the_folder(tmp_path: Path) -> None:
    mixture: Tensors = {
        "model.embed_tokens.weight": ("BF16", (100, 64)),
        **{f"model.layers.0.mlp.experts.{i}.w": ("BF16", (64, 100)) for i in range(4)},
    }
    settings = {**CONFIG, "num_local_experts": 4, "num_experts_per_tok": 1}
    make_model(tmp_path / "dense-70B")
    make_model(tmp_path / "mixture-70B", settings, mixture)
    found = prices(
        {
            "dense": {"model": str(tmp_path / "dense-70B")},
            "mixture": {"model": str(tmp_path / "mixture-70B")},
        }
    )
    # The folder is more exact than its name. One of four FFN experts computes a token.
    assert found["dense"] == near(6464e-9, 6464e-9)
    assert found["mixture"] == near(12800e-9, 12800e-9)


def test_default_price_of_an_adapter_and_of_a_virtual_expert_is_that_of_their_base() -> None:
    experts: dict[str, Any] = {
        "a": {"model": "org/x-8B"},
        "b": {"model": "org/y-30B-A3B", "price": {"prompt": 2, "completion": 5}},
        "la": {"base": "a", "adapter": "./l"},
        "lb": {"base": "b", "adapter": "./l"},
        "vb": {"base": "b", "profile": "./v"},
        "own": {"base": "b", "adapter": "./l", "price": {"completion": 9}},
    }
    found = prices(experts, prices={"per_billion_parameters": 0.5})
    assert found["a"] == found["la"] == Price(4, 4)
    assert found["b"] == found["lb"] == found["vb"] == Price(2, 5)
    assert found["own"] == Price(0, 9)


def test_default_price_of_an_unknown_size_is_that_of_the_dearest_known() -> None:
    experts: dict[str, Any] = {
        "known": {"model": "org/x-8B"},
        "small": {"model": "org/x-1B"},
        "unknown": {"model": "./x"},
    }
    assert active_parameters(config(experts)).unknown == ("unknown",)
    assert prices(experts)["unknown"] == Price(8, 8)
    assert prices({"unknown": {"model": "./x"}})["unknown"] == Price(0, 0)


@pytest.mark.parametrize(
    ("priced", "sections", "local"),
    [
        (False, {}, 8.0),
        (True, {}, 0.0),
        (True, {"prices": {"per_billion_parameters": 0.02}}, 0.16),
        (False, {"prices": {"per_billion_parameters": 0}}, 0.0),
    ],
)
def test_default_price_beside_a_price_in_money_needs_an_exchange(
    priced: bool, sections: dict[str, Any], local: float
) -> None:
    remote: dict[str, Any] = {"remote": REMOTE}
    if priced:
        remote["price"] = {"prompt": 0.5, "completion": 1.5}
    found = prices({"here": {"model": "org/x-8B"}, "there": remote}, **sections)
    assert found["here"] == near(local, local)
    assert found["there"] == (Price(0.5, 1.5) if priced else Price(0, 0))


PRICED = {"remote": REMOTE, "price": {"completion": 1}}


@pytest.mark.parametrize(
    ("experts", "sections", "words"),
    [
        ({"a": {"model": "org/x-8B"}, "b": {"model": "org/x-1B"}}, {}, []),
        ({"a": {"model": "./x"}, "b": {"model": "./y"}}, {}, ["every expert costs 0"]),
        (
            {"a": {"model": "org/x-8B"}},
            {
                "prices": {"per_billion_parameters": 0},
                "budgets": {"all": {"amount": 1, "period": "day"}},
            },
            ["every expert costs 0"],
        ),
        # One expert without a budget: there is nothing to save.
        ({"a": {"model": "./x"}}, {}, []),
        (
            {"a": {"model": "org/x-8B"}, "far": PRICED},
            {},
            ["a cost 0 beside experts with a price; set prices.per_billion_parameters"],
        ),
        (
            {"a": {"model": "org/x-8B"}, "far": {"remote": REMOTE}},
            {},
            ["far are remote and cost 0"],
        ),
        (
            {"a": {"model": "org/x-8B"}, "b": {"model": "./y"}, "far": PRICED},
            {"prices": {"per_billion_parameters": 0.1}},
            ["the sizes of b are unknown"],
        ),
    ],
)
def test_price_warnings_name_what_does_not_matter(
    experts: dict[str, Any], sections: dict[str, Any], words: list[str]
) -> None:
    found = price_warnings(config(experts, **sections))
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line
