"""Section `experts`: what can answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from service.config.base import Section
from service.config.moe_kernels import ExpertKernels


class RemoteConfig(Section):
    """A model behind somebody else's OpenAI-compatible API."""

    url: str = Field(
        pattern=r"^https?://[^\s]+$", description="Base URL, with the /v1 where it has one."
    )
    model: str = Field(description="The model's name there.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]{0,63}$",
        description="Environment variable that holds the key. Never the key itself.",
    )
    cache_salt: bool = Field(
        False,
        description="It takes vLLM's field cache_salt: send one of each tenant's own, so that "
        "tenants share no prefix there. A client's own is made the tenant's in any case.",
    )
    logprobs: bool = Field(
        False,
        description="Whether it tells the log probabilities of its tokens when asked to "
        "(`logprobs` of chat completions). A cascade with `sure` that begins with it needs them.",
    )
    max_in_flight: int = Field(64, ge=1, description="Requests under way at once; more wait.")
    max_queued_requests: int = Field(
        256,
        ge=0,
        description="Requests that may wait; more get 503. One counts for each of its answers, or "
        "for each 2,048 tokens of its prompt, whichever is more.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="Time to connect, in s.")
    stall_timeout_s: float = Field(
        300.0, gt=0, description="How long a stream that has begun may be silent, in s."
    )


class PriceConfig(Section):
    """What an expert's tokens cost, in a unit of your own: money, or computation."""

    prompt: float = Field(0.0, ge=0, le=1e6, description="Units per million prompt tokens.")
    completion: float = Field(
        0.0, ge=0, le=1e6, description="Units per million tokens of an answer."
    )


class MediaConfig(Section):
    """Prompt tokens that pictures, recordings and films take: by size, else the most it can be."""

    image_tokens: int = Field(
        4096,
        ge=1,
        le=1_000_000,
        description="Most tokens of one picture. Default: as the model folder tells, where the "
        "model's processor has a plain rule; else 4,096.",
    )
    image_edge: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Edge in pixels of the square that becomes one token, for models that count "
        "by area (Qwen2-VL: 28). Default: as the model folder tells; else every picture counts as "
        "`image_tokens`.",
    )
    audio_tokens: int = Field(4096, ge=1, le=1_000_000, description="Most tokens of one recording.")
    video_tokens: int = Field(16_384, ge=1, le=1_000_000, description="Most tokens of one film.")


Capability = Literal["chat", "completions", "embeddings", "tools", "json", "vision", "audio"]


class ExpertConfig(Section):
    """One named model: full weights (`model`), `base` with `adapter` or `profile`, or `remote`."""

    model: str | None = Field(
        None,
        description="Full weights: a name from `coe models list`, a folder (a path that begins "
        "with ./, ../, / or ~), or ORG/NAME of the hub, with @COMMIT to stay at one.",
    )
    base: str | None = Field(
        None, description="LoRA and virtual experts: the expert that has the base's full weights."
    )
    adapter: str | None = Field(None, description="LoRA: folder of the adapter.")
    profile: str | None = Field(
        None,
        description="Virtual expert: a steering profile, a file that changes which experts the "
        "gates of `base`, a mixture of experts, choose for a token. It has no weights of its own. "
        "GPU: not tested.",
    )
    remote: RemoteConfig | None = Field(None, description="A remote endpoint.")
    form: Literal["adapter", "merged", "steered"] = Field(
        "adapter",
        description="How an adapter is served. adapter: beside its base, in one batch with it. "
        "merged: added to the base's weights once, as full weights of the base's family; "
        "faster on CPU, and a swap away. steered: what `profile` makes it; it takes turns with "
        "its base.",
    )
    strength: float = Field(
        1.0, gt=0, le=4, description="merged: how much of the adapter is added."
    )
    pinned: bool = Field(
        False, description="Keep its weights in host memory, whatever else wants the room."
    )
    categories: tuple[str, ...] = Field(
        (), description="Categories that `auto` sends to this expert."
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]. Default: 1 on categories that it "
        "is the first to name, 0.5 elsewhere for the fallback, 0 elsewhere for others.",
    )
    vllm: ExpertKernels = Field(default_factory=lambda: ExpertKernels())
    price: PriceConfig | None = Field(None, description="What its tokens cost. Default: nothing.")
    description: str = Field("", description="One line for people, shown in /v1/models.")
    capabilities: tuple[Capability, ...] = Field(
        ("chat", "completions", "tools", "json"),
        description="What it can be asked for: chat, completions, embeddings, tools, json, vision "
        "(pictures and films), audio. Default: these, and vision and audio where the model folder "
        "has a part for them.",
    )
    media: MediaConfig = Field(default_factory=lambda: MediaConfig())
    space: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="embeddings: the name of the vector space that its vectors are in. `auto` "
        "goes to any expert of one space; where there are several spaces, or experts that name "
        "none, an index would mix them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_profile_steers(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("profile") is not None and "form" not in data:
            return {**data, "form": "steered"}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> ExpertConfig:
        kinds = [self.model is not None, self.base is not None, self.remote is not None]
        if sum(kinds) != 1:
            raise ValueError("exactly one of model, base (with adapter or profile), remote")
        if self.profile is not None and (self.adapter is not None or self.base is None):
            raise ValueError("profile needs base, and no adapter")
        if (self.profile is None) != (self.form != "steered"):
            raise ValueError("form steered is that of an expert with a profile, and no other's")
        if (self.base is None) != (self.adapter is None and self.profile is None):
            raise ValueError("base goes together with adapter or profile")
        if self.adapter is None and self.form == "merged":
            raise ValueError("form merged needs base and adapter")
        if self.form != "merged" and self.strength != 1.0:
            raise ValueError("strength needs form merged")
        if self.space is not None and "embeddings" not in self.capabilities:
            raise ValueError("space is for experts with the capability embeddings")
        if self.model is None and self.vllm != ExpertKernels():
            raise ValueError("vllm is for experts with full weights of their own (model)")
        return self
