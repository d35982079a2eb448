"""Section `tenants.NAME.cache`: answers kept for requests that ask for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.config.base import Bytes, Section

CacheMode = Literal["off", "exact", "semantic"]


class CacheConfig(Section):
    """Answers kept in the store, for this tenant's requests that say so (`x-coe-cache`)."""

    mode: CacheMode = Field(
        "off",
        description="The most that a request may ask for with the header x-coe-cache. exact: the "
        "same request again. semantic: also one whose last message is the same but for "
        "courtesy, white space, the mark at its end and the like.",
    )
    ttl_s: float = Field(
        3600.0, gt=0, le=2_592_000, description="How long an answer is kept, in s."
    )
    max_entries: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Answers kept for the tenant; a new one takes an old one's place.",
    )
    max_entry_bytes: Bytes = Field(
        65_536, ge=1, le=16 * 1024**2, description="Largest answer kept, in bytes."
    )
    threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="semantic: least likeness in [0, 1] of the two last messages as they were "
        "written, as the cosine of hashed n-grams. It bounds how much courtesy may stand around "
        "a question; the question itself has to be the same in any case.",
    )
