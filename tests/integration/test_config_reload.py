"""A gateway changes its config while requests run, and loses none."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest

from service.broker.circuit_breaker import State
from service.broker.pool_state import REMOTE
from service.config import Config
from service.errors import ArtifactError
from service.gateway.configured_gateway import ConfiguredGateway
from service.gateway.routing.feedback_learning import Vote
from service.http.asgi_helpers import read_body
from service.types import NOBODY, Recipe
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import (
    RunningGateway,
    RunningServer,
    chat,
    run_gateway,
    serving,
    simulated,
)
from tests.support.polling import until


def looks_for_keys(gateway: ConfiguredGateway) -> bool:
    """Whether it is still at work: it looks for changed keys as long as it is."""
    looking = gateway.authenticator._looking
    return looking is not None and not looking.done()


class Upstream:
    """An OpenAI-like server that answers when it is told to, and counts who it has at once."""

    def __init__(self) -> None:
        self.now = self.most = self.asked = 0
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive, 10**6)
        self.now += 1
        self.asked += 1
        self.most = max(self.most, self.now)
        try:
            await self.go_on.wait()
        finally:
            self.now -= 1
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}}
        body = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]}
        head = {"type": "http.response.start", "status": 200}
        await send({**head, "headers": [(b"content-type", b"application/json")]})
        result = json.dumps({**body, "usage": usage}).encode()
        await send({"type": "http.response.body", "body": result})


def far(served: RunningServer, **settings: Any) -> Config:
    """One local and one remote expert, which takes two requests at once."""
    remote = {"url": served.url, "model": "m", "max_in_flight": 2, **settings}
    experts = {"general": {"model": "m"}, "far": {"remote": remote}}
    return simulated({"cpu": {}}, experts=experts)


async def metric(s: RunningGateway, name: str) -> dict[str, float]:
    """The samples of a metric as they stand in the text, by their labels."""
    async with s.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in found}


async def counted(s: RunningGateway) -> float:
    return sum((await metric(s, "coe_requests_total")).values())


async def test_reload_lets_each_config_drain() -> None:
    config = simulated({"cpu": {}})
    async with run_gateway(config) as s:
        first = s.gateway.current
        with held_answers():
            reply = await s.post(chat(stream=True))
            await reply.content.readany()
            await s.gateway.reload(config)
            second = s.gateway.current
            await s.gateway.reload(config)
            assert looks_for_keys(first)
            assert looks_for_keys(s.gateway.current)
            await until(lambda: not looks_for_keys(second), "nobody came to the second")
            assert looks_for_keys(first)
        await reply.read()
        await until(lambda: not looks_for_keys(first), "the first has ended")
        assert looks_for_keys(s.gateway.current)


async def test_stop_after_reloads_stops_every_config() -> None:
    config = simulated({"cpu": {}})
    async with run_gateway(config) as s:
        first = s.gateway.current
        with held_answers():
            reply = await s.post(chat(stream=True))
            await reply.content.readany()
            await s.gateway.reload(config)
            await s.gateway.reload(config)
            assert looks_for_keys(first)
            await s.gateway.stop()
            assert not looks_for_keys(first)
            assert not looks_for_keys(s.gateway.current)
            reply.close()


async def test_vote_after_a_reload_counts_for_the_answer_before_it() -> None:
    config = simulated({"cpu": {}}, experts={"general": {"model": "m", "categories": ["general"]}})
    async with run_gateway(config) as s:
        _, _, answer = await s.ask(chat(model="auto"))
        await s.gateway.reload(config)
        result = await s.gateway.current.feedback.vote(NOBODY, Vote(answer["id"], 1.0))
        assert result["recipe"] == "general"


async def test_counters_continue_after_a_reload() -> None:
    config = simulated({"cpu": {}})
    async with run_gateway(config) as s:
        await s.ask(chat())
        assert await counted(s) == 1
        with held_answers() as gate:
            async with s.post(chat(stream=True)) as reply:
                await reply.content.readany()
                await s.gateway.reload(config)
                assert await counted(s) == 1
                assert list((await metric(s, "coe_in_flight_requests")).values()) == [1]
                gate.open()
                await reply.read()
        await s.ask(chat())
        await until(lambda: s.gateway.state.metrics.in_flight == 0, "all have ended")
        assert await counted(s) == 3
        assert s.gateway.state.recent.totals(time.time())["requests"] == 3


async def test_learned_figures_survive_a_reload_unless_the_expert_changed() -> None:
    experts = {"general": {"model": "m"}, "other": {"model": "m"}}
    config = simulated({"cpu": {}}, experts=experts)
    async with run_gateway(config) as s:
        _, _, answer = await s.ask(chat(model="general"))
        length = answer["usage"]["completion_tokens"]
        state = s.gateway.state
        for _ in range(9):
            now_s = asyncio.get_running_loop().time()
            for expert in ("general", "other"):
                one = state.breakers.begin((expert, "boot"), now_s)
                state.breakers.end((expert, "boot"), one, False, now_s)
            state.breakers._all["general", "boot"]._last_s = float("-inf")
            state.breakers._all["other", "boot"]._last_s = float("-inf")

        def expected() -> list[float]:
            found = s.gateway.current.cost_model.expect("", 10, None).tokens
            return [float(one) for one in found]

        before = expected()
        assert before[0] == pytest.approx(length)
        again = {**experts, "general": {"model": "m", "price": {"prompt": 1}, "pinned": True}}
        await s.gateway.reload(simulated({"cpu": {}}, experts={"new": {"model": "m"}, **again}))
        assert expected()[1:] == before
        assert State.OPEN in state.breakers.states(now_s).values()
        another = {"general": {"model": "another"}, "other": {"model": "m"}}
        await s.gateway.reload(simulated({"cpu": {}}, experts=another))
        assert expected()[0] == 64
        assert {place[0] for place in state.breakers.states(now_s)} == {"other"}


async def test_prices_survive_a_reload_and_new_budgets_get_their_own() -> None:
    budgets = {"all": {"amount": 1, "period": "day"}}
    config = simulated({"cpu": {}}, budgets=budgets)
    async with run_gateway(config) as s:
        pacer = s.gateway.budget_prices._pacers["all"]
        pacer.price = 0.5
        assert [price[:2] for price in s.gateway.budget_prices.prices()] == [("all", 0.5)]
        more = {**budgets, "more": {"amount": 1, "period": "day"}}
        await s.gateway.reload(simulated({"cpu": {}}, budgets=more))
        assert [price[:2] for price in s.gateway.budget_prices.prices()] == [
            ("all", 0.5),
            ("more", 0.0),
        ]
        await s.gateway.reload(simulated({"cpu": {}}))
        assert await metric(s, "coe_shadow_price") == {}
        assert await metric(s, "coe_budget_remaining_ratio") == {}


@pytest.mark.parametrize("settings", [{}, {"connect_timeout_s": 1.0}, {"max_in_flight": 1}])
async def test_remote_expert_limit_holds_across_reloads(settings: dict[str, Any]) -> None:
    upstream = Upstream()
    async with serving(upstream) as served, run_gateway(far(served)) as s:
        asking = [asyncio.create_task(s.ask(chat(model="far"))) for _ in range(4)]
        await until(lambda: upstream.now == 2, "two are answered")
        await s.gateway.reload(far(served, **settings))
        asking += [asyncio.create_task(s.ask(chat(model="far"))) for _ in range(4)]
        await until(lambda: s.gateway.remote_pools["far"].waiting == 6, "the others wait")
        assert upstream.most == 2
        upstream.go_on.set()
        answers = await asyncio.gather(*asking)
        assert [status for status, *_ in answers] == [200] * 8
        assert upstream.most == 2
        assert upstream.asked == 8


async def test_removed_remote_expert_stops_after_its_last_request() -> None:
    upstream = Upstream()
    async with serving(upstream) as served, run_gateway(far(served)) as s:
        asking = asyncio.create_task(s.ask(chat(model="far")))
        await until(lambda: upstream.now == 1, "it is answered")
        await s.gateway.reload(simulated({"cpu": {}}))
        assert (await s.ask(chat(model="far")))[0] == 404
        assert "far" in s.gateway.remote_pools
        upstream.go_on.set()
        assert (await asking)[0] == 200
        await until(lambda: "far" not in s.gateway.remote_pools, "its connections are closed")
        assert not any('"far"' in labels for labels in await metric(s, "coe_requests_waiting"))


async def test_remote_expert_with_a_new_address_has_a_closed_breaker() -> None:
    upstream = Upstream()
    upstream.go_on.set()
    async with serving(upstream) as served, run_gateway(far(served)) as s:
        breakers = s.gateway.state.breakers
        one = breakers.begin(("far", REMOTE), 0.0)
        breakers.end(("far", REMOTE), one, False, 0.0)
        await s.gateway.reload(far(served, max_queued_requests=7))
        assert ("far", REMOTE) in breakers.states(0.0)
        await s.gateway.reload(far(served, url=served.url + "/other"))
        assert ("far", REMOTE) not in breakers.states(0.0)


async def test_failed_reload_changes_nothing() -> None:
    config = simulated({"cpu": {}})
    async with run_gateway(config) as s:
        await s.ask(chat())
        with pytest.raises(ArtifactError):
            await s.gateway.reload(simulated({"cpu": {}}, router={"artifact": "./nowhere"}))
        assert (await s.ask(chat()))[0] == 200
        assert await counted(s) == 2
        await s.gateway.reload(config)
        assert (await s.ask(chat()))[0] == 200


def test_escalations_are_kept_by_recipe_and_forgotten_with_its_experts() -> None:
    from service.gateway.routing.quality_model import Escalations

    known = Escalations()
    one, two = (Recipe("cascade", (name,), ("big",)) for name in ("a", "b"))
    known.rows([one, two])
    for _ in range(10):
        known.observe(two, np.zeros(3), 1)
    rows = known.rows([two, Recipe("single", ("c",)), one])
    assert known.excess[rows][:, 0].tolist() == pytest.approx([0.5, 0.0, 0.0])
    known.forget({"b"})
    assert not known.excess.any()
