"""The sessions that one gateway remembers, bounded in number and age for each tenant. Pure.

A session is a list of turns. Several conversations may have the same session, such as agents that
work for one another under one id. So each turn keeps what it answered, and `last_turn` finds the
one that a request goes on from. No prompt is kept, only digests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from service.broker.pool_state import BootId
from service.classifier.topic_filter import MAX_TOPICS, Topics
from service.gateway.request.conversation_turns import TurnState

MAX_TURNS = 8
MAX_CALLS = 64
# Values of a turn in a store, without its topics.
_PARTS = 8


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """One answered turn of a session.

    Attributes:
        digest: Digest of the messages that were answered.
        expert: The expert that answered.
        recipe: Name of the recipe that answered.
        category: The category of the prompt.
        boot: The pool that answered.
        tokens: Estimated tokens of the prompt.
        at_s: When it was answered, in seconds since 1970.
        calls: Digests of the ids of the tool calls in the answer.
        topics: What the conversation is about up to this turn; empty if nothing was classified.
    """

    digest: str
    expert: str
    recipe: str
    category: str
    boot: BootId
    tokens: int
    at_s: float
    calls: tuple[str, ...] = ()
    topics: Topics = ()

    def to_json(self) -> list[Any]:
        """As in a store."""
        fields = (self.digest, self.expert, self.recipe, self.category, self.boot, self.tokens)
        return [*fields, self.at_s, list(self.calls), self.topics]

    @classmethod
    def from_json(cls, given: list[Any]) -> SessionTurn:
        """Parse from a store. Raises ValueError or TypeError."""
        *names, boot, tokens, at_s, calls = given[:_PARTS]
        # Gateways of an earlier version write no topics.
        topics = tuple((str(name), float(p)) for name, p in (given[_PARTS:] or [[]])[0])
        digest, expert, recipe, category = map(str, names)
        where = None if boot is None else str(boot)
        found = tuple(map(str, calls[:MAX_CALLS]))
        if not all(0 <= p <= 1 for _, p in topics):
            raise ValueError("a topic's probability must be 0..1")
        return cls(
            digest,
            expert,
            recipe,
            category,
            where,
            int(tokens),
            float(at_s),
            found,
            topics[:MAX_TOPICS],
        )


Turns = tuple[SessionTurn, ...]


def merged(*several: Iterable[SessionTurn]) -> Turns:
    """The newest turns of several lists, newest first, each conversation's once."""
    ordered = sorted((turn for turns in several for turn in turns), key=lambda turn: -turn.at_s)
    newest: dict[str, SessionTurn] = {}
    for turn in ordered:
        newest.setdefault(turn.digest, turn)
    return tuple(newest.values())[:MAX_TURNS]


def last_turn(turns: Turns, state: TurnState) -> tuple[SessionTurn | None, bool]:
    """Find the turn that a request goes on from.

    Args:
        turns: The session's turns, newest first.
        state: Where the request's conversation stands.

    Returns:
        The turn, and whether it is certain. Without a certain one it is the newest turn.
    """
    calling = [turn for turn in turns if not state.calls.isdisjoint(turn.calls)]
    if calling:
        # Some models number their calls, so that two turns may have the same id.
        exact = [turn for turn in calling if turn.digest == state.history]
        return (exact or calling)[0], True
    for turn in turns:
        if turn.digest == state.history:
            # Two conversations that began alike have one digest, but not the same calls.
            return turn, not state.calls
    return (turns[0] if turns else None), False


def to_value(turns: Turns) -> bytes:
    """A session as the value in a store."""
    return orjson.dumps([turn.to_json() for turn in turns])


def from_value(value: bytes | None) -> Turns:
    """Parse a session from a store; empty if it isn't there, or if its form is another one."""
    if value is None:
        return ()
    try:
        return tuple(SessionTurn.from_json(given) for given in orjson.loads(value)[:MAX_TURNS])
    except (ValueError, TypeError):
        return ()


class SessionMemory:
    """The sessions of one gateway, by tenant and digest of the session's name."""

    def __init__(self) -> None:
        self._tenants: dict[str, OrderedDict[str, Turns]] = {}
        # Of all tenants, in the order of their last turns.
        self._last_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last_s)

    def get(self, tenant: str, name: str, *, since_s: float) -> Turns:
        """The turns of a session since then, newest first."""
        sessions = self._tenants.get(tenant)
        held = () if sessions is None else sessions.get(name, ())
        return tuple(turn for turn in held if turn.at_s >= since_s)

    def put(
        self, tenant: str, name: str, turns: Turns, *, since_s: float, max_sessions: int
    ) -> list[tuple[str, str]]:
        """Keep a session's turns, newest first.

        Args:
            tenant: The tenant.
            name: Digest of the session's name.
            turns: Its turns; there is at least one.
            since_s: Sessions without a turn since then are forgotten, of any tenant.
            max_sessions: The tenant's sessions that may be kept.

        Returns:
            The tenant's sessions that were forgotten to keep `max_sessions`.
        """
        held = self._tenants.setdefault(tenant, OrderedDict())
        held[name] = turns
        held.move_to_end(name)
        self._last_s[tenant, name] = turns[0].at_s
        self._last_s.move_to_end((tenant, name))
        while self._last_s:
            oldest = next(iter(self._last_s))
            if self._last_s[oldest] >= since_s:
                break
            self._drop(*oldest)
        dropped = []
        while len(held) > max_sessions:
            other = next(iter(held))
            self._drop(tenant, other)
            dropped.append((tenant, other))
        return dropped

    def discard(self, tenant: str, name: str) -> bool:
        """Forget a session; return whether it was there."""
        there = (tenant, name) in self._last_s
        if there:
            self._drop(tenant, name)
        return there

    def _drop(self, tenant: str, name: str) -> None:
        del self._last_s[tenant, name]
        held = self._tenants[tenant]
        del held[name]
        if not held:
            del self._tenants[tenant]
