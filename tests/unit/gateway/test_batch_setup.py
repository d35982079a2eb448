"""Batches of a gateway whose config is replaced meanwhile."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from service.broker.model_aliases import AliasChoice
from service.broker.pool_state import PoolView
from service.config import Config
from service.gateway.batch_setup import CurrentGateway
from service.gateway.request.parsing import parse_request
from service.gateway.routing.alias_resolution import AliasResolution
from service.rpc.snapshot import ExpertState, Snapshot
from service.types import NOBODY, Residency, Tenant


def gateway(**members: tuple[str, ...]) -> Any:
    """A gateway whose one pool has two places."""
    states = {"warm": ExpertState(Residency.DEVICE)}
    snapshot = Snapshot("boot", "cpu", experts=states, capacity={"warm": 2})
    view = PoolView("boot", snapshot, 0.0, {})
    return SimpleNamespace(
        dispatcher=SimpleNamespace(views=lambda: [view]),
        batch_members=dict(members),
        config=SimpleNamespace(experts={"warm": None, "other": None}),
    )


async def test_line_that_waits_for_its_turn_during_a_reload_gets_it() -> None:
    gateways = [gateway(recipe=("warm",)), gateway(recipe=("warm", "other"))]
    batches = CurrentGateway(lambda: gateways[0], 16)
    for _ in range(2):
        assert await batches.turn(["recipe"]) == "recipe"
    waiting = asyncio.create_task(batches.turn(["recipe"]))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    del gateways[0]
    await asyncio.sleep(0.05)
    assert not waiting.done(), "the lines of before have their places still"
    batches.ended("recipe")
    async with asyncio.timeout(60):
        assert await waiting == "recipe"
    # Nothing is left of lines whose recipe had other experts when they ended.
    for _ in range(2):
        batches.ended("recipe")
    async with asyncio.timeout(60):
        for _ in range(2):
            assert await batches.turn(["warm"]) == "warm"


@pytest.mark.parametrize(
    ("named", "model", "counted"),
    [
        # The plan's target of the alias counts, whatever the line itself would draw.
        ("chat", "old", ("chat", "old", "chat")),
        ("chat", "new", ("chat", "new", "chat")),
        ("gpt", "new", ("gpt", "new", "chat")),
        # `auto` among the targets stands for what the plan chose for it.
        ("mixed", "old", ("mixed", "old", "mixed")),
        ("mixed", "new", ("mixed", "auto:fast", "mixed")),
        ("any-thing", "both", ("any-*", "auto", None)),
        # Other names count for no alias.
        ("new", "old", None),
        ("auto", "new", None),
        ("chat", "both", None),
        (None, "old", None),
        # Without a choice before, the alias draws itself.
        ("one", "one", ("one", "old", None)),
        (None, "one", ("one", "old", None)),
    ],
)
def test_line_counts_for_the_alias_that_it_names(
    named: str | None, model: str, counted: tuple[str, str, str | None] | None
) -> None:
    expert = {"model": "x/y"}
    config = Config.model_validate(
        {
            "experts": {"old": expert, "new": expert},
            "pools": {"cpu": {"engine": "simulated"}},
            "recipes": {"both": {"kind": "cascade", "members": ["old"], "later": ["new"]}},
            "aliases": {
                "chat": {"old": 9, "new": 1},
                "gpt": "chat",
                "mixed": {"old": 1, "auto:fast": 1},
                "any-*": "auto",
                "one": "old",
            },
        }
    )
    raw = json.dumps({"model": model, "messages": [{"role": "user", "content": "q"}]}).encode()
    request = parse_request("/v1/chat/completions", raw, {}, 1000, NOBODY, 10)
    found = AliasResolution(config).resolve(request, named)
    assert found.alias == (None if counted is None else AliasChoice(*counted))
    assert found.model == ("old" if model == "one" else model)


def test_line_whose_plan_no_longer_holds_is_routed_anew() -> None:
    expert = {"model": "x/y"}
    config = Config.model_validate(
        {
            "experts": {"old": expert, "new": expert},
            "pools": {"cpu": {"engine": "simulated"}},
            "recipes": {"both": {"kind": "cascade", "members": ["old"], "later": ["new"]}},
            "aliases": {"chat": {"old": 9, "new": 1}},
        }
    )
    rolled_back: set[str] = set()
    aliases = AliasResolution(config, lambda alias: rolled_back if alias == "chat" else ())
    batches = CurrentGateway(lambda: SimpleNamespace(aliases=aliases), 16)  # type: ignore[arg-type, return-value]
    old_only = Tenant("t", experts=frozenset({"old"}))

    def cases() -> list[str]:
        return [
            batches.model_of("auto", "new", NOBODY),
            batches.model_of("auto", "both", NOBODY),
            batches.model_of("auto", "both", old_only),
            batches.model_of("auto", "new", old_only),
            batches.model_of("auto", "removed", NOBODY),
            batches.model_of("removed", "removed", NOBODY),
            batches.model_of("chat", "new", NOBODY),
            batches.model_of("chat", "old", NOBODY),
            batches.model_of(3, "auto", NOBODY),
        ]

    after = ["new", "both", "auto", "auto", "auto", "removed", "new", "old", "auto"]
    assert cases() == after
    rolled_back.add("new")
    after[6] = "chat"
    assert cases() == after
