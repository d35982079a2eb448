"""Section `experts.NAME.defaults`: what an expert's requests say unless they say otherwise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from service.config.section_base import Section


class DefaultsConfig(Section):
    """Fields that a request to the expert gets where it does not set them itself.

    The names are those of chat completions. Other endpoints get them under their own names, and
    leave out those that they lack.
    """

    system: str | None = Field(
        None,
        min_length=1,
        max_length=65_536,
        description="System prompt, for requests without one of their own.",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="Sampling temperature.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus of the sampling.")
    top_k: int | None = Field(None, ge=-1, description="Tokens to sample from. 0, -1: all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Least probability, relative to the likeliest token's."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Penalty of tokens that the answer has already."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same, for each time that a token occurred."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=2, description="Factor against tokens of prompt and answer."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the sampling.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer.")
    min_tokens: int | None = Field(None, ge=0, description="Fewest tokens of an answer.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, min_length=1, max_length=4, description="Texts that end an answer."
    )
    response_format: dict[str, Any] | None = Field(
        None, description="Form of the answer: type json_object, or json_schema with a schema."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="How much a model reasons, where it can be told.")
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Arguments of the model's chat template, such as `enable_thinking: false`. "
        "A request may set other ones; those that it sets itself stay.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_single_stop(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            return {**data, "stop": [data["stop"]]}
        return data

    @model_validator(mode="after")
    def _check_lengths(self) -> DefaultsConfig:
        if (self.min_tokens or 0) > (self.max_tokens or 2**63):
            raise ValueError("min_tokens must not be greater than max_tokens")
        return self

    @model_validator(mode="after")
    def _check_form(self) -> DefaultsConfig:
        form = self.response_format
        if form is None:
            return self
        if form.get("type") not in ("text", "json_object", "json_schema"):
            raise ValueError("response_format.type must be text, json_object or json_schema")
        if form["type"] == "json_schema":
            schema = form.get("json_schema")
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                raise ValueError(
                    "response_format of type json_schema needs json_schema with name and schema"
                )
        return self

    @property
    def wants_json(self) -> bool:
        """Whether answers are JSON unless the request says otherwise."""
        return (self.response_format or {}).get("type") in ("json_object", "json_schema")
