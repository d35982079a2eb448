"""Section `experts`: the served models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from service.config.command_experts import CommandConfig
from service.config.expert_request_defaults import DefaultsConfig
from service.config.moe_options import ExpertKernels
from service.config.section_base import ENV_VARIABLE_PATTERN, Section
from service.config.thinking import Thinking


class RemoteConfig(Section):
    """A model behind another OpenAI-compatible API."""

    url: str = Field(
        pattern=r"^https?://[^\s]+$", description="Base URL, including /v1 if the API has it."
    )
    model: str = Field(description="Name of the model at that API.")
    api_key_env: str | None = Field(
        None,
        pattern=ENV_VARIABLE_PATTERN,
        description="Environment variable that holds the key. Never the key itself.",
    )
    cache_salt: bool = Field(
        False,
        description="The endpoint accepts vLLM's field cache_salt. The gateway then sends a salt "
        "per tenant, so that tenants share no prefix there. A client's own salt is always combined "
        "with the tenant's.",
    )
    logprobs: bool = Field(
        False,
        description="The endpoint returns log probabilities of tokens on request (`logprobs` of "
        "chat completions). A cascade with `sure` needs them from its first member.",
    )
    thinking_fields: Literal["openai", "anthropic", "vllm"] = Field(
        "openai",
        description="Fields by which the endpoint is told how to think, but on /v1/messages, where "
        "they are always Anthropic's. openai: reasoning_effort, which has no budget. anthropic: "
        "thinking, with budget_tokens. vllm: chat_template_kwargs and thinking_token_budget.",
    )
    max_in_flight: int = Field(64, ge=1, description="Concurrent requests; more wait.")
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="Requests that may wait; more get 503. A request counts once per answer, or "
        "once per 2,048 tokens of its prompt, whichever is more.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="Time to connect, in s.")
    stall_timeout_s: float = Field(
        300.0, gt=0, description="Longest silence of a started stream, in s."
    )


class PriceConfig(Section):
    """The price of an expert's tokens, in a unit of your choice: money or computation."""

    prompt: float = Field(0.0, ge=0, le=1e6, description="Units per million prompt tokens.")
    completion: float = Field(
        0.0, ge=0, le=1e6, description="Units per million tokens of an answer."
    )


class MediaConfig(Section):
    """Prompt tokens of images, audio and video: by size, or else an upper bound."""

    image_tokens: int = Field(
        4096,
        ge=1,
        le=1_000_000,
        description="Most tokens of one image. Default: the rule of the model folder, if the "
        "model's processor has a plain one; else 4,096.",
    )
    image_edge: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Edge in pixels of the square that becomes one token, for models that count "
        "by area (Qwen2-VL: 28). Default: the model folder's value; else every image counts as "
        "`image_tokens`.",
    )
    audio_tokens: int = Field(
        4096, ge=1, le=1_000_000, description="Most tokens of one audio input."
    )
    video_tokens: int = Field(16_384, ge=1, le=1_000_000, description="Most tokens of one video.")


Capability = Literal[
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "score",
    "classify",
    "transcription",
    "tools",
    "json",
    "vision",
    "audio",
]
TEXT = frozenset({"chat", "completions"})
"""The capabilities of experts that make text."""
POOLING = frozenset({"embeddings", "rerank", "score", "classify"})
"""The capabilities of experts that read texts and make vectors, scores or classes of them."""


def makes_text(capabilities: Collection[str]) -> bool:
    """Whether an expert with these capabilities answers prompts with text, and no more."""
    return bool(TEXT & {*capabilities}) and not POOLING & {*capabilities}


