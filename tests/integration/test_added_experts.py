"""Experts are added and removed while the service runs, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.broker.circuit_breaker import State
from service.config import Config
from service.config.effective_config import parse_added_expert
from service.errors import ExpertFailedError
from service.gateway import added_experts
from service.gateway.gateway_reload import GatewayRuntime
from tests.support.adapter_folders import adapter_folder
from tests.support.in_process_service import (
    ADMIN_KEY,
    SECRET,
    RunningGateway,
    chat,
    run_gateway,
    run_pool,
    serving,
    simulated,
)
from tests.support.polling import until
from tests.support.redis_server import redis_server

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
LAW = [
    "My landlord keeps the deposit; can I sue him in court?",
    "What does the contract say about the notice period?",
    "Is a verbal agreement legally binding?",
    "How do I write a will that a judge accepts?",
]
FOOD = [
    "Give me a recipe for lasagna with spinach",
    "How long do I boil an egg?",
    "Which spices go into a curry?",
    "Can I bake bread without yeast?",
]


@pytest.fixture(autouse=True)
def _gateways_look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(added_experts, "_LOOK_S", 0.1)
    monkeypatch.setattr(added_experts, "_SEEN_S", 0.3)


def config(tmp_path: Path, **more: Any) -> Config:
    kinds = more.pop("kinds", {"p": {"vllm": {"spare_adapters": 3}}})
    experts = more.pop("experts", {"general": {"model": "m"}, "other": {"model": "n"}})
    options = {"decode_ms": 1, **more.pop("options", {})}
    return simulated(
        {"p": options},
        experts=experts,
        kinds=kinds,
        added_experts={"roots": [str(tmp_path / "adapters")], "file": more.pop("file", None)},
        **more,
    )


def adapter(tmp_path: Path, name: str = "law", **options: Any) -> str:
    return str(adapter_folder(tmp_path / "adapters" / name, **options))


async def added(stage: RunningGateway) -> dict[str, Any]:
    async with stage.get("/admin/experts", headers=ADMIN) as reply:
        assert reply.status == 200
        found: dict[str, Any] = (await reply.json())["added"]
        return found


async def add(stage: RunningGateway, **body: Any) -> tuple[int, Any]:
    status, _, told = await stage.ask(body, "/admin/experts", headers=ADMIN)
    return status, told


async def remove(stage: RunningGateway, name: str) -> tuple[int, Any]:
    async with stage.client.delete(f"{stage.url}/admin/experts/{name}", headers=ADMIN) as reply:
        return reply.status, await reply.json()


async def status_of(stage: RunningGateway, model: str, deadline_ms: int = 60_000) -> int:
    headers = {"x-coe-deadline-ms": str(deadline_ms)}
    return (await stage.ask(chat(model=model, max_tokens=2), headers=headers))[0]


def snapshots(stage: RunningGateway) -> list[Any]:
    return [pool.process.pool.snapshot() for pool in stage.pools.values()]


async def test_added_adapter_and_variant_answer_until_they_are_removed(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        status, told = await add(
            stage,
            name="law",
            base="general",
            adapter=adapter(tmp_path),
            description="law",
            price={"prompt": 7},
        )
        assert (status, told["added"]["state"]) == (200, "served")
        status, _ = await add(stage, name="short", base="law", defaults={"max_tokens": 3})
        assert status == 200
        async with stage.get("/v1/models") as reply:
            assert {"law", "short"} <= {one["id"] for one in (await reply.json())["data"]}
        status, headers, answer = await stage.ask(chat(model="law", max_tokens=2))
        assert (status, headers["x-coe-expert"]) == (200, "law")
        status, _, answer = await stage.ask(chat(model="short"))
        assert answer["usage"]["completion_tokens"] == 3
        assert set(await added(stage)) == {"law", "short"}
        # What was derived for others is as before.
        assert stage.gateway.current.config.computation_rate == 1.0
        status, told = await remove(stage, "law")
        assert (status, "short" in told["error"]["message"]) == (409, True)
        for name in ("short", "law"):
            assert (await remove(stage, name))[0] == 200
            assert await status_of(stage, name) == 404
        assert await added(stage) == {}
        (snapshot,) = snapshots(stage)
        assert set(snapshot.experts) == {"general", "other"}
        async with stage.get("/metrics") as reply:
            text = await reply.text()
        assert not [
            line
            for line in text.splitlines()
            if line.startswith("coe_expert_state") and '"law"' in line
        ]


async def test_64_streams_go_on_beside_an_addition_and_a_removal(tmp_path: Path) -> None:
    """No stream can end by itself: each would take an hour."""
    options = {"decode_ms": 100, "max_model_len": 100_000}
    async with run_gateway(config(tmp_path, options=options)) as stage:
        state = stage.gateway.state
        now_s = asyncio.get_running_loop().time()
        for _ in range(9):
            one = state.breakers.begin(("other", "boot"), now_s)
            state.breakers.end(("other", "boot"), one, False, now_s)
            state.breakers._all["other", "boot"]._last_s = float("-inf")
        open_before = state.breakers.states(now_s)
        assert State.OPEN in open_before.values()
        replies = [
            await stage.post(
                chat(model=("general", "other")[i % 2], stream=True, max_tokens=36_000, top_p=1)
            )
            for i in range(64)
        ]

        async def each_goes_on() -> None:
            chunks = await asyncio.gather(*(reply.content.readany() for reply in replies))
            assert all(b"data: " in chunk for chunk in chunks)

        try:
            await each_goes_on()
            engines = list(stage.pools["p"].engines)
            assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[
                0
            ] == 200
            await each_goes_on()
            assert await status_of(stage, "law") == 200
            assert (await remove(stage, "law"))[0] == 200
            for _ in range(3):
                await each_goes_on()
            assert stage.pools["p"].engines == engines
            assert [engine.swaps for engine in engines] == [0, 0]
            assert all(engine.failure() is None for engine in engines)
            await until(
                lambda: sum(engine.now for engine in engines) == state.metrics.in_flight == 64,
                "the streams run, and nothing else",
            )
            assert state.breakers.states(now_s) == open_before
        finally:
            for reply in replies:
                reply.close()
        await until(stage.idle, "every stream was cancelled")


async def test_running_requests_of_a_removed_expert_finish(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path, options={"decode_ms": 20})) as stage:
        assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[0] == 200
        async with stage.post(chat(model="law", stream=True, max_tokens=60)) as reply:
            text = await reply.content.readany()
            assert (await remove(stage, "law"))[0] == 200
            assert await status_of(stage, "law") == 404
            text += await reply.read()
        assert b"[DONE]" in text
        assert b'"error"' not in text


async def test_added_experts_are_there_after_a_restart_and_routable(tmp_path: Path) -> None:
    experts = {"general": {"model": "m"}, "cook": {"model": "n"}}
    given = config(
        tmp_path, experts=experts, categories={"food": {"examples": FOOD, "expert": "cook"}}
    )
    prompt = chat("Can the court void my rental contract?", model="auto", max_tokens=2)
    async with run_gateway(given) as stage:
        status, told = await add(
            stage,
            name="lawyer",
            base="general",
            adapter=adapter(tmp_path),
            examples={"law": LAW},
        )
        assert status == 200, told
        for _ in range(2):
            _, headers, _ = await stage.ask(prompt)
            assert (headers["x-coe-expert"], headers["x-coe-category"]) == ("lawyer", "law")
    async with run_gateway(given) as stage:
        await until(
            lambda: "lawyer" in snapshots(stage)[0].experts, "the pool was told of it by the file"
        )
        _, headers, _ = await stage.ask(prompt)
        assert headers["x-coe-expert"] == "lawyer"
        assert (await remove(stage, "lawyer"))[0] == 200
    async with run_gateway(given) as stage:
        assert await added(stage) == {}


async def test_examples_come_beside_the_built_in_categories(tmp_path: Path) -> None:
    experts = {
        "general": {"model": "m", "categories": ["general"]},
        "data": {"model": "n", "categories": ["shell-sql"]},
    }
    given = config(tmp_path, experts=experts, router={"artifact": None})
    async with run_gateway(given) as stage:

        async def chosen(text: str) -> str:
            _, _, told = await stage.ask(chat(text, model="auto"), "/v1/route")
            return str(told["chosen"])

        sql, law = "SELECT all users older than 30 in SQL", "Can I sue my landlord in court?"
        assert await chosen(sql) == "data"
        status, told = await add(
            stage,
            name="lawyer",
            base="general",
            adapter=adapter(tmp_path),
            examples={"tenancy-law": LAW},
        )
        assert status == 200, told
        assert (await chosen(sql), await chosen(law)) == ("data", "lawyer")


async def test_addition_that_was_cut_short_is_removed_in_the_end(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        service = stage.gateway.added
        body = {"name": "law", "base": "general", "adapter": adapter(tmp_path)}
        name, wanted = parse_added_expert(body, time.time())
        await service._repository.change(lambda now: now.including(name, wanted, time.time()))
        await until(lambda: "law" in snapshots(stage)[0].experts, "the pool loads it")
        # Nobody is served it, and it is not there for ever.
        assert await status_of(stage, "law") == 404
        assert (await added(stage))["law"]["state"] == "not served"
        status, told = await add(stage, **body)
        assert (status, "was cut short" in told["error"]["message"]) == (409, True)
        clock = service._clock
        service._clock = lambda: clock() + 3600
        await until(lambda: "law" not in snapshots(stage)[0].experts, "it is gone")
        assert await added(stage) == {}


async def test_cache_has_no_answers_of_an_earlier_expert_of_the_name(tmp_path: Path) -> None:
    given = config(tmp_path, tenants={"default": {"cache": {"mode": "exact"}}})
    async with run_gateway(given) as stage:
        lora = {"name": "law", "base": "general", "adapter": adapter(tmp_path)}

        async def looked_up() -> str:
            body = chat(model="law", max_tokens=2, temperature=0)
            _, headers, _ = await stage.ask(body, headers={"x-coe-cache": "exact"})
            return headers["x-coe-cache"]

        assert (await add(stage, **lora))[0] == 200
        assert await looked_up() == "miss"

        async def is_kept() -> bool:
            return await looked_up() == "exact"

        await until(is_kept, "the answer is kept")
        assert (await remove(stage, "law"))[0] == 200
        assert (await add(stage, **lora))[0] == 200
        assert await looked_up() == "miss"


async def test_without_figures_an_added_expert_has_its_base_s_quality(tmp_path: Path) -> None:
    experts = {
        "general": {"model": "m", "categories": ["law"], "quality": {"law": 0.7, "food": 0.2}},
        "other": {"model": "n", "categories": ["food"], "quality": {"law": 0.4, "food": 0.9}},
    }
    async with run_gateway(config(tmp_path, experts=experts)) as stage:
        path = adapter(tmp_path)
        assert (await add(stage, name="tuned", base="general", adapter=path))[0] == 200
        figures = {"law": 0.9}
        status, _ = await add(stage, name="judged", base="general", adapter=path, quality=figures)
        assert status == 200
        services = stage.gateway.current.services
        model, catalog = services.executor._quality_model, services.executor._catalog
        found = {
            (name, label): model.expected(label, catalog.index[name])
            for name in ("general", "tuned", "judged")
            for label in ("law", "food")
        }
        assert found["tuned", "law"] == found["general", "law"] == 0.7
        assert found["tuned", "food"] == found["general", "food"] == 0.2
        assert (found["judged", "law"], found["judged", "food"]) == (0.9, 0.2)


TAKEN: dict[str, Any] = {
    "general": "the config has an expert of this name",
    "cheap": "the config has a recipe of this name",
    "gpt-4o": "the config has an alias of this name",
    "claude-9": "the alias 'claude-*' of the config stands for this name",
    "food": "the config has a category of this name",
    "auto:x": "the prefix 'auto' is reserved",
}


async def test_names_that_are_taken_and_wrong_fields_are_refused(tmp_path: Path) -> None:
    given = config(
        tmp_path,
        kinds={"p": {"vllm": {"spare_adapters": 1}}},
        aliases={"gpt-4o": "auto", "claude-*": "general"},
        recipes={"cheap": {"kind": "cascade", "members": ["general"], "later": ["other"]}},
        categories={"food": {"examples": FOOD, "expert": "other"}},
    )
    path = adapter(tmp_path)
    lora = {"base": "general", "adapter": path}
    wrong = [
        *(({"name": name, **lora}, 409, why) for name, why in TAKEN.items()),
        ({"name": "x", "base": "nobody", "adapter": path}, 409, "no expert 'nobody'"),
        ({"name": "x", **lora, "categories": ["general"]}, 409, "general is that of the fallback"),
        ({"name": "x", **lora, "examples": {"food": LAW}}, 409, "there is a category of this name"),
        ({"name": "x", **lora, "examples": {"law": LAW[:2]}}, 409, "2 examples are too few"),
        ({"name": "x", **lora, "examples": {"other": LAW}}, 409, "an expert of this name"),
        ({"name": "x", **lora, "max_lora": 3}, 400, "unknown key"),
        ({"name": "x", "model": path}, 400, "an added expert has a `base`"),
        ({"name": "x", "base": "general"}, 400, "base goes together with"),
        ({"name": "x", "base": "general", "adapter": "org/name"}, 400, "absolute path"),
        ({"name": "x", "base": "general", "adapter": "./law"}, 400, "absolute path"),
        ({"name": "x y", **lora}, 400, "name: a name of"),
        (lora, 400, "name: a name of"),
        ([lora], 400, "must be a JSON object"),
    ]
    async with run_gateway(given) as stage:
        before = stage.gateway.current
        for body, expected, why in wrong:
            status, _, told = await stage.ask(body, "/admin/experts", headers=ADMIN)
            assert (status, why in told["error"]["message"]) == (expected, True), told
        assert stage.gateway.current is before
        assert await added(stage) == {}
        assert (await add(stage, name="x", **lora))[0] == 200
        assert (await add(stage, name="x", **lora))[0] == 409
        status, told = await add(stage, name="y", **lora)
        assert (status, "spare_adapters is 1" in told["error"]["message"]) == (409, True)
        assert (await remove(stage, "general"))[0] == 409
        assert (await remove(stage, "nobody"))[0] == 404


async def test_bad_adapters_are_refused_before_anything_changes(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    elsewhere = adapter_folder(tmp_path / "elsewhere" / "law")
    adapter(tmp_path, "wide", rank=16)
    adapter(tmp_path, "other-rank")
    (root / "other-rank" / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    adapter(tmp_path, "dora", use_dora=True)
    pickled = Path(adapter(tmp_path, "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = Path(adapter(tmp_path, "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"\x80\x04")
    (root / "empty").mkdir()
    os.symlink(elsewhere, root / "link")
    bad = {
        str(elsewhere): (400, "the folder lies below none of"),
        str(root / "link"): (400, "the folder lies below none of"),
        str(root / ".." / "elsewhere" / "law"): (400, "the folder lies below none of"),
        str(root): (400, "the folder lies below none of"),
        "/etc": (400, "the folder lies below none of"),
        str(root / "wide"): (409, "its rank is 16, and pools.p.vllm.max_lora_rank is 8"),
        str(root / "other-rank"): (409, "has rank 4"),
        str(root / "dora"): (409, "DoRA"),
        str(root / "pickled"): (409, "adapter_model.safetensors is missing"),
        str(root / "broken"): (409, "adapter_model.safetensors"),
        str(root / "empty"): (409, "adapter_config.json"),
        str(root / "nothing"): (409, "adapter_config.json"),
        f"org/name@{'a' * 40}": (409, "not in the model store"),
    }
    async with run_gateway(config(tmp_path)) as stage:
        for path, (expected, why) in bad.items():
            status, told = await add(stage, name="x", base="general", adapter=path)
            assert (status, why in told["error"]["message"]) == (expected, True), (path, told)
        assert await added(stage) == {}
        (snapshot,) = snapshots(stage)
        assert (set(snapshot.experts), snapshot.added) == ({"general", "other"}, 0)


async def test_adapter_that_the_engine_refuses_is_taken_back(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        for engine in stage.pools["p"].engines:

            async def refuse(expert: str, adapter: str | None = None) -> None:
                raise ExpertFailedError("the engine does not know this module")

            engine.load = refuse  # type: ignore[method-assign]
        status, told = await add(stage, name="law", base="general", adapter=adapter(tmp_path))
        assert (status, told["error"]["code"]) == (503, "expert_failed")
        assert "does not know this module" in told["error"]["message"]
        assert await added(stage) == {}
        await until(
            lambda: set(snapshots(stage)[0].experts) == {"general", "other"}, "nothing is left"
        )
        assert await status_of(stage, "law") == 404


async def test_config_wins_over_added_experts_and_they_come_back(tmp_path: Path) -> None:
    plain = config(tmp_path)
    async with run_gateway(plain) as stage:
        assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[0] == 200
        clash = config(
            tmp_path,
            experts={
                "general": {"model": "m"},
                "other": {"model": "n"},
                "law": {"base": "other", "defaults": {"max_tokens": 1}},
            },
        )

        async def reload(to: Config) -> None:
            await stage.gateway.reload(to)
            await stage.pools["p"].process.reload(to)

        await reload(clash)
        found = (await added(stage))["law"]
        assert (found["state"], found["reason"]) == (
            "left out",
            "expert 'law': the config has an expert of this name",
        )
        _, _, answer = await stage.ask(chat(model="law"))
        assert answer["usage"]["completion_tokens"] == 1
        await reload(plain)
        assert (await added(stage))["law"]["state"] == "served"
        _, _, answer = await stage.ask(chat(model="law", max_tokens=2))
        assert answer["usage"]["completion_tokens"] == 2


async def test_roots_of_the_config_hold_for_experts_that_were_added_before(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[0] == 200
        narrow = simulated(
            {"p": {}},
            experts={"general": {"model": "m"}, "other": {"model": "n"}},
            kinds={"p": {"vllm": {"spare_adapters": 3}}},
        )
        await stage.gateway.reload(narrow)
        await stage.pools["p"].process.reload(narrow)
        found = (await added(stage))["law"]
        assert (found["state"], "lies below none of" in found["reason"]) == ("left out", True)
        await until(lambda: "law" not in snapshots(stage)[0].experts, "the pool drops it")
        assert await status_of(stage, "law") == 404


async def test_damaged_store_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "experts.json"
    path.write_bytes(b"{")
    given = config(tmp_path, file=str(path))
    async with run_gateway(given) as stage:
        looks = 0
        real = stage.gateway.added._repository.load

        async def load() -> Any:
            nonlocal looks
            looks += 1
            return await real()

        stage.gateway.added._repository.load = load  # type: ignore[method-assign]
        await until(lambda: looks > 3, "it looks again and again")
        told = [one.message for one in caplog.records if "damaged" in one.message]
        assert len(told) == 1
        path.unlink()
        assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[0] == 200


async def test_vllm_s_names_add_and_remove_an_adapter(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path, experts={"general": {"model": "m"}})) as stage:
        body = {"lora_name": "law", "lora_path": adapter(tmp_path)}

        async def call(act: str, body: Any) -> tuple[int, str]:
            async with stage.post(body, f"/v1/{act}_lora_adapter", headers=ADMIN) as reply:
                return reply.status, await reply.text()

        status, text = await call("load", body)
        assert (status, text) == (200, "Success: LoRA adapter 'law' added successfully.")
        assert await status_of(stage, "law") == 200
        assert (await call("load", body))[0] == 409
        assert (await call("load", {**body, "load_inplace": True}))[0] == 200
        assert (await call("load", {**body, "is_3d_lora_weight": True}))[0] == 400
        assert (await call("load", {**body, "lora_path": 3}))[0] == 400
        assert (await call("load", {**body, "base": "general"}))[0] == 400
        assert (await call("unload", {"lora_name": "law", "lora_int_id": 1}))[0] == 400
        status, text = await call("unload", {"lora_name": "law"})
        assert (status, text) == (200, "Success: LoRA adapter 'law' removed successfully.")
        assert (await call("unload", {"lora_name": "law"}))[0] == 404
        async with stage.post(body, "/v1/load_lora_adapter") as reply:
            assert reply.status == 401
        assert await added(stage) == {}


async def test_adapter_by_vllm_s_name_needs_a_single_base(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        body = {"lora_name": "law", "lora_path": adapter(tmp_path)}
        status, _, told = await stage.ask(body, "/v1/load_lora_adapter", headers=ADMIN)
        assert (status, "general, other" in told["error"]["message"]) == (409, True)
        for wrong in ({"lora_name": "x y"}, {"lora_path": "a/b"}, {"lora_path": "/a\0b"}):
            status, _, told = await stage.ask(
                {**body, **wrong}, "/v1/load_lora_adapter", headers=ADMIN
            )
            assert status == 400, told
    none = config(tmp_path, kinds={})
    async with run_gateway(none) as stage:
        status, _, told = await stage.ask(body, "/v1/load_lora_adapter", headers=ADMIN)
        assert (status, "no engine has room" in told["error"]["message"]) == (409, True)


async def test_only_the_admin_adds_and_the_audit_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"name": "law", "base": "general", "adapter": adapter(tmp_path)}
    async with run_gateway(config(tmp_path)) as stage:
        assert (await stage.ask(body, "/admin/experts"))[0] == 401
        async with stage.client.delete(f"{stage.url}/admin/experts/law") as reply:
            assert reply.status == 401
        with caplog.at_level("INFO", logger="coe.audit"):
            assert (await add(stage, **body))[0] == 200
            assert (await remove(stage, "law"))[0] == 200
        acts = [record.__dict__ for record in caplog.records if hasattr(record, "act")]
        assert [(one["act"], one["outcome"], one["expert"]) for one in acts] == [
            ("POST /admin/experts", "200", "law"),
            ("DELETE /admin/experts/law", "200", "law"),
        ]


async def test_merged_adapter_takes_turns_where_adapters_can_t_be_added(tmp_path: Path) -> None:
    kinds = {"p": {"slots": 1, "vllm": {"spare_adapters": 3}}}
    async with run_gateway(config(tmp_path, kinds=kinds)) as stage:
        path = adapter(tmp_path)
        status, told = await add(stage, name="law", base="general", adapter=path)
        assert (status, "form: merged" in told["error"]["message"]) == (409, True)
        engines = list(stage.pools["p"].engines)
        status, told = await add(stage, name="law", base="general", adapter=path, form="merged")
        assert status == 200, told
        assert await status_of(stage, "law") == 200
        assert await status_of(stage, "general") == 200
        assert (await remove(stage, "law"))[0] == 200
        assert await status_of(stage, "general") == 200
        assert stage.pools["p"].engines == engines


async def test_new_pool_gets_the_added_experts_from_a_gateway(tmp_path: Path) -> None:
    given = config(tmp_path)
    async with run_gateway(given) as stage:
        assert (await add(stage, name="law", base="general", adapter=adapter(tmp_path)))[0] == 200
        async with run_pool(given, "p") as another:
            old = stage.pools["p"]
            stage.gateway.directory.update([old.address, another.address])
            await until(
                lambda: "law" in another.process.pool.snapshot().experts, "it was handed on"
            )
            stage.gateway.directory.update([old.address])
            await until(
                lambda: another.address.boot not in stage.gateway.directory.followed, "it is gone"
            )


@asynccontextmanager
async def second_gateway(given: Config, stage: RunningGateway) -> AsyncIterator[RunningGateway]:
    gateway = GatewayRuntime(
        given, "second", SECRET, admin_key=ADMIN_KEY, wake=lambda _: None, behind_serve=False
    )
    await gateway.start()
    try:
        gateway.directory.update([pool.address for pool in stage.pools.values()])
        async with serving(gateway) as served:
            other = RunningGateway(gateway, served.url, stage.client, stage.pools)
            await until(lambda: len(gateway.directory.links()) == len(stage.pools), "it has links")
            yield other
    finally:
        await gateway.stop()


async def test_gateways_with_a_shared_store_agree(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        store = {"kind": "redis", "url": redis.url, "timeout_ms": 20_000}
        given = config(tmp_path, store=store)
        async with run_gateway(given) as first, second_gateway(given, first) as second:
            both = (first, second)

            async def everywhere(status: int) -> bool:
                # A gateway that does not know yet would wait for a pool with the expert.
                found = [await status_of(stage, "law", 1000) for stage in both]
                return found == [status, status]

            lora = {"name": "law", "base": "general", "adapter": adapter(tmp_path)}
            assert (await add(first, **lora))[0] == 200
            await until(lambda: everywhere(200), "both serve it")
            assert (await add(second, **lora))[0] == 409
            assert (await remove(second, "law"))[0] == 200
            await until(lambda: everywhere(404), "no one serves it")
            # Both at once: one of them adds it.
            results = await asyncio.gather(*(add(stage, **lora) for stage in both))
            assert sorted(status for status, _ in results) == [200, 409]
            await until(lambda: everywhere(200), "both serve it again")
