"""The part of a stored list that is wanted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted.

    Attributes:
        limit: The most entries.
        after: The id after which it starts; None for the start.
        ascending: Whether the oldest come first.
    """

    limit: int
    after: str | None = None
    ascending: bool = False
