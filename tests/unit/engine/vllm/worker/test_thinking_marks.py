"""Marks of thinking in fakes of vLLM's model runners of both generations."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from service.engine.vllm.worker.thinking_marks import marks_of, use_marks  # noqa: E402


def marks(start: list[int] | None, end: list[int] | None) -> Any:
    """Marks as vLLM's config has them; without numbers where the parser names no texts."""
    return SimpleNamespace(
        enabled=start is not None,
        reasoning_start_token_ids=start,
        reasoning_end_token_ids=end,
        natural_reasoning_end_token_ids=end,
    )


def first_runner() -> Any:
    holder = SimpleNamespace(think_start_token_ids=[1], think_end_token_ids=[2])
    return SimpleNamespace(input_batch=SimpleNamespace(thinking_budget_state_holder=holder))


def second_runner(*, enabled: bool = True) -> Any:
    state = SimpleNamespace(enabled=enabled)
    if enabled:
        for name in ("start", "end"):
            setattr(state, f"reasoning_{name}_token_ids", torch.tensor([1]))
        state.natural_reasoning_end_token_ids = torch.tensor([1])
    return SimpleNamespace(sampler=SimpleNamespace(thinking_budget_state=state))


def test_use_marks_changes_both_generations() -> None:
    one, two = first_runner(), second_runner()
    for runner in (one, two):
        use_marks(runner, marks([7, 8], [9]))
    assert one.input_batch.thinking_budget_state_holder.think_start_token_ids == [7, 8]
    assert one.input_batch.thinking_budget_state_holder.think_end_token_ids == [9]
    state = two.sampler.thinking_budget_state
    assert state.reasoning_start_token_ids.tolist() == [7, 8]
    assert state.natural_reasoning_end_token_ids.tolist() == [9]


@pytest.mark.parametrize("none", [None, marks(None, None)])
def test_use_marks_without_marks_leaves_a_runner_as_it_is(none: Any) -> None:
    one, two = first_runner(), second_runner(enabled=False)
    for runner in (one, two):
        use_marks(runner, none)
    assert one.input_batch.thinking_budget_state_holder.think_start_token_ids == [1]
    assert vars(two.sampler.thinking_budget_state) == {"enabled": False}


@pytest.mark.parametrize(("known", "finds"), [(False, False), (True, False), (True, True)])
def test_marks_of_a_tokenizer_without_marks_are_an_error(
    monkeypatch: pytest.MonkeyPatch, known: bool, finds: bool
) -> None:
    class Reasoning(SimpleNamespace):
        enabled = False

        def initialize_token_ids(self, _: object) -> None:
            self.enabled = finds

    module = ModuleType("vllm.config.reasoning")
    module.ReasoningConfig = Reasoning  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.config", ModuleType("vllm.config"))
    monkeypatch.setitem(sys.modules, "vllm.config.reasoning", module)
    texts = {"reasoning_parser": "p", "reasoning_start_str": "", "reasoning_end_str": ""}
    config: Any = SimpleNamespace(reasoning_config=SimpleNamespace(enabled=known, **texts))
    model: Any = object()
    if known and not finds:
        with pytest.raises(ValueError, match="no marks of thinking"):
            marks_of(config, model)
    else:
        found = marks_of(config, model)
        assert (found is not None and found.enabled) is finds
