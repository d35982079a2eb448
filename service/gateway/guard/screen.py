"""The interface of screens: texts go in, a score and findings come out.

A screen of your own replaces a shipped one:

class MyModel:
    name = "injection"

    async def look(self, texts: Sequence[Text]) -> Finding: ...

GatewayRuntime(..., screens={"injection": MyModel()})
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """One piece of a prompt. `trusted`: the operator's own words (system, developer)."""

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A finding's place: the text's index, its first and last character, and its kind."""

    text: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A screen's result: a score in [0, 1], and the kinds of findings, never their text."""

    score: float
    kinds: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()


NOTHING = Finding(0.0)
# Longer prompts are screened in a thread, so that other requests go on.
_ASIDE_CHARACTERS = 20_000


async def aside(look: Callable[[Sequence[Text]], Finding], texts: Sequence[Text]) -> Finding:
    """A look that takes the processor, in a thread where it may take long."""
    if sum(len(one.text) for one in texts) <= _ASIDE_CHARACTERS:
        return look(texts)
    return await asyncio.to_thread(look, texts)


class Screen(Protocol):
    """Looks through a prompt's texts."""

    name: str

    async def look(self, texts: Sequence[Text]) -> Finding:
        """What is in there. Raises CoeError where it can't tell: the request is refused then."""
