"""Section `feedback`: what clients say of answers, and how much it counts."""

from __future__ import annotations

from pydantic import Field

from service.config.base import Section


class FeedbackConfig(Section):
    """What `/v1/feedback` does to what experts are believed to be worth."""

    enabled: bool = Field(True, description="Learn from feedback. Off: the endpoint answers 404.")
    votes: int = Field(
        20,
        ge=1,
        le=100_000,
        description="How many votes of a tenant on a category turn what is believed of a recipe "
        "there, for that tenant: after so many that all say otherwise, four fifths of it is "
        "theirs. No key counts as more votes than that against its tenant's other keys.",
    )
    max_shift: float = Field(
        0.8, gt=0, le=1, description="Most that votes may shift an expected quality, in [0, 1]."
    )
    half_life_s: float = Field(
        7 * 86_400.0, ge=60, description="Time after which a vote counts half, in s."
    )
    keep_s: int = Field(
        3600, ge=1, le=604_800, description="How long a reply can be voted on, in s."
    )
