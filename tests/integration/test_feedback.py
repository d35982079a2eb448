"""Feedback over HTTP: an expert that turns bad loses its traffic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.config import Config
from tests.support.in_process_service import RunningGateway, chat, run_gateway, simulated
from tests.support.polling import until
from tests.support.redis_server import RedisServer, redis_server

VOTES = 12


def config(**feedback: Any) -> Config:
    base = simulated(
        {"cpu": {"tokens": 2}},
        experts={
            "good": {"model": "m", "categories": ["general"], "quality": {"general": 0.9}},
            "other": {"model": "m", "quality": {"general": 0.6}},
        },
    )
    return Config.model_validate({**base.model_dump(), "feedback": {"votes": VOTES, **feedback}})


async def vote(s: RunningGateway, reply: str, score: float) -> tuple[int, Any]:
    status, _, answer = await s.ask({"id": reply, "score": score}, "/v1/feedback")
    return status, answer


async def test_feedback_expert_that_turns_bad_loses_its_traffic() -> None:
    async with run_gateway(config()) as s:
        models = []
        for _ in range(VOTES + 1):
            _, headers, answer = await s.ask(chat(model="auto"))
            models.append(answer["model"])
            if answer["model"] == "other":
                break
            status, result = await vote(s, answer["id"], 0)
            assert status == 200, result
            assert result["recipe"] == headers["x-coe-expert"]
        assert models[0] == "good"
        assert models[-1] == "other"
        # Praise brings it back.
        for _ in range(3 * VOTES):
            _, _, answer = await s.ask(chat(model="auto"))
            if answer["model"] == "good":
                break
            await vote(s, answer["id"], 0)
        else:
            pytest.fail("a worse one kept the traffic")


async def test_feedback_second_vote_under_any_of_a_reply_s_ids_is_a_conflict() -> None:
    async with run_gateway(config()) as s:
        headers = {"x-request-id": "mine-1"}
        _, _, answer = await s.ask(chat(model="auto"), headers=headers)
        assert (await vote(s, "mine-1", 1))[0] == 200
        assert (await vote(s, "mine-1", 1))[0] == 409
        assert (await vote(s, answer["id"], 1))[0] == 409
        for reply in ("nothing", "0" * 24, "chatcmpl-" + "a" * 24):
            status, result = await vote(s, reply, 1)
            assert (status, result["error"]["code"]) == (404, "reply_not_found")
        # Who was named can't be misrouted.
        _, _, answer = await s.ask(chat(model="good"))
        assert (await vote(s, answer["id"], 1))[0] == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "JSON object"),
        ({"id": "x"}, "`score` must be a number from 0 to 1"),
        ({"id": "x", "score": 1.5}, "`score` must be a number from 0 to 1"),
        ({"id": "x", "score": True}, "`score` must be a number from 0 to 1"),
        ({"id": 7, "score": 1}, "`id` must be a reply's id"),
        ({"id": "x", "score": 1, "comment": "hi"}, "unknown field 'comment'"),
    ],
)
async def test_feedback_invalid_votes_are_refused(body: Any, words: str) -> None:
    async with run_gateway(config()) as s:
        status, _, answer = await s.ask(body, "/v1/feedback")
        assert status == 400
        assert words in answer["error"]["message"]


async def test_feedback_can_be_switched_off() -> None:
    async with run_gateway(config(enabled=False)) as s:
        status, _, _ = await s.ask({"id": "x", "score": 1}, "/v1/feedback")
        assert status == 404


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, RedisServer]]:
    """One that counts, and one for what may be lost."""
    with (
        redis_server(tmp_path_factory.mktemp("counts")) as counting,
        redis_server(tmp_path_factory.mktemp("volatile")) as losing,
    ):
        yield counting, losing


async def test_feedback_gateways_with_a_shared_volatile_store_share_votes(
    servers: tuple[RedisServer, RedisServer],
) -> None:
    counting, losing = servers
    data = config().model_dump()
    data["store"] = {"kind": "redis", "url": counting.url, "cache_url": losing.url}
    data["tenants"] = {"default": {"cache": {"mode": "exact"}}}
    given = Config.model_validate(data)
    async with run_gateway(given) as one, run_gateway(given) as other:
        _, headers, answer = await one.ask(chat(model="auto"), headers={"x-coe-cache": "exact"})
        assert headers["x-coe-cache"] == "miss"

        async def shared() -> bool:
            return (await vote(other, answer["id"], 0.0))[0] == 200

        await until(shared, "the other gateway knows the reply")
        assert (await vote(one, answer["id"], 0.0))[0] == 409
        _, headers, _ = await other.ask(chat(model="auto"), headers={"x-coe-cache": "exact"})
        assert headers["x-coe-cache"] == "exact"
    with counting.client() as client:
        names = "\n".join(str(name) for name in client.keys("*"))
        assert "replied" not in names
        assert "cache/" not in names
        assert "votes/" in names


async def test_feedback_without_the_volatile_store_loses_votes_and_no_request(
    servers: tuple[RedisServer, RedisServer],
) -> None:
    counting, _ = servers
    data = config().model_dump()
    gone = "redis://127.0.0.1:1/0"
    data["store"] = {"kind": "redis", "url": counting.url, "prefix": "g", "cache_url": gone}
    data["tenants"] = {"default": {"cache": {"mode": "exact"}}}
    async with run_gateway(Config.model_validate(data)) as s:
        for _ in range(3):
            status, headers, answer = await s.ask(
                chat(model="auto"), headers={"x-coe-cache": "exact"}
            )
            assert (status, headers["x-coe-cache"]) == (200, "miss")
        status, result = await vote(s, answer["id"], 1.0)
        assert (status, result["error"]["code"]) == (503, "store_unavailable")
