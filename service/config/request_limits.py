"""Section `server.limits`: bounds on the size, depth and speed of requests."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Bytes, Section


class RequestLimits(Section):
    """Bounds on every request. A request over a bound is refused before any other work."""

    max_header_bytes: int = Field(
        16_384, ge=1024, description="Size of all headers, in bytes; more gets 431."
    )
    max_headers: int = Field(100, ge=10, description="Number of headers; more gets 431.")
    max_json_depth: int = Field(
        64, ge=4, le=250, description="Nesting depth of a body; more gets 400."
    )
    max_json_values: int = Field(
        500_000, ge=100, description="Approximate number of values in a body; more gets 400."
    )
    max_choices: int = Field(
        128, ge=1, description="Largest `n` or `best_of` of a request; more gets 400."
    )
    max_prompts: int = Field(
        64,
        ge=1,
        description="Prompts of one completions request; more gets 400. The product of prompts and "
        "choices is bounded by the greater of this and `max_choices`.",
    )
    max_inputs: int = Field(
        1024,
        ge=1,
        description="Texts of one request for embeddings, scores or classes, and documents of one "
        "to rank; more gets 400.",
    )
    max_audio_bytes: Bytes = Field(
        25 * 1024**2,
        description="Size of a recording to transcribe, in bytes; more gets 413. Gateways hold it "
        "in memory, and never on disk.",
    )
    max_messages: int = Field(
        4096,
        ge=1,
        description="Messages of one request plus the parts of their contents; more gets 400.",
    )
    max_tools: int = Field(512, ge=1, description="Tools of a request; more gets 400.")
    max_schema_bytes: int = Field(
        65_536,
        ge=256,
        description="Size of each schema, grammar or tool, in bytes; more gets 400. All of them "
        "together may have eight times this size.",
    )
    max_schema_properties: int = Field(
        512, ge=1, description="Properties and definitions of a schema; more gets 400."
    )
    max_pattern_bytes: int = Field(
        2048, ge=16, description="Bytes of a regular expression; more gets 400."
    )
    max_grammar_bytes: int = Field(
        16_384, ge=16, description="Bytes of an EBNF or Lark grammar; more gets 400."
    )
    max_pattern_depth: int = Field(
        64,
        ge=1,
        le=256,
        description="Nesting depth of groups in a regular expression or grammar; more gets 400.",
    )
    header_timeout_s: int = Field(
        10, ge=1, description="Time for a request's headers to arrive, in s; then 408."
    )
    body_timeout_s: float = Field(
        60.0, gt=0, description="Time for a request's body to arrive, in s; then 408."
    )
    stall_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Longest time that a client may take to read sent data, in s; then its "
        "connection is closed.",
    )
    chat_template_kwargs: tuple[str, ...] = Field(
        ("enable_thinking", "thinking", "reasoning_effort", "add_vision_id"),
        description="Keys that `chat_template_kwargs` of a request may set. Their values are "
        "strings, numbers or booleans, never templates.",
    )
