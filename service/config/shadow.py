"""Section `shadow`: learning from traffic, of the tenants that opted in."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Bytes, Name, Section
from service.config.tenants import SpendConfig


class PromoteConfig(Section):
    """When a refitted router replaces the present one (`coe router refit`)."""

    min_rows: int = Field(
        100, ge=20, le=10_000_000, description="Least number of prompts to judge it on."
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Share of the bootstrap's samples in which it must be better.",
    )


class ShadowConfig(Section):
    """Shadow evaluation: other experts answer a share of the requests, too, and are compared.

    It is for tenants with `shadow: true`, and needs a budget.
    """

    budget: SpendConfig | None = Field(
        None,
        description="Most that shadow evaluation may spend, judges included. It is never passed. "
        "Required where a tenant opts in.",
    )
    share: float = Field(
        0.01, gt=0, le=1, description="Share of the requests for `auto` that are evaluated."
    )
    experts: tuple[Name, ...] | None = Field(
        None, description="Experts that are asked. Default: all that chat, but the judge."
    )
    judge: Name | None = Field(
        None,
        description="Expert that compares answers where final answers do not decide. Default: "
        "none, and such requests are not recorded.",
    )
    max_in_flight: int = Field(1, ge=1, le=1000, description="Requests evaluated at once.")
    max_queued: int = Field(
        64, ge=1, le=100_000, description="Requests that wait for it; more are left out."
    )
    max_answer_bytes: Bytes = Field(
        65_536, ge=1, le=16 * 1024**2, description="Longest reply that is kept for it, in bytes."
    )
    max_tokens: int = Field(
        1024, ge=1, description="Bound on an expert's answer where the client sets none, in tokens."
    )
    timeout_s: float = Field(300.0, ge=1, le=86_400, description="Longest wait for a call, in s.")
    swaps: bool = Field(
        False, description="Ask experts also where their weights have to be swapped in first."
    )
    retention_days: int = Field(
        30, ge=1, le=3650, description="Days after which outcomes are deleted."
    )
    folder: str | None = Field(
        None, description="Folder of the outcomes. Default: shadow-outcomes beside the admin key."
    )
    promote: PromoteConfig = Field(default_factory=lambda: PromoteConfig())
