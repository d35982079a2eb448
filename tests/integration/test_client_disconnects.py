"""Clients that disconnect early are charged for what was generated."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from service.store.api_keys import digest_of
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import CHAT, RunningGateway, chat, run_gateway, simulated
from tests.support.polling import until

KEY = "a-key-of-the-tests-a"
BEARER = {"authorization": f"Bearer {KEY}"}
STEP_MS = 5
# An answer here costs less than one token of its prompt, so that a sum shows both counts.
ANSWER_TOKENS = 10_000
PRICE = {"prompt": 1_000_000, "completion": 1_000_000 / ANSWER_TOKENS}


def config(per_min: int = 100, price: dict[str, float] | None = None, **pool: Any) -> Any:
    base = simulated(
        {"cpu": {"tokens": 2000, "decode_ms": STEP_MS, "max_model_len": 100_000, **pool}},
        experts={
            "general": {
                "model": "m",
                "capabilities": ["chat", "completions"],
                "price": price or {"prompt": 0, "completion": 1_000_000},
            }
        },
    )
    keys = {"a": {"tenant": "acme", "sha256": digest_of(KEY), "budget": {"amount": 10_000}}}
    return type(base).model_validate(
        {
            **json.loads(base.model_dump_json()),
            "keys": keys,
            "tenants": {"acme": {"requests_per_min": per_min}},
        }
    )


async def balance(s: RunningGateway, kind: str) -> Any:
    async with s.client.get(s.url + "/v1/usage", headers=BEARER) as reply:
        limits = (await reply.json())["limits"]
        return next(limit for limit in limits if limit["unit"] == kind)


async def settled(s: RunningGateway) -> Any:
    await until(s.idle, "the pool is idle")

    async def free() -> bool:
        return bool((await balance(s, "cost"))["reserved"] == 0)

    await until(free, "what was reserved is free again")
    return (await balance(s, "cost"))["spent"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "prompt_tokens", "answers"),
    [
        (CHAT, chat("one two", max_tokens=2000), 2, 1),
        (CHAT, chat("one two", max_tokens=2000, n=4), 2, 4),
        ("/v1/completions", {"model": "general", "prompt": "x", "max_tokens": 2000}, 1, 1),
        ("/v1/completions", {"model": "general", "prompt": ["x"] * 3, "max_tokens": 2000}, 3, 3),
        ("/v1/messages", chat("one two", system="three", max_tokens=2000), 3, 1),
        ("/v1/responses", {"model": "general", "input": "x y", "max_output_tokens": 2000}, 2, 1),
    ],
)
async def test_client_disconnect_is_charged_the_prompt_and_what_the_engine_made(
    path: str, body: dict[str, Any], prompt_tokens: int, answers: int, stream: bool
) -> None:
    async with run_gateway(config(price=PRICE)) as s:
        engine = s.pools["cpu"].engine

        async def ask() -> None:
            async with s.post({**body, "stream": stream}, path, headers=BEARER) as reply:
                await reply.read()

        asking = asyncio.create_task(ask())
        await until(lambda: engine.now == 1, "the engine works on it")
        await asyncio.sleep(0.25)
        asking.cancel()
        with suppress(asyncio.CancelledError, aiohttp.ClientError):
            await asking
        prompt, spent = divmod(round(await settled(s) * ANSWER_TOKENS), ANSWER_TOKENS)
        assert prompt == prompt_tokens
        assert spent % answers == 0
        # All of it for 250 ms, however long a busy machine made that.
        assert answers * 250 / STEP_MS * 0.8 <= spent < answers * 1500
        assert (await balance(s, "requests"))["spent"] == 1


async def test_client_disconnect_in_the_queue_costs_nothing() -> None:
    async with run_gateway(config(max_num_seqs=1)) as s:
        pool = s.pools["cpu"]
        with held_answers() as gate:
            first = asyncio.create_task(s.ask(chat(max_tokens=100), headers=BEARER))
            await until(lambda: pool.engine.now == 1, "one runs")
            second = asyncio.create_task(s.ask(chat(max_tokens=2000), headers=BEARER))
            await until(lambda: pool.waiting == 1, "one waits")
            second.cancel()
            await until(lambda: pool.waiting == 0, "it has left")
            gate.open()
            assert (await first)[0] == 200
        assert await settled(s) == 100


async def test_client_deadline_does_not_bypass_limits() -> None:
    async with run_gateway(config()) as s:
        status, _, answer = await s.ask(chat(coe={"deadline_ms": 1000}), headers=BEARER)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert await settled(s) >= 300 / STEP_MS * 0.5
        assert (await balance(s, "requests"))["spent"] == 1


async def test_deadline_counts_from_the_request_s_arrival() -> None:
    async with run_gateway(config()) as s:

        async def slowly() -> Any:
            yield b'{"model": "general", "messages": [{"role": "user", '
            await asyncio.sleep(0.3)
            yield b'"content": "hi"}], "max_tokens": 1}'

        headers = {**BEARER, "x-coe-deadline-ms": "200", "content-type": "application/json"}
        async with s.client.post(s.url + CHAT, data=slowly(), headers=headers) as reply:
            assert reply.status == 504
        assert s.pools["cpu"].engine.asked == []


async def test_limits_apply_before_the_body_is_read() -> None:
    async with run_gateway(config(per_min=1)) as s:
        assert (await s.ask(chat(max_tokens=1), headers=BEARER))[0] == 200
        never = asyncio.Event()

        async def endless() -> Any:
            yield b'{"model": "general"'
            await never.wait()

        headers = {**BEARER, "content-type": "application/json"}
        for path in (CHAT, "/v1/route", "/v1/messages"):
            async with s.client.post(s.url + path, data=endless(), headers=headers) as reply:
                assert reply.status == 429, path
        never.set()


async def test_read_endpoints_have_their_own_limit() -> None:
    async with run_gateway(config(per_min=3)) as s:
        got = []
        for _ in range(5):
            async with s.client.get(s.url + "/v1/usage", headers=BEARER) as reply:
                got.append(reply.status)
        assert got == [200, 200, 200, 429, 429]
        # That is an allowance of its own.
        assert (await s.ask(chat(max_tokens=1), headers=BEARER))[0] == 200
