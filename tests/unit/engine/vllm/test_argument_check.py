"""Which arguments vLLM is asked about, and what becomes of its answers."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from service.config import Config
from service.engine.vllm import argument_check
from service.engine.vllm.argument_check import check_arguments
from service.errors import ConfigError


def config(**pools: dict[str, Any]) -> Config:
    kinds = {
        kind: {"engine": "simulated" if kind == "fake" else "vllm", "vllm": {"args": args}}
        for kind, args in pools.items()
    }
    return Config.model_validate({"experts": {"a": {"model": "m"}}, "pools": kinds})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What vLLM was asked. It refuses every argument `seed`."""
    asked: list[Mapping[str, Any]] = []

    def ask(given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
        asked.append(given)
        return {kind: {n: "no" for n in args if n == "seed"} for kind, args in given.items()}

    monkeypatch.setattr(argument_check, "_in_own_process", ask)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return asked


def test_vllm_is_asked_once_about_pools_with_arguments(asked: list[Any]) -> None:
    assert check_arguments(config(one={"block_size": 16}, two={}, fake={"seed": 1})) is None
    assert asked == [{"one": {"block_size": 16}}]


def test_vllm_is_not_imported_for_pools_without_arguments(asked: list[Any]) -> None:
    assert check_arguments(config(one={}, fake={"seed": 1})) is None
    assert asked == []


def test_refusals_are_told_with_their_place(asked: list[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(config(one={"seed": "x"}, two={"seed": "y", "block_size": 1}))
    assert caught.value.message.splitlines() == [
        "pools.one.vllm.args.seed: vLLM refuses it: no",
        "pools.two.vllm.args.seed: vLLM refuses it: no",
    ]


def test_without_vllm_the_values_are_said_to_be_unchecked(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = check_arguments(config(one={"seed": "x"}))
    assert said == (
        "pools.one.vllm.args: vLLM is not installed here, so that it could not check the values"
    )
    assert asked == []


@pytest.mark.parametrize(
    "error", [OSError(), subprocess.TimeoutExpired("x", 1), ValueError(), IndexError()]
)
def test_a_failed_question_is_said_and_stops_nothing(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(given: object) -> Any:
        raise error

    monkeypatch.setattr(argument_check, "_in_own_process", fail)
    assert "could not be asked" in str(check_arguments(config(one={"seed": "x"})))
