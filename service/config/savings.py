"""Section `savings`: what is compared with the router's choices."""

from __future__ import annotations

from pydantic import Field, field_validator

from service.config.section_base import Name, Section


class SavingsConfig(Section):
    """The savings ledger: what the router saved against always asking the same expert."""

    against: tuple[Name, ...] | None = Field(
        None,
        max_length=4,
        description="Experts or recipes to compare with, at most 4. Default: the one with the best "
        "quality over all categories. An empty list switches the ledger off.",
    )

    @field_validator("against")
    @classmethod
    def _check_distinct(cls, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if given is not None and len(set(given)) != len(given):
            raise ValueError("names an expert or recipe twice")
        return given
