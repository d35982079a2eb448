"""Section `experts.NAME.thinking`: whether an expert thinks before it answers, and how long."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from service.config.section_base import Section


class ThinkingConfig(Section):
    """Whether an expert thinks before it answers, and for how many tokens.

    `thinking: true` and `thinking: false` are short for `enabled`.
    """

    enabled: bool = Field(
        True,
        description="Whether it thinks. The gateway tells its chat template or endpoint so. A "
        "request that asks for the other is answered by other experts, or refused.",
    )
    budget_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of thinking of an answer. Lower efforts get a part of it: minimal "
        "an eighth, low a quarter, medium a half. Needs `vllm.reasoning_parser` of its pools, or a "
        "remote endpoint that takes budgets.",
    )

    learned_quantile: float | None = Field(
        None,
        ge=0.5,
        le=0.99,
        description="Learn a budget for each category: at least this share of the expert's "
        "thinking keeps within it, and more as long as a token is worth its cost and time. It "
        "bounds requests that set neither a budget nor an effort of high or more. Default: off.",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> ThinkingConfig:
        if not self.enabled and self.budget_tokens is not None:
            raise ValueError("budget_tokens is for experts that think")
        if not self.enabled and self.learned_quantile is not None:
            raise ValueError("learned_quantile is for experts that think")
        return self

    @property
    def bounded(self) -> str | None:
        """The key by which it has a budget; None if it has none."""
        if self.budget_tokens is not None:
            return "budget_tokens"
        return None if self.learned_quantile is None else "learned_quantile"


def _read_switch(value: object) -> object:
    return {"enabled": value} if isinstance(value, bool) else value


Thinking = Annotated[
    ThinkingConfig, BeforeValidator(_read_switch, json_schema_input_type=bool | ThinkingConfig)
]
