"""Failing engines, pools and clients: retries, draining, limits and deadlines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from service.engine.engine_interface import EngineRequest, Send
from service.errors import EngineDeadError
from service.rpc.pool_link import PoolAddress
from tests.support.answer_gate import held_answers, held_requests
from tests.support.in_process_service import (
    CHAT,
    SECRET,
    RunningPool,
    chat,
    events,
    run_gateway,
    run_pool,
    simulated,
)
from tests.support.polling import until

SHARED = {"general": {"model": "m"}, "other": {"model": "m"}}


async def test_engine_death_before_the_first_byte_is_retried_elsewhere() -> None:
    config = simulated({"bad": {"fail": "first_byte"}, "good": {}})
    async with run_gateway(config) as s:
        bad, good = s.pools["bad"], s.pools["good"]
        first = bad.engine
        s.gateway.directory.update([bad.address])
        await until(lambda: len(s.gateway.directory.links()) == 1, "one pool is followed")
        with held_requests() as gate:
            asking = asyncio.create_task(s.ask(chat()))
            await until(lambda: first.now == 1, "the bad one has it")
            s.gateway.directory.update([bad.address, good.address])
            await until(lambda: len(s.gateway.directory.links()) == 2, "both are followed")
            gate.open()
            status, headers, body = await asking
        assert (status, body["model"], headers["x-coe-expert"]) == (200, "general", "general")
        assert first.failure() is not None
        assert len(good.engine.asked) == 1


async def test_request_that_kills_every_engine_is_given_to_two_only() -> None:
    async with run_gateway(simulated({"cpu": {"fail": "first_byte"}})) as s:
        for stream in (False, True):
            status, headers, body = await s.ask(chat(stream=stream))
            assert status == 500
            assert body["error"]["code"] == "engine_died_twice"
            assert headers["x-should-retry"] == "false"
        assert sum(len(engine.asked) for engine in s.pools["cpu"].engines) == 4


POISON = "this text ends the process"


@pytest.mark.parametrize("how", ["engine", "pool"])
@pytest.mark.parametrize("model", ["general", "auto"])
async def test_poison_request_costs_two_of_five_pools(how: str, model: str) -> None:
    async with run_gateway(simulated({kind: {} for kind in "abcde"})) as s:
        lost: list[str] = []

        def poison(kind: str, pool: RunningPool) -> None:
            real = pool.engine.run

            async def run(request: EngineRequest, send: Send) -> None:
                if POISON.encode() not in request.body:
                    await real(request, send)
                    return
                lost.append(kind)
                if how == "engine":
                    pool.engine.kill("a request killed it")
                    raise EngineDeadError("a request killed it")
                pool.served.cut()
                await asyncio.sleep(30)

            pool.engine.run = run  # type: ignore[method-assign]

        for kind, pool in s.pools.items():
            poison(kind, pool)
        status, _, body = await s.ask(chat(POISON, model=model))
        assert (status, body["error"]["code"]) == (500, "engine_died_twice")
        assert len(lost) == 2
        assert POISON not in body["error"]["message"]
        # Others are answered, by the three that are left or by those that have come back.
        assert (await s.ask(chat(model=model)))[0] == 200


async def test_requests_beside_a_poison_request_are_answered() -> None:
    """One loss is not two: who ran beside the request that killed an engine is tried again."""
    async with run_gateway(simulated({"a": {}, "b": {}})) as s:
        a = s.pools["a"]
        s.gateway.directory.update([a.address])
        await until(lambda: len(s.gateway.directory.links()) == 1, "one pool is followed")
        first = a.engine
        with held_requests() as gate:
            beside = [asyncio.create_task(s.ask(chat(str(i)))) for i in range(4)]
            await until(lambda: first.now == 4, "all are under way in one engine")
            s.gateway.directory.update([a.address, s.pools["b"].address])
            await until(lambda: len(s.gateway.directory.links()) == 2, "both are followed")
            first.kill("another request killed it")
            gate.open()
        assert [status for status, _, _ in await asyncio.gather(*beside)] == [200] * 4


async def test_pool_cut_off_while_draining_does_not_count_as_a_loss() -> None:
    """Two pools that stop, as they had told, cost a request its place, not its answer."""
    async with run_gateway(simulated({kind: {} for kind in "abc"})) as s:
        pools = s.pools
        asking: asyncio.Task[Any] | None = None
        with held_requests():
            for kind, after in (("a", "b"), ("b", "c")):
                pool = pools[kind]
                s.gateway.directory.update([pool.address])
                await until(lambda: len(s.gateway.directory.links()) == 1, "one pool is followed")
                asking = asking or asyncio.create_task(s.ask(chat()))
                await until(lambda p=pool: p.engine.now == 1, f"{kind} has it")  # type: ignore[misc]
                stopping = asyncio.create_task(pool.process.pool.stop(60))
                link = s.gateway.directory.link(pool.address.boot)
                await until(lambda one=link: one.draining, "the gateway knows")  # type: ignore[misc]
                s.gateway.directory.update([pools[after].address])
                pool.served.cut()
                await stopping
        assert asking is not None
        assert (await asking)[0] == 200


async def test_dead_engine_is_replaced_and_answers_its_request() -> None:
    async with run_gateway(simulated({"cpu": {}})) as s:
        pool = s.pools["cpu"]
        first = pool.engine
        with held_requests() as gate:
            asking = asyncio.create_task(s.ask(chat()))
            await until(lambda: first.now == 1, "the request is on the engine")
            first.kill("a test killed it")
            gate.open()
            status, _, _ = await asking
        assert status == 200
        assert pool.engine is not first


async def test_engine_death_during_a_stream_ends_it_with_an_error_event() -> None:
    async with run_gateway(simulated({"cpu": {"fail": "mid_stream"}})) as s:
        async with s.post(chat(stream=True)) as reply:
            assert reply.status == 200
            received = events(await reply.read())
        error = json.loads(received[1])["error"]
        assert error["code"] == "engine_dead"
        assert "a test" not in error["message"]
        assert received[2:] == []
        async with s.get("/metrics") as reply:
            counted = await reply.text()
        assert 'outcome="engine_dead"' in counted
        await until(lambda: len(s.pools["cpu"].engines) == 2, "another engine is started")


async def test_pool_loss_during_a_stream_ends_it_with_an_error_event() -> None:
    async with run_gateway(simulated({"cpu": {}})) as s:
        pool = s.pools["cpu"]
        with held_answers():
            async with s.post(chat(stream=True)) as reply:
                await reply.content.readany()
                pool.served.cut()
                received = events(await reply.read())
        assert json.loads(received[-1])["error"]["code"] == "pool_gone"
        await until(lambda: pool.engine.now == 0, "the engine has stopped that answer")
        assert (await s.ask(chat()))[0] == 200


async def test_draining_pool_finishes_its_streams_and_gets_no_new_ones() -> None:
    config = simulated({"one": {}, "two": {}})
    async with run_gateway(config) as s:
        one, two = s.pools["one"], s.pools["two"]
        s.gateway.directory.update([one.address])
        await until(lambda: len(s.gateway.directory.links()) == 1, "one pool is followed")
        with held_answers(limit=30) as gate:
            async with s.post(chat(stream=True, max_tokens=30)) as reply:
                await reply.content.readany()
                s.gateway.directory.update([one.address, two.address])
                await until(lambda: len(s.gateway.directory.links()) == 2, "both are followed")
                draining = asyncio.create_task(one.process.pool.stop(60))
                for _ in range(5):
                    status, _, _ = await s.ask(chat())
                    assert status == 200
                assert len(one.engine.asked) == 1
                assert len(two.engine.asked) == 5
                gate.open()
                received = events(await reply.read())
        assert received[-1] == "[DONE]"
        assert len(received) == 30  # the first was read before
        await draining
        assert one.engine.failure() is not None


async def test_over_capacity_is_answered_at_once() -> None:
    config = simulated({"cpu": {"max_num_seqs": 1}}, kinds={"cpu": {"max_queued_requests": 1}})
    async with run_gateway(config) as s:
        pool = s.pools["cpu"]
        with held_answers(limit=9):
            async with s.post(chat(stream=True, max_tokens=9)) as running:
                await running.content.readany()
                waiting = asyncio.create_task(s.ask(chat()))
                await until(lambda: pool.waiting == 1, "one waits")
                status, headers, body = await s.ask(chat())
                assert status == 503
                assert body["error"]["code"] == "over_capacity"
                assert int(headers["retry-after"]) >= 1
        status, headers, _ = await waiting
        assert status == 200
        assert float(headers["x-coe-queue-ms"]) > 0


async def test_full_pool_is_passed_over_for_another() -> None:
    config = simulated(
        {"full": {"max_num_seqs": 1}, "free": {}}, kinds={"full": {"max_queued_requests": 0}}
    )
    async with run_gateway(config) as s:
        full, free = s.pools["full"], s.pools["free"]
        s.gateway.directory.update([full.address])
        await until(lambda: len(s.gateway.directory.links()) == 1, "one pool is followed")
        with held_answers(limit=9):
            async with s.post(chat(stream=True, max_tokens=9)) as running:
                await running.content.readany()
                s.gateway.directory.update([full.address, free.address])
                await until(lambda: len(s.gateway.directory.links()) == 2, "both are followed")
                replies = await asyncio.gather(*(s.ask(chat()) for _ in range(8)))
        assert {status for status, _, _ in replies} == {200}
        assert len(free.engine.asked) == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline_ends_requests_on_the_engine_and_in_the_queue(stream: bool) -> None:
    config = simulated({"cpu": {"max_num_seqs": 1}})
    async with run_gateway(config) as s:
        pool = s.pools["cpu"]

        async def ask(deadline_ms: int) -> None:
            headers = {"x-coe-deadline-ms": str(deadline_ms)}
            status, _, body = await s.ask(chat(stream=stream), headers=headers)
            assert status == 504
            assert body["error"]["code"] == "deadline_exceeded"
            assert f"deadline of {deadline_ms} ms" in body["error"]["message"]

        with held_requests():
            other = asyncio.create_task(s.ask(chat(stream=stream)))
            await until(lambda: len(pool.engine.asked) == 1, "one runs")
            await ask(300)
            assert len(pool.engine.asked) == 1, "it waited, and never ran"
            other.cancel()
            await until(s.idle, "its place is free")
            await ask(1500)
            assert len(pool.engine.asked) == 2, "it ran"


async def test_deadline_of_a_stream_ends_with_its_first_token() -> None:
    async with run_gateway(simulated({"cpu": {"decode_ms": 50}})) as s:
        headers = {"x-coe-deadline-ms": "500"}
        status, _, _ = await s.ask(chat(max_tokens=20), headers=headers)
        assert status == 504
        async with s.post(chat(stream=True, max_tokens=20), headers=headers) as reply:
            received = events(await reply.read())
        assert len(received) == 21
        # Now it is known that the whole takes longer, whatever waits.
        pool = s.pools["cpu"].process.pool
        await until(lambda: "general" in pool.snapshot().idle_speeds, "its speed is known")
        status, _, answer = await s.ask(chat(max_tokens=20), headers=headers)
        assert (status, answer["error"]["code"]) == (400, "infeasible_bounds")


async def test_client_disconnect_frees_its_place_at_every_stage() -> None:
    async with run_gateway(simulated({"cpu": {"max_num_seqs": 1}})) as s:
        pool = s.pools["cpu"]
        with held_answers():
            async with s.post(chat(stream=True)) as running:
                await running.content.readany()
                queued = asyncio.create_task(s.ask(chat()))
                await until(lambda: pool.waiting == 1, "one waits")
                queued.cancel()
                await until(lambda: pool.waiting == 0, "the queued one is gone")
                assert pool.engine.now == 1
            await until(lambda: pool.engine.now == 0, "the streaming one is stopped in the engine")
            whole = asyncio.create_task(s.ask(chat()))
            await until(lambda: pool.engine.now == 1, "a whole answer is being made")
            whole.cancel()
            await until(lambda: pool.engine.now == 0, "it is stopped in the engine too")
        assert len(pool.engine.asked) == 2
        async with s.get("/metrics") as reply:
            assert 'outcome="client_gone"' in await reply.text()


@pytest.mark.parametrize("given", [{}, {"x-coe-secret": ""}, {"x-coe-secret": SECRET + "x"}])
@pytest.mark.parametrize("path", [CHAT, "/snapshots", "/metrics"])
async def test_pool_port_requires_the_secret(given: dict[str, str], path: str) -> None:
    config = simulated({"cpu": {}})
    async with run_pool(config, "cpu") as pool, aiohttp.ClientSession() as client:
        method = client.post if path == CHAT else client.get
        async with method(pool.url + path, headers=given) as reply:
            assert reply.status == 401
            text = await reply.text()
        assert json.loads(text)["error"]["code"] == "invalid_api_key"
        assert SECRET not in text


async def test_pool_port_limits_bodies_and_refuses_unknown_paths() -> None:
    config = simulated(
        {"cpu": {}}, server={"max_body_bytes": 100, "limits": {"max_audio_bytes": 100}}
    )
    most = config.server.most_inner_bytes
    given = {"x-coe-secret": SECRET}
    async with run_pool(config, "cpu") as pool, aiohttp.ClientSession(headers=given) as client:
        async with client.get(pool.url + "/nothing") as reply:
            assert reply.status == 404
        async with client.post(pool.url + CHAT, data=b"x") as reply:
            assert reply.status == 400
            assert "x-coe-expert" in await reply.text()
        call = {
            "x-coe-expert": "general",
            "x-coe-request-id": "r",
            "x-coe-deadline-ms": "1000",
            "x-coe-gateway": "g",
            "x-coe-seq": "1",
            "x-coe-stream": "0",
            "x-coe-tenant": "default",
            "x-coe-priority": "normal",
            "x-coe-weight": "1",
            "x-coe-prompt-tokens": "1",
            "x-coe-places": "1",
        }
        async with client.post(pool.url + CHAT, data=b"x" * (most + 1), headers=call) as reply:
            assert reply.status == 413
        async with client.post(
            pool.url + CHAT, data=b"x", headers={**call, "x-coe-expert": "nobody"}
        ) as reply:
            assert reply.status == 404


async def test_expert_that_can_not_load_reports_its_reason_and_others_work() -> None:
    config = simulated(
        {"bad": {"fail": "load"}, "good": {}},
        experts=SHARED,
        kinds={"bad": {"experts": ["general"]}, "good": {"experts": ["other"]}},
    )
    async with run_gateway(config) as s:
        async with s.get("/v1/models/general") as reply:
            data = (await reply.json())["coe"]
        assert (data["state"], data["reason"]) == ("failed", "simulated failure while loading")
        status, headers, body = await s.ask(chat())
        assert status == 503
        assert body["error"]["code"] == "expert_failed"
        assert "simulated failure while loading" in body["error"]["message"]
        assert int(headers["retry-after"]) >= 10
        status, _, _ = await s.ask(chat(model="other"))
        assert status == 200
        async with s.get("/ready") as reply:
            assert reply.status == 200


async def test_ready_without_any_ready_expert_is_503() -> None:
    async with run_gateway(simulated({"cpu": {"fail": "load"}})) as s, s.get("/ready") as reply:
        assert reply.status == 503


async def test_two_pools_share_the_load() -> None:
    slow = {"max_num_seqs": 4, "decode_ms": 5}
    async with run_gateway(simulated({"one": slow, "two": slow})) as s:
        with held_answers() as gate:
            asked = [asyncio.create_task(s.ask(chat(str(i)))) for i in range(32)]
            pools = [pool.process.pool for pool in s.pools.values()]
            await until(lambda: sum(pool.queued() for pool in pools) == 32, "all are there")
            gate.open()
            replies = await asyncio.gather(*asked)
        assert {status for status, _, _ in replies} == {200}
        shares = [len(pool.engine.asked) for pool in s.pools.values()]
        assert sum(shares) == 32
        assert min(shares) >= 10


async def test_silent_pool_is_chosen_last_and_then_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with run_gateway(simulated({"one": {}, "two": {}})) as s:
        links = {link.address.boot: link for link in s.gateway.directory.links()}
        silent = links[s.pools["one"].address.boot]
        heard = s.pools["two"].engine
        age_s = 2.0
        monkeypatch.setattr(silent, "age_s", lambda now_s: age_s)
        other = links[s.pools["two"].address.boot]
        monkeypatch.setattr(other, "age_s", lambda now_s: 0.0)
        for _ in range(4):
            await s.ask(chat())
        assert len(heard.asked) == 4
        # The only one left: better than nothing.
        s.gateway.directory.update([s.pools["one"].address])
        assert (await s.ask(chat()))[0] == 200
        age_s = 4.0
        status, _, body = await s.ask(chat(), headers={"x-coe-deadline-ms": "200"})
        assert (status, body["error"]["code"]) == (503, "unavailable")
        assert len(s.pools["one"].engine.asked) == 1
        assert set(s.woken) == {"general"}


async def test_pool_address_reused_by_another_process_is_not_used() -> None:
    async with run_gateway(simulated({"cpu": {}})) as s:
        address = s.pools["cpu"].address
        s.gateway.directory.update([PoolAddress(address.url, "cpu", "an older one")])
        status, _, _ = await s.ask(chat(), headers={"x-coe-deadline-ms": "400"})
        assert status == 503
        assert s.pools["cpu"].engine.asked == []
        s.gateway.directory.update([address])


async def test_request_waits_for_a_pool_that_is_starting() -> None:
    async with run_gateway(simulated({"cpu": {}})) as s:
        address = s.pools["cpu"].address
        s.gateway.directory.update([])
        asking = asyncio.create_task(s.ask(chat()))
        await until(lambda: s.woken == ["general"], "the request asks for a pool")
        s.gateway.directory.update([address])
        async with asyncio.timeout(60):
            assert (await asking)[0] == 200
