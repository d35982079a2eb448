"""Section `recipes`: cascades and votes of several experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.config.section_base import Section
from service.types import MAX_LATER, Recipe


class RecipeConfig(Section):
    """A way to answer with several experts. Requests can name it like an expert."""

    kind: Literal["cascade", "vote"] = Field(
        description="cascade: all members answer; if they agree, this is the answer, else the "
        "experts of `later` answer in turn. vote: the answer that most members give."
    )
    members: tuple[str, ...] = Field(min_length=1, max_length=8, description="Experts.")
    later: tuple[str, ...] = Field(
        (),
        max_length=MAX_LATER,
        description="cascade: experts that answer if the members disagree.",
    )
    sure: float = Field(
        0.0,
        ge=0,
        le=1,
        description="cascade of one member: least geometric mean of its tokens' probabilities at "
        "which its answer is taken. 0: every final answer is taken.",
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]. Default: 0, so that only requests "
        "that name the recipe use it.",
    )
    escalates: float = Field(
        0.5,
        ge=0,
        le=1,
        description="cascade: assumed share of requests that go on to `later`, until measured.",
    )

    @model_validator(mode="after")
    def _check_recipe(self) -> RecipeConfig:
        self.recipe()
        if self.sure and len(self.members) != 1:
            raise ValueError("sure is for a cascade of one member")
        return self

    def recipe(self) -> Recipe:
        """Return the broker's form of the recipe.

        Raises:
            ValueError: The recipe is invalid.
        """
        return Recipe(self.kind, self.members, self.later, self.sure)
