"""Finds what a model's name stands for, and shares an alias's requests among its targets. Pure.

Targets are drawn by weighted rendezvous hashing: each target gets a number in (0, 1) from the
session's name and its own, and the greatest -weight / ln(number) wins (Schindelhauer and Schomaker,
"Weighted Distributed Hash Tables", SPAA 2005). So a session keeps its target as long as it exists.
When a weight grows, sessions move only to that target; when a target is left out, only its own
sessions move.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from service.config.aliases import ResolvedAlias

# No alias and no expert has a longer name.
_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class AliasChoice:
    """What a name stands for in one request.

    Attributes:
        alias: The alias of the config; for a pattern the pattern, not the name that was asked.
        target: The expert, recipe or name of `auto` that answers.
        shared_by: The alias whose weights chose the target; None where there was no choice.
    """

    alias: str
    target: str
    shared_by: str | None = None

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The header of the reply."""
        return b"x-coe-alias", f"{self.alias}; target={self.target}".encode()


class AliasTable:
    """The aliases of one config.

    Args:
        aliases: Every alias, see `resolve_aliases`.
        taken: Names of experts and recipes, which stand for themselves; so do `auto` and its forms.
    """

    def __init__(self, aliases: Mapping[str, ResolvedAlias], taken: Collection[str]) -> None:
        self._exact = {name: alias for name, alias in aliases.items() if "*" not in name}
        patterns = [name for name in aliases if "*" in name]
        # `sorted` keeps the config's order among patterns of one length.
        self._patterns = [(name, aliases[name]) for name in sorted(patterns, key=len, reverse=True)]
        self._taken = frozenset(taken)

    @property
    def exact(self) -> Mapping[str, ResolvedAlias]:
        """The aliases without `*`."""
        return self._exact

    def find(self, name: str) -> tuple[str, ResolvedAlias] | None:
        """Return the alias that a name means; None where the name is no alias."""
        if (found := self._exact.get(name)) is not None:
            return name, found
        if not self._patterns or len(name) > _MAX_NAME or name in self._taken or is_auto(name):
            return None
        return next((pair for pair in self._patterns if matches(pair[0], name)), None)


def is_auto(name: str) -> bool:
    """Whether a name is `auto` or one of its forms, which no alias can take."""
    return name == "auto" or name.startswith(("auto/", "auto:"))


def matches(pattern: str, name: str) -> bool:
    """Return whether a name matches a pattern, in which `*` stands for any characters, or none."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    *middle, last = rest
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        # The earliest place leaves the most room for the parts behind it.
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def draw_target(weights: Mapping[str, float], *seed: str) -> str:
    """Draw one of several targets by their weights.

    Args:
        weights: Weight of each target; targets of weight 0 are drawn only where all have it.
        seed: The same seed draws the same target.

    Raises:
        ValueError: There are no targets.
    """
    return max(weights, key=lambda target: (_score(weights[target], (*seed, target)), target))


def _score(weight: float, texts: tuple[str, ...]) -> float:
    if weight <= 0:
        return 0.0
    hashed = hashlib.blake2b(digest_size=8)
    hashed.update("".join(f"{len(text)}:{text}" for text in texts).encode(errors="surrogatepass"))
    number = (int.from_bytes(hashed.digest()) + 0.5) / 2**64
    return -weight / math.log(number) if number < 1.0 else math.inf


def weights_for(
    alias: ResolvedAlias, may_ask: Callable[[str], bool], left_out: Collection[str] = ()
) -> dict[str, float]:
    """The targets that a request may be sent to, with their weights.

    Args:
        alias: The alias.
        may_ask: Whether the request's key may use a target.
        left_out: Targets that were rolled back. A key that may use no other target keeps them.

    Returns:
        The weights; empty where the key may use none of the targets.
    """
    allowed = {target: weight for target, weight in alias.targets.items() if may_ask(target)}
    kept = {target: weight for target, weight in allowed.items() if target not in left_out}
    given = kept if any(kept.values()) else allowed
    return {target: weight for target, weight in given.items() if weight > 0}
