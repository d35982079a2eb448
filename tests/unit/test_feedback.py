"""Whose vote counts for what, and how often."""

from __future__ import annotations

import asyncio

import pytest

from service.api.feedback import Feedback, Vote
from service.api.worth import Worth
from service.broker.book import Book
from service.config import Config, FeedbackConfig
from service.errors import Conflict
from service.store.memory import MemoryStore
from service.types import Tenant

ACME = Tenant("acme")
ID = "0" * 24


def feedback(store: MemoryStore, *experts: str) -> Feedback:
    """A gateway's, whose config names these experts."""
    config = Config.model_validate(
        {
            "experts": {name: {"model": "m", "categories": [name]} for name in experts},
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    book = Book(tuple(config.experts))
    worth = Worth(config, book, ("math",))
    return Feedback(FeedbackConfig(), store, worth, book, shared=True)


async def test_a_vote_counts_for_who_answered_however_recipes_are_numbered() -> None:
    store = MemoryStore()
    before, after = feedback(store, "math", "code"), feedback(store, "code", "art", "math")
    before.answered(ACME, (ID, ID), "math", 0)
    await asyncio.gather(*before._tasks)
    told = await after.vote(ACME, Vote(ID, 1.0))
    assert told["recipe"] == "math"
    assert told["category"] == "math"
    with pytest.raises(Conflict):
        await before.vote(ACME, Vote(ID, 1.0))


async def test_a_reply_has_one_vote_also_at_midnight() -> None:
    now_s = 86_400.0 * 20_000 - 1
    store = MemoryStore(lambda: now_s)
    given = feedback(store, "math")
    given.answered(ACME, (ID, "mine"), "math", 0)
    await given.vote(ACME, Vote("mine", 0.0))
    now_s += 2
    for reply in (ID, "mine"):
        with pytest.raises(Conflict):
            await given.vote(ACME, Vote(reply, 0.0))
    await asyncio.gather(*given._tasks)
