"""Votes: what each one counts for, and how often a reply can have one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.recipe_catalog import RecipeCatalog
from service.config import Config, FeedbackConfig
from service.errors import ConflictError, ReplyNotFoundError, StoreUnavailableError
from service.gateway.routing.feedback_learning import FeedbackService, Vote
from service.gateway.routing.quality_model import QualityModel
from service.store.memory_store import MemoryStore
from service.store.record_names import join_name
from service.store.volatile_store import MemoryVolatileStore, VolatileStore
from service.types import Tenant

ACME = Tenant("acme")
ID = "0" * 24


@dataclass
class Gateway:
    """A gateway's feedback, and what it believes."""

    feedback: FeedbackService
    worth: QualityModel
    book: RecipeCatalog

    def quality(self, tenant: Tenant, label: str = "math") -> dict[str, float]:
        posterior = self.worth.posterior({label: 1.0})
        found, _ = self.worth.quality(posterior, None, tenant.name)
        return dict(zip(self.book.experts, found.tolist(), strict=True))


def gateway(
    store: MemoryStore, volatile: VolatileStore, *experts: str, shared: bool = True
) -> Gateway:
    """One whose config names these experts."""
    config = Config.model_validate(
        {
            "experts": {name: {"model": "m", "categories": [name]} for name in experts},
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    book = RecipeCatalog(tuple(config.experts))
    worth = QualityModel(config, book, ("math",))
    learned = FeedbackService(FeedbackConfig(), store, volatile, worth, book, shared=shared)
    return Gateway(learned, worth, book)


def stores() -> tuple[MemoryStore, MemoryVolatileStore]:
    return MemoryStore(), MemoryVolatileStore(10**6)


async def vote_often(at: Gateway, tenant: Tenant, score: float, count: int = 20) -> None:
    for i in range(count):
        reply = f"{i:024x}"
        at.feedback.record_answer(tenant, (reply, reply), "math", at.book.index["math"])
        await at.feedback.vote(tenant, Vote(reply, score))


async def test_vote_counts_for_the_recipe_that_answered_after_renumbering() -> None:
    kept = stores()
    before, after = gateway(*kept, "math", "code"), gateway(*kept, "code", "art", "math")
    before.feedback.record_answer(ACME, (ID, ID), "math", 0)
    await asyncio.gather(*before.feedback._tasks)
    answer = await after.feedback.vote(ACME, Vote(ID, 1.0))
    assert answer["recipe"] == "math"
    assert answer["category"] == "math"
    with pytest.raises(ConflictError):
        await before.feedback.vote(ACME, Vote(ID, 1.0))


async def test_vote_twice_under_any_of_a_reply_s_ids_raises_conflict() -> None:
    at = gateway(*stores(), "math").feedback
    at.record_answer(ACME, (ID, "mine"), "math", 0)
    await at.vote(ACME, Vote("mine", 0.0))
    for reply in (ID, "mine", f"chatcmpl-{ID}"):
        with pytest.raises(ConflictError):
            await at.vote(ACME, Vote(reply, 0.0))


@pytest.mark.parametrize("mine", ["order-507f1f77bcf86cd799439011", "a" * 24, "msg_" + "b" * 24])
async def test_vote_accepts_the_client_s_own_request_id(
    mine: str,
) -> None:
    at = gateway(*stores(), "math").feedback
    at.record_answer(ACME, (ID, mine), "math", 0)
    assert (await at.vote(ACME, Vote(mine, 1.0)))["recipe"] == "math"


async def test_vote_changes_quality_for_its_tenant_only() -> None:
    kept = stores()
    here, there = gateway(*kept, "math", "code"), gateway(*kept, "math", "code")
    mallory, keyless = Tenant("mallory", "k"), Tenant("default")
    before = here.quality(ACME)
    await vote_often(here, mallory, 0.0)
    assert here.quality(mallory)["math"] == pytest.approx(before["math"] - 0.8)
    for other in (ACME, keyless, Tenant("mallory/x"), Tenant("")):
        assert here.quality(other) == before
    # And at another gateway as well, for the tenant alone.
    await there.feedback.refresh(["mallory", "acme"])
    assert there.quality(mallory) == here.quality(mallory)
    assert there.quality(ACME) == before


async def test_vote_on_a_reply_of_a_tenant_with_a_common_prefix_raises() -> None:
    at = gateway(*stores(), "math").feedback
    at.record_answer(Tenant("acme/dev"), (ID, "x"), "math", 0)
    for tenant, reply in ((ACME, f"dev/{ID}"), (ACME, "dev/x"), (ACME, ID), (Tenant("acme/"), ID)):
        with pytest.raises(ReplyNotFoundError):
            await at.vote(tenant, Vote(reply, 0.0))


async def test_vote_of_one_key_does_not_outweigh_the_tenant_s_other_keys() -> None:
    at = gateway(*stores(), "math", "code")
    await vote_often(at, Tenant("acme", "honest"), 1.0, 20)
    for i in range(20, 420):
        reply = f"{i:024x}"
        at.feedback.record_answer(ACME, (reply, reply), "math", at.book.index["math"])
        await at.feedback.vote(Tenant("acme", "leaked"), Vote(reply, 0.0))
    assert at.quality(ACME)["math"] > 0.5


@given(st.lists(st.text(max_size=12), max_size=4), st.lists(st.text(max_size=12), max_size=4))
def test_place_of_different_parts_differs(one: list[str], other: list[str]) -> None:
    if one and other:
        assert (join_name(*one) == join_name(*other)) == (one == other)


async def test_vote_during_a_store_outage_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, volatile = stores()
    at = gateway(store, volatile, "math")

    async def gone(names: object) -> None:
        raise StoreUnavailableError("the store is gone")

    at.feedback.record_answer(ACME, (ID, ID), "math", 0)
    with monkeypatch.context() as patch:
        patch.setattr(store, "counts", gone)
        assert (await at.feedback.vote(ACME, Vote(ID, 0.0)))["score"] == 0.0
    await at.feedback.refresh(["acme"])
    assert at.quality(ACME)["math"] < 1.0
