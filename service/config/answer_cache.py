"""Section `tenants.NAME.cache`: the answer cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.config.section_base import Bytes, Section

CacheMode = Literal["off", "exact", "similar"]


class CacheConfig(Section):
    """The answer cache, for this tenant's requests with the header `x-coe-cache`."""

    mode: CacheMode = Field(
        "off",
        description="Widest mode that the header x-coe-cache of a request may choose. exact: an "
        "identical request. similar: also a request whose last message differs only in "
        "courtesy, white space, final punctuation and the like.",
    )
    ttl_s: float = Field(3600.0, gt=0, le=2_592_000, description="Lifetime of an answer, in s.")
    max_entries: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Most answers of the tenant; a new answer replaces an old one.",
    )
    max_entry_bytes: Bytes = Field(
        65_536, ge=1, le=16 * 1024**2, description="Largest cached answer, in bytes."
    )
    threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="similar: least similarity in [0, 1] of the two last messages as written, as "
        "the cosine of hashed n-grams. It limits the courtesy around a question; the question "
        "itself must always be the same.",
    )
