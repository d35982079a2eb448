"""Section `tenants.NAME.guard`: what is looked for in prompts, and what is done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.config.base import Section

PiiKind = Literal["email", "phone", "card", "iban", "ssn", "ip", "secret"]


class InjectionConfig(Section):
    """The screen for prompts that try to take an expert's instructions from it."""

    action: Literal["off", "flag", "refuse"] = Field(
        "off", description="flag: tell it in headers, metrics and /v1/route. refuse: 400."
    )
    threshold: float = Field(
        0.5, gt=0, le=1, description="Score in [0, 1] from which on something is done."
    )


class PiiConfig(Section):
    """The screen for personal data and secrets."""

    action: Literal["off", "flag", "redact", "refuse"] = Field(
        "off",
        description="flag: tell it. redact: put a mark in its place, before the router sees it. "
        "refuse: 400.",
    )
    kinds: tuple[PiiKind, ...] = Field(
        ("email", "phone", "card", "iban", "ssn", "ip", "secret"), description="What is looked for."
    )


class GuardConfig(Section):
    """Screens in front of the router. Off unless asked for."""

    injection: InjectionConfig = Field(default_factory=lambda: InjectionConfig())
    pii: PiiConfig = Field(default_factory=lambda: PiiConfig())
    max_characters: int = Field(
        200_000,
        ge=1000,
        description="Text that is looked through, in characters; a longer prompt is refused.",
    )

    @property
    def on(self) -> bool:
        """Whether anything is looked for."""
        return self.injection.action != "off" or self.pii.action != "off"
