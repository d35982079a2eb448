"""What happens to a slot in the property tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arrive:
    """A request comes for an expert, and asks for so many tokens."""

    expert: str
    tokens: int


@dataclass(frozen=True)
class Leave:
    """The client of one of the requests leaves."""

    which: int


@dataclass(frozen=True)
class Kill:
    """The engine dies."""


@dataclass(frozen=True)
class Turn:
    """The event loop runs so many times."""

    times: int
