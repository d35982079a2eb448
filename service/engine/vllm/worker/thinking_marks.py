"""Ends an expert's thinking by the marks of its own tokenizer.

vLLM's sampler counts the tokens after the mark that begins the thinking, and writes the mark that
ends it once a request's budget is used. It knows the numbers of both marks by the tokenizer that
the engine was started with, and another expert's tokenizer may have other numbers for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.reasoning import ReasoningConfig


def marks_of(config: VllmConfig, model: ModelConfig) -> ReasoningConfig | None:
    """Return the marks of thinking in a model's tokenizer; None where the engine knows no marks.

    Args:
        config: vLLM's config of the engine.
        model: The config with the tokenizer.

    Raises:
        ValueError: The parser names no marks for this tokenizer.
        Exception: The tokenizer lacks the marks. The message comes from vLLM.
    """
    from vllm.config.reasoning import ReasoningConfig

    known = config.reasoning_config
    if known is None or not known.enabled:
        return None
    marks = ReasoningConfig(
        reasoning_parser=known.reasoning_parser,
        reasoning_start_str=known.reasoning_start_str,
        reasoning_end_str=known.reasoning_end_str,
    )
    marks.initialize_token_ids(model)
    if not marks.enabled:
        raise ValueError("its tokenizer has no marks of thinking, and the running engine's has")
    return marks


def use_marks(runner: Any, marks: ReasoningConfig | None) -> None:
    """Let a model runner end thinking by these marks. No request may be running.

    Args:
        runner: vLLM's model runner, of either generation.
        marks: The marks; None leaves it as it is, and so do those of a parser that names none.
    """
    if marks is None or not marks.enabled:
        return
    start, end = marks.reasoning_start_token_ids, marks.reasoning_end_token_ids
    if hasattr(runner, "input_batch"):
        holder = runner.input_batch.thinking_budget_state_holder
        holder.think_start_token_ids, holder.think_end_token_ids = start, end
        return
    state = runner.sampler.thinking_budget_state
    for name, tokens in (
        ("reasoning_start_token_ids", start),
        ("reasoning_end_token_ids", end),
        ("natural_reasoning_end_token_ids", marks.natural_reasoning_end_token_ids),
    ):
        setattr(state, name, getattr(state, name).new_tensor(tokens))
