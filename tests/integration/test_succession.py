"""A gateway by another config in the place of one, while requests are under way."""

from __future__ import annotations

import pytest

from service.api.feedback import Vote
from service.app import gateway
from service.app.gateway import GatewayProcess
from service.types import NOBODY
from tests.support.serving import chat, simulated, site
from tests.support.waiting import until


def looks_for_keys(process: GatewayProcess) -> bool:
    """Whether it is still at work: it looks for changed keys as long as it is."""
    looking = process._keyring._looking
    return looking is not None and not looking.done()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a second to see that the last request has ended."""
    monkeypatch.setattr(gateway, "_ENDED_S", 0.01)


async def test_each_ends_after_its_last_request_whoever_came_after_it() -> None:
    config = simulated({"cpu": {"decode_ms": 5}})
    async with site(config) as s:
        first = s.gateway
        async with s.post(chat(stream=True, max_tokens=1000)) as reply:
            await reply.content.readany()
            second = await first.succeed(config)
            third = await second.succeed(config)
            assert looks_for_keys(first)
            assert looks_for_keys(third)
        await until(lambda: not looks_for_keys(first), "the first has ended")
        await until(lambda: not looks_for_keys(second), "and so has the second")
        assert looks_for_keys(third)
        await third.stop()
        assert not looks_for_keys(third)


async def test_the_last_one_s_end_is_the_end_of_all() -> None:
    config = simulated({"cpu": {"decode_ms": 5}})
    async with site(config) as s:
        first = s.gateway
        async with s.post(chat(stream=True, max_tokens=1000)) as reply:
            await reply.content.readany()
            last = await (await first.succeed(config)).succeed(config)
            await last.stop()
            assert not looks_for_keys(first)


async def test_what_was_answered_before_can_still_be_voted_on() -> None:
    config = simulated({"cpu": {}}, experts={"general": {"model": "m", "categories": ["general"]}})
    async with site(config) as s:
        _, _, told = await s.ask(chat(model="auto"))
        second = await s.gateway.succeed(config)
        said = await second._feedback.vote(NOBODY, Vote(told["id"], 1.0))
        assert said["recipe"] == "general"
        await second.stop()
