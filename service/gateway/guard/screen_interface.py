"""The interface of screens. A screen gets texts, and returns a score and findings.

A custom screen can replace a built-in screen:

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
    """A text of a prompt.

    Attributes:
        text: The text.
        trusted: Whether the application's developer wrote it, as a system or developer message.
    """

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Span:
    """The place of a finding.

    Attributes:
        text: Index of the text among the screened texts.
        start: Index of the first character.
        end: Index after the last character.
        kind: The kind of the finding.
    """

    text: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a screen. It contains no text of the prompt.

    Attributes:
        score: The score in [0, 1].
        kinds: The kinds of the findings.
        spans: The places of the findings, for redaction.
    """

    score: float
    kinds: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()


NOTHING = Finding(0.0)
# Longer prompts are screened in a thread, so that they do not delay other requests.
_ASIDE_CHARACTERS = 20_000


async def aside(look: Callable[[Sequence[Text]], Finding], texts: Sequence[Text]) -> Finding:
    """Call a synchronous screen, in a thread if the texts are long.

    Args:
        look: The function that screens the texts.
        texts: The texts of a prompt.
    """
    if sum(len(text.text) for text in texts) <= _ASIDE_CHARACTERS:
        return look(texts)
    return await asyncio.to_thread(look, texts)


class Screen(Protocol):
    """Screens the texts of a prompt."""

    name: str

    async def look(self, texts: Sequence[Text]) -> Finding:
        """Screen the texts of a prompt.

        Raises:
            CoeError: The screen failed. The request is then refused.
        """