class ExpertConfig(Section):
    """One named model.

    It has full weights (`model`), or a `base` with `adapter`, `profile`, `defaults` or `thinking`,
    or `remote`, or `command`.
    """

    model: str | None = Field(
        None,
        description="Full weights: a name from `coe models list`, a folder (a path that begins "
        "with ./, ../, / or ~), or ORG/NAME of the hub; @COMMIT pins a version.",
    )
    base: str | None = Field(
        None,
        description="LoRA and virtual experts: the expert with the base's full weights. Variants: "
        "any expert that is no variant.",
    )
    adapter: str | None = Field(None, description="LoRA: folder of the adapter.")
    profile: str | None = Field(
        None,
        description="Virtual expert: a steering profile, a file that changes which routed experts "
        "the gates of `base` (a mixture of experts) choose for a token. It has no weights of its "
        "own. GPU: not tested.",
    )
    remote: RemoteConfig | None = Field(None, description="A remote endpoint.")
    command: CommandConfig | None = Field(
        None,
        description="A server of somebody else's, such as llama.cpp, that a pool starts and stops.",
    )
    form: Literal["adapter", "merged", "steered"] = Field(
        "adapter",
        description="How an adapter is served. adapter: beside its base, in one batch with it. "
        "merged: added to the base's weights once, as full weights of the base's family; "
        "faster on CPU, but needs a swap. steered: a virtual expert with `profile`; it takes turns "
        "with its base.",
    )
    strength: float = Field(1.0, gt=0, le=4, description="merged: factor of the adapter's weights.")
    defaults: DefaultsConfig | None = Field(
        None,
        description="Fields of its requests that do not set them: system, temperature, max_tokens "
        "and others. With `base` alone it is a variant: another way to ask the base, in the same "
        "batch, without weights of its own. It has its base's price, capabilities and media where "
        "it sets none.",
    )
    thinking: Thinking | None = Field(
        None,
        description="Whether it thinks before it answers: true, false, or a section. With `base` "
        "alone it is a variant, too. Default: as each request says, and else as the model does.",
    )
    pinned: bool = Field(False, description="Never evict its weights from host memory.")
    idle_unload_s: float | None = Field(
        None,
        ge=0,
        le=31_536_000,
        description="Seconds without a request after which it gives its memory back, until the "
        "next request; 0: never. Default: `swap.idle_unload_s` of its pool. An engine ends, or "
        "sleeps, once this holds for all experts in it.",
    )
    categories: tuple[str, ...] = Field(
        (), description="Categories that `auto` sends to this expert."
    )
    auto: bool = Field(
        True,
        description="Whether `auto` may choose it, alone or in a recipe. false leaves it to "
        "requests that name it, or a recipe with it.",
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]. Default: 1 on categories that no "
        "earlier expert names; elsewhere 0.5 for the fallback and 0 for other experts.",
    )
    quality_from: str | None = Field(
        None,
        description="Another expert, whose expected quality it has where neither `quality` nor the "
        "router's artifact has a figure of its own: usually its base.",
    )
    vllm: ExpertKernels = Field(default_factory=lambda: ExpertKernels())
    price: PriceConfig | None = Field(
        None,
        description="Price of its tokens. Default: that of its base, or of its active parameters "
        "(see `prices`); 0 for a remote endpoint.",
    )
    description: str = Field("", description="One line for people, shown in /v1/models.")
    capabilities: tuple[Capability, ...] = Field(
        ("chat", "completions", "tools", "json"),
        description="What it supports: chat, completions, tools, json, vision (images and video), "
        "audio; or embeddings, rerank, score, classify; or transcription of speech. Default: "
        "these, plus vision and audio if the model folder has a part for them.",
    )
    media: MediaConfig = Field(default_factory=lambda: MediaConfig())
    space: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="embeddings: name of the vector space of its vectors. `auto` needs all "
        "embedding experts in one space, because an index must not mix spaces.",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_steered_form(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("profile") is not None and "form" not in data:
            return {**data, "form": "steered"}
        return data

    @model_validator(mode="after")
    def _check_kind(self) -> ExpertConfig:
        # A variant of a remote expert has its base's endpoint, see `Config`.
        own_remote = self.remote is not None and not self.is_variant
        own = (self.model is not None, self.base is not None, own_remote, self.command is not None)
        if sum(own) != 1:
            raise ValueError(
                "needs exactly one of model, base (with adapter, profile, defaults or thinking), "
                "remote, command"
            )
        if self.profile is not None and (self.adapter is not None or self.base is None):
            raise ValueError("profile needs base, and no adapter")
        if (self.profile is None) != (self.form != "steered"):
            raise ValueError("form 'steered' requires `profile`, and `profile` requires this form")
        if self.base is None and self.adapter is not None:
            raise ValueError("adapter goes together with base")
        if self.is_variant and self.defaults is None and self.thinking is None:
            raise ValueError("base goes together with adapter, profile, defaults or thinking")
        if self.adapter is None and self.form == "merged":
            raise ValueError("form merged needs base and adapter")
        if self.form != "merged" and self.strength != 1.0:
            raise ValueError("strength needs form merged")
        if self.space is not None and "embeddings" not in self.capabilities:
            raise ValueError("space is for experts with the capability embeddings")
        if self.remote is not None and self.idle_unload_s is not None:
            raise ValueError("idle_unload_s is for experts in pools; a remote one holds no memory")
        if self.model is None and self.vllm != ExpertKernels():
            raise ValueError("vllm is for experts with full weights of their own (model)")
        self._check_thinking()
        return self

    def _check_thinking(self) -> None:
        if self.thinking is None:
            return
        if "chat" not in self.capabilities:
            raise ValueError("thinking is for experts with the capability chat")
        if self.defaults is None:
            return
        enabled = self.thinking.enabled
        for name in ("enable_thinking", "thinking"):
            said = (self.defaults.chat_template_kwargs or {}).get(name, enabled)
            if said is not enabled:
                raise ValueError(
                    f"defaults.chat_template_kwargs.{name} says {str(said).lower()}, and thinking "
                    f"says {str(enabled).lower()}; leave it out there"
                )
        effort = self.defaults.reasoning_effort
        if effort is not None and enabled is (effort == "none"):
            raise ValueError(
                f"defaults.reasoning_effort says {effort}, and thinking says "
                f"{str(enabled).lower()}; leave one of them out"
            )

    @property
    def is_variant(self) -> bool:
        """Whether it has no weights of its own: it is another way to ask its base."""
        return self.base is not None and self.adapter is None and self.profile is None
