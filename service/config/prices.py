"""Section `prices`: the unit of cost, and the price of computation in it."""

from __future__ import annotations

from pydantic import Field, field_validator

from service.config.section_base import Section


class PricesConfig(Section):
    """The unit of cost, and the default price of local experts in it.

    The unit of all prices, budgets and bounds of cost is the same.
    """

    unit: str = Field(
        "compute",
        min_length=1,
        max_length=32,
        description="Name of the unit of cost, for people, such as EUR. Default: compute, one "
        "billion parameters applied to one million tokens.",
    )
    per_billion_parameters: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Price of a million tokens for each billion active parameters of a local "
        "expert. Default: 1; or 0 if an expert of the config has a `price`, because its unit is "
        "unknown.",
    )

    @field_validator("unit")
    @classmethod
    def _unit_is_shown(cls, unit: str) -> str:
        # Terminals, pages and charts show it.
        if not unit.isprintable() or unit != unit.strip():
            raise ValueError("should be printable text without spaces at its ends")
        return unit
