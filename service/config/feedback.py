"""Section `feedback`: learning from clients' votes."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section


class FeedbackConfig(Section):
    """How votes at `/v1/feedback` change the expected quality of recipes."""

    enabled: bool = Field(True, description="Learn from feedback. Off: the endpoint answers 404.")
    votes: int = Field(
        20,
        ge=1,
        le=100_000,
        description="Votes of a tenant on a category that overrule the expected quality of a "
        "recipe there, for that tenant: after so many opposite votes their weight is four fifths. "
        "A single key has at most this many votes against its tenant's other keys.",
    )
    max_shift: float = Field(
        0.8, gt=0, le=1, description="Most that votes may shift an expected quality, in [0, 1]."
    )
    half_life_s: float = Field(
        7 * 86_400.0, ge=60, description="Time after which a vote counts half, in s."
    )
    keep_s: int = Field(
        3600, ge=1, le=604_800, description="Time in which a reply can be voted on, in s."
    )
