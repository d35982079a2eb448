"""What a screen is: text in, a score and findings out. A stronger one takes a shipped one's place.

class MyModel:
    name = "injection"

    async def look(self, texts: Sequence[Text]) -> Finding: ...

GatewayProcess(..., screens={"injection": MyModel()})
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
    """Where something was found: in which text, from which character to which, and what."""

    text: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a screen saw. `score` in [0, 1]; `kinds`: what led to it, never the text itself."""

    score: float
    kinds: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()


NOTHING = Finding(0.0)
# A prompt longer than this is looked through beside the loop, so that others go on.
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
