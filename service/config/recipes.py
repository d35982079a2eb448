"""Section `recipes`: ways to answer that ask several experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.base import Section
from service.types import MAX_LATER, Recipe


class RecipeConfig(Section):
    """A way to answer that asks several experts. Its name may be asked for like an expert's."""

    kind: Literal["cascade", "vote"] = Field(
        description="cascade: the members are asked together; where they agree, that is the "
        "answer, else those of `later` are asked in turn. vote: the answer that most members give."
    )
    members: tuple[str, ...] = Field(min_length=1, max_length=8, description="Experts.")
    later: tuple[str, ...] = Field(
        (), max_length=MAX_LATER, description="cascade: experts asked where members disagree."
    )
    sure: float = Field(
        0.0,
        ge=0,
        le=1,
        description="cascade of one member: its answer is taken where the geometric mean of its "
        "tokens' probabilities is at least this. 0: where it gives a final answer at all.",
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]; 0 where none is given, so that it "
        "is asked by name only.",
    )
    escalates: float = Field(
        0.5,
        ge=0,
        le=1,
        description="cascade: how often those of `later` are asked, until it has been measured.",
    )

    @model_validator(mode="after")
    def _possible(self) -> RecipeConfig:
        self.recipe()
        if self.sure and len(self.members) != 1:
            raise ValueError("sure is for a cascade of one member")
        return self

    def recipe(self) -> Recipe:
        """As the broker knows it. ValueError where it is none."""
        return Recipe(self.kind, self.members, self.later, self.sure)
