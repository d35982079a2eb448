"""Section `server`: the address, and the requests that are accepted."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from service.config.autoscaling import GatewaysConfig
from service.config.circuit_breaker import BreakerConfig
from service.config.request_limits import RequestLimits
from service.config.section_base import Bytes, Section, shown

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


# The other fields of a request with a recording.
_AROUND_AUDIO_BYTES = 128 * 1024


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

    @property
    def most_inner_bytes(self) -> int:
        """The largest body between gateways and pools, where recordings are in base64."""
        audio = 4 * -(-self.limits.max_audio_bytes // 3) + _AROUND_AUDIO_BYTES
        return max(self.max_body_bytes, audio)

    @model_validator(mode="after")
    def _check_keys(self) -> ServerConfig:
        if self.allow_unauthenticated and self.require_keys:
            raise ValueError("allow_unauthenticated and require_keys exclude each other")
        return self
