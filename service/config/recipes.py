"""Section `recipes`: ways to answer with several experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from service.config.recipe_prompts import (
    AGGREGATE,
    AGGREGATE_PLACEHOLDERS,
    REVIEW,
    REVIEW_PLACEHOLDERS,
    REVISE,
    REVISE_PLACEHOLDERS,
    Template,
    check_template,
)
from service.config.section_base import Section
from service.types import MAX_LATER, MAX_ROUNDS, Deliberation, Recipe, Recruitment

MAX_MEMBERS = 8
# The word for the expert with the greatest expected quality for the prompt.
BEST = "best"


class DeliberationConfig(Section):
    """How the members of a deliberation review each other's answers."""

    rounds: int = Field(
        2,
        ge=1,
        le=MAX_ROUNDS,
        description="Most rounds of answers and reviews. From the second on, the members see the "
        "best answer so far and what reviewers want corrected.",
    )
    votes: float = Field(
        16.0,
        gt=0,
        le=1e6,
        description="What a reviewer may spend in a round: v votes for or against an answer cost "
        "v squared.",
    )
    gain: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of wrong answers that another round puts right, before any was held; "
        "each gateway then learns it from the rounds of the recipe. A round whose gain is worth "
        "less than its cost and waiting is not held.",
    )
    review_tokens: int = Field(512, ge=16, le=8192, description="Most tokens of a review.")
    review: Template = Field(
        REVIEW,
        description="Template of the prompt for reviewers, with {question} and {answers}. It has "
        "to ask for lines such as `Answer 1: 7`, or for JSON with `answer` and `score`; scores are "
        "from 0 to 10.",
    )
    revise: Template = Field(
        REVISE,
        description="Template of what members are told from the second round on, with {answer} "
        "and {corrections}. It is added to the client's last message.",
    )

    @field_validator("review")
    @classmethod
    def _check_review(cls, value: str) -> str:
        check_template("review", value, REVIEW_PLACEHOLDERS)
        return value

    @field_validator("revise")
    @classmethod
    def _check_revise(cls, value: str) -> str:
        check_template("revise", value, REVISE_PLACEHOLDERS)
        return value


class RecruitmentConfig(Section):
    """Which experts are recruited for a prompt, and who makes one answer of theirs."""

    k: int = Field(3, ge=2, le=MAX_MEMBERS, description="How many experts answer.")
    among: tuple[str, ...] = Field(
        min_length=2, max_length=64, description="The experts to choose from."
    )
    aggregator: str = Field(
        BEST,
        description="The expert that makes one answer of theirs; `best` takes the one of `among` "
        "with the greatest expected quality for the prompt.",
    )
    prompt: Template = Field(
        AGGREGATE,
        description="Template of what the aggregator is told, with {answers}. It is added to the "
        "client's last message.",
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str) -> str:
        check_template("prompt", value, AGGREGATE_PLACEHOLDERS)
        return value

    @model_validator(mode="after")
    def _check_k(self) -> RecruitmentConfig:
        if self.k > len(self.among):
            raise ValueError(f"k: {self.k} experts of {len(self.among)} in among")
        return self


class RecipeConfig(Section):
    """A way to answer with several experts. Requests can name it like an expert."""

    kind: Literal["cascade", "vote", "deliberate", "recruit"] = Field(
        description="cascade: all members answer; if they agree, this is the answer, else the "
        "experts of `later` answer in turn. vote: the answer that most members give. deliberate: "
        "all members answer, review each other's answers, and vote. recruit: the best experts for "
        "the prompt answer, and an aggregator makes one answer of theirs."
    )
    members: tuple[str, ...] = Field(
        (), max_length=MAX_MEMBERS, description="Experts; recruit has those of `recruit.among`."
    )
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
    deliberate: DeliberationConfig | None = Field(
        None, description="deliberate: how the members review each other."
    )
    recruit: RecruitmentConfig | None = Field(
        None, description="recruit: which experts are chosen for a prompt."
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="Expected quality by category, in [0, 1]. Default: 0, so that only requests "
        "that name the recipe use it. recruit without it: the quality of the best expert that it "
        "may recruit.",
    )
    escalates: float = Field(
        0.5,
        ge=0,
        le=1,
        description="cascade: assumed share of requests that go on to `later`, until measured. "
        "deliberate: assumed share of rounds that another one follows.",
    )

    @model_validator(mode="after")
    def _check_recipe(self) -> RecipeConfig:
        for kind in ("deliberate", "recruit"):
            if self.kind != kind and getattr(self, kind) is not None:
                raise ValueError(f"{kind}: is for recipes of this kind, not for a {self.kind}")
        if self.kind == "recruit" and self.recruit is None:
            raise ValueError("recruit: is needed, with the experts to choose from in `among`")
        if self.kind == "recruit" and self.members:
            raise ValueError("members: a recruit has none; its experts are those of recruit.among")
        if self.kind == "deliberate" and len(self.members) < 3:
            raise ValueError(
                f"members: a deliberation needs at least 3, it has {len(self.members)}; of 2, each "
                "one's vote would decide against the other"
            )
        self.recipe()
        if self.sure and len(self.members) != 1:
            raise ValueError("sure is for a cascade of one member")
        return self

    def recipe(self) -> Recipe:
        """Return the broker's form of the recipe.

        Raises:
            ValueError: The recipe is invalid.
        """
        deliberation = recruitment = None
        members = self.members
        if self.kind == "deliberate":
            given = self.deliberate or DeliberationConfig()
            deliberation = Deliberation(
                given.rounds,
                given.votes,
                given.gain,
                given.review_tokens,
                given.review,
                given.revise,
            )
        elif self.recruit is not None:
            members = self.recruit.among
            aggregator = self.recruit.aggregator
            recruitment = Recruitment(
                self.recruit.k, None if aggregator == BEST else aggregator, self.recruit.prompt
            )
        return Recipe(self.kind, members, self.later, self.sure, deliberation, recruitment)
