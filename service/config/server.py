"""Sections `server` and `router`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from service.config.autoscaling import GatewaysConfig
from service.config.circuit_breaker import BreakerConfig
from service.config.request_limits import RequestLimits
from service.config.router_presets import PresetsConfig
from service.config.section_base import Bytes, Section, shown
from service.config.sessions import SessionsConfig

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_HOST_NAME = re.compile(r"^(\*|(\*\.)?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*)$")
_ORIGIN = re.compile(
    r"^(\*|null|[A-Za-z][A-Za-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?)$"
)


def _host_name(given: str) -> str:
    if not _HOST_NAME.match(given):
        raise ValueError(
            "input should be a host name without a port, such as api.example.com, or "
            f"*.example.com for every name below it, or *, not {shown(given)}"
        )
    return given


def _origin(given: str) -> str:
    if not _ORIGIN.match(given):
        raise ValueError(
            "input should be an origin, such as https://chat.example.com:8443 (no path and no "
            f"slash at the end), null, or *, not {shown(given)}"
        )
    return given


HostName = Annotated[str, AfterValidator(_host_name)]
Origin = Annotated[str, AfterValidator(_origin)]


class ServerConfig(Section):
    """The HTTP server: its address, and the requests that it accepts."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    allow_unauthenticated: bool = Field(
        False,
        description="Listen on `host` even without API keys, and answer every client. Default: "
        "without API keys the service listens on loopback only.",
    )
    require_keys: bool = Field(
        False,
        description="Require API keys even before the first one exists. Default: keys are required "
        "once there was one, and on every `host` but loopback unless `allow_unauthenticated` is "
        "set.",
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        (),
        description="Allowed names in a request's `Host`: `api.example.com`, `*.example.com`, or "
        "`*` for all. IP addresses, names without a dot and names under `.localhost`, `.local`, "
        "`.internal`, `.home.arpa`, `.lan` and `.svc` are always allowed. While no API key is "
        "required, other names get 403, against DNS rebinding. Once keys are required, they get "
        "403 only if this is set.",
    )
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins of web pages that may send requests and read answers (CORS), such as "
        "`https://chat.example.com` or `app://obsidian.md`. `*`: every origin, once API keys are "
        "required. While none is required, requests from pages of other origins get 403.",
    )
    gateways: GatewaysConfig = Field(default_factory=lambda: GatewaysConfig())
    max_body_bytes: Bytes = Field(
        8 * 1024**2, description="Largest request body accepted, in bytes; more gets 413."
    )
    deadline_ms: int = Field(
        120_000,
        ge=1,
        description="Default deadline of a request in ms: until the first token of a stream, or "
        "the end of another answer. The header x-coe-deadline-ms overrides it.",
    )
    drain_s: float = Field(
        30.0, ge=0, description="Time in which running requests may finish at a stop, in s."
    )
    access_log: bool = Field(
        False,
        description="Log one line per request: id, path, status, tenant, key id, expert, ms. "
        "Never prompts.",
    )
    breaker: BreakerConfig = Field(default_factory=lambda: BreakerConfig())
    limits: RequestLimits = Field(default_factory=lambda: RequestLimits())

    @model_validator(mode="after")
    def _check_keys(self) -> ServerConfig:
        if self.allow_unauthenticated and self.require_keys:
            raise ValueError("allow_unauthenticated and require_keys exclude each other")
        return self


class EncoderConfig(Section):
    """The sentence encoder that is asked where the first stage is unsure."""

    model: str = Field(
        "all-minilm-l6-v2",
        description="A sentence encoder as ONNX: `all-minilm-l6-v2` of the built-in catalogue, a "
        "folder, or a model that `coe models pull` has fetched from the hub.",
    )
    when_below: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Ask it where the confidence of the first stage is below this, and where the "
        "prompt is new to it. 1 asks for every prompt.",
    )
    threads: int = Field(1, ge=1, le=64, description="Threads of one batch.")
    max_tokens: int = Field(
        128, ge=8, le=512, description="Tokens of a prompt that it reads, half from either end."
    )
    cache_entries: int = Field(
        10_000,
        ge=0,
        le=1_000_000,
        description="Vectors of recent prompts that each gateway keeps, of 1.5 KB each. They are "
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
        "`general@1` sorts prompts into 26 everyday categories, unless there are `categories` with "
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
