"""Section `router.sessions`: conversations stay with an expert while that is worth it."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section


class SessionsConfig(Section):
    """How `auto` treats the turns of one conversation."""

    enabled: bool = Field(
        True,
        description="Whether `auto` knows conversations: a tool's result goes back to the expert "
        "that called the tool, and other turns change the expert only for a gain.",
    )
    handover_cost: float = Field(
        0.035,
        ge=0,
        le=1,
        description="Quality by which another expert has to be better to take over a "
        "conversation, beside the prefix that it has to compute again.",
    )
    topic_persistence: float = Field(
        0.5,
        ge=0,
        le=0.99,
        description="How much the earlier turns of a conversation tell of the next one's category, "
        "as the probability that the category stays. 0: each turn is classified by its text alone.",
    )
    max_age_s: int = Field(
        3600, ge=1, le=604_800, description="A session is forgotten so long after its last turn."
    )
    max_sessions: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Sessions of one tenant that a gateway remembers; the oldest are forgotten.",
    )
    max_wait_ms: int = Field(
        5,
        ge=0,
        le=1000,
        description="Time that a request waits for `store.cache_url` to tell a session that "
        "another gateway knows. Then it is routed without a session.",
    )
