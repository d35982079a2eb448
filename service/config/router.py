"""Section `router`: the stages of the classifier, presets and sessions."""

from __future__ import annotations

from pydantic import Field

from service.config.router_presets import PresetsConfig
from service.config.section_base import Section
from service.config.sessions import SessionsConfig


class EncoderConfig(Section):
    """The sentence encoder that is asked where the first stage is unsure."""

    model: str | None = Field(
        None,
        description="A sentence encoder as ONNX: `use-multilingual-v3` or `all-minilm-l6-v2` of "
        "the built-in catalogue, a folder, or a model that `coe models pull` has fetched from the "
        "hub. By default the one that the artifact was fitted with: `use-multilingual-v3` for the "
        "built-in classifier, `all-minilm-l6-v2` for categories with examples.",
    )
    when_below: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Ask it where the confidence of the first stage is below this, and where the "
        "prompt is new to it, as far as `min_gain` allows. 1 is unsure of every prompt.",
    )
    min_gain: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Ask it only where the knowledge of the category could raise the expected "
        "quality by more than this, whatever experts cost and however long they wait. So it is not "
        "asked where the categories in doubt have the same experts.",
    )
    threads: int = Field(1, ge=1, le=64, description="Threads of one batch.")
    max_tokens: int = Field(
        128, ge=8, le=512, description="Tokens of a prompt that it reads, half from either end."
    )
    cache_entries: int = Field(
        10_000,
        ge=0,
        le=1_000_000,
        description="Vectors of recent prompts that each gateway keeps, of 2 KB each. They are "
        "kept for each tenant apart.",
    )
    timeout_ms: float = Field(
        50,
        gt=0,
        le=1000,
        description="The longest that a request waits for it. Then the first stage decides.",
    )


NO_ARTIFACT = "none"
"""The value of `router.artifact` that leaves out the built-in artifact."""


class RouterConfig(Section):
    """The stages of the classifier of prompts, and the expert for prompts without a category."""

    artifact: str | None = Field(
        None,
        description="Folder of a router artifact, relative to this file. Without one, the built-in "
        "`general@2` sorts prompts into 26 everyday categories, unless there are `categories` with "
        "examples. `none` leaves it out; without such categories `auto` then always means "
        "`fallback`.",
    )
    fallback: str | None = Field(
        None,
        description="Expert for prompts of category `general` or of a category that no expert "
        "names. Default: the first expert that names category `general`, else the first expert.",
    )
    presets: PresetsConfig = Field(default_factory=lambda: PresetsConfig())
    sessions: SessionsConfig = Field(default_factory=lambda: SessionsConfig())
    static: bool = Field(
        True,
        description="Use the static semantic table with n-grams in the first stage, where the "
        "artifact was fitted with it, and for `categories`.",
    )
    encoder: EncoderConfig | None = Field(
        None, description="The second stage, a sentence encoder. Default: there is none."
    )
