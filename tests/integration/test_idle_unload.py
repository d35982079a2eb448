"""Unloading idle experts over HTTP: by the clock, by name, and all at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.config import Config
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import (
    ADMIN_KEY,
    RunningGateway,
    chat,
    run_gateway,
    simulated,
)
from tests.support.polling import until

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
EXPERTS = {"small": {"model": "m", "categories": ["general"]}, "big": {"model": "n"}}


def config(slots: int | None = None, keep: str | None = None, idle_s: float = 0.0) -> Config:
    swap = {"idle_unload_s": idle_s, **({"idle_keep": keep} if keep else {})}
    return simulated(
        {"p": {"load_s": 0.05, "swap_s": 0.01, "decode_ms": 1}},
        experts=EXPERTS,
        kinds={"p": {"swap": swap, **({"slots": slots} if slots else {})}},
    )


async def listed(stage: RunningGateway) -> dict[str, Any]:
    async with stage.get("/v1/models") as reply:
        return {one["id"]: one["coe"] for one in (await reply.json())["data"]}


async def known(stage: RunningGateway, *names: str) -> None:
    """Wait until the gateway knows that these experts gave their memory back."""

    def told() -> bool:
        (link,) = stage.gateway.directory.links()
        assert link.snapshot is not None
        return all(link.snapshot.experts[name].released for name in names)

    await until(told, f"{names} are unloaded")


@pytest.mark.parametrize(
    ("slots", "keep", "state"),
    [(None, None, "disk"), (1, "disk", "disk"), (1, "host", "host")],
    ids=["own slots", "shared, disk", "shared, host"],
)
async def test_idle_experts_are_unloaded_and_come_back(
    slots: int | None, keep: str | None, state: str
) -> None:
    async with run_gateway(config(slots, keep, idle_s=0.4)) as stage:
        pool = stage.pools["p"].process.pool

        async def unloaded_again(times: int) -> None:
            await until(
                lambda: pool.unload_counts().get(("small", "idle"), 0) >= times, "it is unloaded"
            )

        for times in (1, 2):
            status, _, _ = await stage.ask(chat(model="small", max_tokens=2))
            assert status == 200
            await unloaded_again(times)
            running = [engine for pool in stage.pools.values() for engine in pool.engines]
            await known(stage, "small")
            models = await listed(stage)
            assert models["small"]["state"] == state
            assert models["small"]["released"]
            if state == "disk":
                assert all(engine.failure() for engine in running)
            # Whoever asks is answered, so the service is ready.
            async with stage.get("/ready") as reply:
                assert reply.status == 200
        # `auto` takes it as any expert that is not resident.
        status, headers, _ = await stage.ask(chat(model="auto", max_tokens=2))
        assert (status, headers["x-coe-expert"]) == (200, "small")
        await unloaded_again(3)
        async with stage.get("/metrics") as reply:
            text = await reply.text()
        (line,) = (
            line
            for line in text.splitlines()
            if line.startswith("coe_unloads_total") and 'expert="small"' in line
        )
        assert 'reason="idle"' in line
        assert float(line.split()[-1]) >= 3


async def test_release_waits_for_nobody_and_takes_nothing_from_requests() -> None:
    async with run_gateway(config()) as stage:
        engines = stage.pools["p"].engines
        with held_answers() as gate:
            running = asyncio.create_task(stage.ask(chat(model="big")))
            await until(lambda: gate.held == 1, "it runs")
            status, _, told = await stage.ask({}, "/admin/release", headers=ADMIN)
            assert status == 200
            (pool,) = told["pools"].values()
            assert pool["released"] == ["small"]
            assert pool["busy"] == {"big": "big: requests run or wait"}
            gate.open()
            assert (await running)[0] == 200
        status, _, told = await stage.ask({"keep": "disk"}, "/admin/release", headers=ADMIN)
        (pool,) = told["pools"].values()
        assert (pool["released"], pool["busy"]) == (["big", "small"], {})
        assert all(engine.failure() for engine in engines)
        async with stage.get("/ready") as reply:
            assert reply.status == 200
        for name in EXPERTS:
            status, _, _ = await stage.ask(chat(model=name, max_tokens=2))
            assert status == 200


@pytest.mark.parametrize("body", [{"keep": "tape"}, {"kepe": "host"}, ["host"]])
async def test_release_with_a_wrong_body_is_refused(body: Any) -> None:
    async with run_gateway(config()) as stage:
        status, _, reply = await stage.ask(body, "/admin/release", headers=ADMIN)
        assert status == 400
        assert "keep" in reply["error"]["message"]
        status, _, _ = await stage.ask({}, "/admin/release")
        assert status == 401
        assert not any(coe.get("released") for coe in (await listed(stage)).values())


@pytest.mark.parametrize("slots", [None, 1])
async def test_unload_by_name_and_load_again(slots: int | None) -> None:
    async with run_gateway(config(slots, "disk" if slots else None)) as stage:
        assert (await stage.ask(chat(model="big", max_tokens=2)))[0] == 200
        for name in ("big", "big"):  # the second finds nothing to do
            status, _, told = await stage.ask({}, f"/admin/experts/{name}/unload", headers=ADMIN)
            assert (status, told["done"]) == (200, "unload")
        await known(stage, "big")
        status, _, _ = await stage.ask({}, "/admin/experts/big/load", headers=ADMIN)
        assert status == 200

        def is_back() -> bool:
            (link,) = stage.gateway.directory.links()
            assert link.snapshot is not None
            return link.snapshot.experts["big"].state.value == "device"

        await until(is_back, "it is back")


@pytest.mark.parametrize("slots", [None, 1])
async def test_reload_of_a_pool_at_rest(slots: int | None) -> None:
    given = config(slots, idle_s=0.3)
    async with run_gateway(given) as stage:
        await stage.ask(chat(model="small", max_tokens=1))
        await known(stage, "small")
        # One leaves, another one comes, and nobody is woken for it.
        data = given.model_dump(mode="json", exclude_defaults=True)
        data["experts"]["late"] = {"model": "o"}
        del data["experts"]["small"]
        data["experts"]["big"]["categories"] = ["general"]
        after = Config.model_validate(data)
        await stage.pools["p"].process.reload(after)
        await stage.gateway.reload(after)
        for name in ("big", "late"):
            status, _, _ = await stage.ask(chat(model=name, max_tokens=1))
            assert status == 200
        await known(stage, "big", "late") if not slots else None
        assert (await stage.ask(chat(model="small", max_tokens=1)))[0] == 404
