"""Prompts of several kinds and lengths. All differ, and every run has the same."""

from __future__ import annotations

import random

_NAMES = ("Ada", "Ben", "Chloe", "Dara", "Emil", "Fatou", "Goran", "Hana")
_THINGS = ("apples", "books", "tickets", "stamps", "bottles", "candles", "marbles")
_SHAPES = (
    "{name} has {a} {thing} and buys {b} more every week. How many {thing} does {name} have "
    "after {c} weeks?",
    "please set an alarm for {a}:{b:02d} and remind me about the {thing}",
    "Write a Python function that takes a list of {thing} and returns the {a} largest, sorted.",
    "Tell me something about {thing} that {name} would not know, in {c} sentences.",
    "what is my account balance after paying {a} for {thing}",
    "Explain to {name} why {thing} cost {a} in one town and {b} in the next.",
)
_FILLER = (
    "{name} kept the {thing} on shelf {a}, next to box {b}, for {c} days in all, and wrote it down."
)


def prompts(count: int, *, seed: int, characters: int = 0) -> list[str]:
    """`count` prompts, each at least `characters` long."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        text = _filled(_SHAPES[i % len(_SHAPES)], chance)
        context: list[str] = []
        while len(text) + sum(map(len, context)) < characters:
            context.append(_filled(_FILLER, chance) + " ")
        made.append("".join(context) + text)
    return made


def _filled(shape: str, chance: random.Random) -> str:
    return shape.format(
        name=chance.choice(_NAMES),
        thing=chance.choice(_THINGS),
        a=chance.randint(2, 997),
        b=chance.randint(2, 59),
        c=chance.randint(2, 9),
    )
