"""Section `tenants.NAME.guard`: screens for prompts, and their actions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.config.section_base import Section

PiiKind = Literal["email", "phone", "card", "iban", "ssn", "ip", "secret"]


class InjectionConfig(Section):
    """The screen for prompt injection."""

    action: Literal["off", "flag", "refuse"] = Field(
        "off", description="flag: report it in headers, metrics and /v1/route. refuse: 400."
    )
    threshold: float = Field(0.5, gt=0, le=1, description="Least score in [0, 1] for the action.")


class PiiConfig(Section):
    """The screen for personal data and secrets."""

    action: Literal["off", "flag", "redact", "refuse"] = Field(
        "off",
        description="flag: report it. redact: replace it by a mark, before the router sees the "
        "prompt. refuse: 400.",
    )
    kinds: tuple[PiiKind, ...] = Field(
        ("email", "phone", "card", "iban", "ssn", "ip", "secret"),
        description="Kinds of data to search for.",
    )


class GuardConfig(Section):
    """Screens in front of the router. All are off by default."""

    injection: InjectionConfig = Field(default_factory=lambda: InjectionConfig())
    pii: PiiConfig = Field(default_factory=lambda: PiiConfig())
    max_characters: int = Field(
        200_000,
        ge=1000,
        description="Longest prompt that is checked, in characters; a longer one is refused.",
    )

    @property
    def on(self) -> bool:
        """Whether any screen is on."""
        return self.injection.action != "off" or self.pii.action != "off"
