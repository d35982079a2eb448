"""A site with something of everything, and traffic that makes every one of our metrics move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import numpy as np
import orjson

from router_models.category_fit import fit_categories, write_artifact
from router_models.labelled_prompt_reader import LabelledPrompt
from service.classifier.static_embedding_table import built_in_table
from service.config import Config
from service.encoder.onnx_encoder import OnnxEncoder
from service.engine.engine_interface import RoutingSample
from service.gpu_devices import GpuMemory
from service.telemetry import metric_declarations
from tests.integration.test_recipes import Cast
from tests.support.answer_gate import held_requests
from tests.support.in_process_service import (
    CHAT,
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)
from tests.support.polling import until
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts

# The simulated pool is said to be on it.
GPU = GpuMemory(0, "GPU-0", "H200", 140 << 30, 60 << 30, 79 << 30)
# The first two differ, so that the cascade goes on to the strong one.
LINES = {"far": "41", "near": "42", "strong": "The answer is 42."}


def everything(url: str) -> Config:
    """Two experts that share a slot, remote ones with a cascade, prices and a budget."""
    local = simulated({"cpu": {"tokens": 6, "decode_ms": 2, "swap_s": 0.01}})
    given = local.model_dump(mode="json", exclude_defaults=True)
    price = {"prompt": 10.0, "completion": 10.0}

    def far(name: str) -> dict[str, object]:
        return {"remote": {"url": url + "/v1", "model": name}, "price": price}

    given["experts"] = {
        "general": {"model": "m", "categories": ["general"], "price": price},
        "math": {"model": "m", "categories": ["math"], "price": price},
        "far": far("far"),
        "near": far("near"),
        "strong": far("strong"),
    }
    given["recipes"] = {
        "careful": {"kind": "cascade", "members": ["far", "near"], "later": ["strong"]}
    }
    given["pools"]["cpu"] |= {"slots": 1, "swap": {"min_stay_s": 0.02}, "gpus": 1}
    given["tenants"] = {
        "default": {
            "guard": {"pii": {"action": "flag"}},
            "cache": {"mode": "exact"},
        }
    }
    # A weight of 0 keeps the requests of this name at one target.
    given["aliases"] = {"shared": {"general": 1, "far": 0}}
    # The second of a round makes room for the third.
    given["responses"] = {"enabled": True, "tenant_entries": 2}
    given["budgets"] = {"all": {"amount": 1000.0, "period": "day"}}
    return Config.model_validate(given)


def learning(folder: Path) -> dict[str, Any]:
    """Sections of a config: a classifier that always asks its encoder, and shadow evaluation."""
    encoder = make_encoder(folder / "encoder")
    rows = [LabelledPrompt(text, subject) for subject in SUBJECTS for text in prompts(subject, 20)]
    fitted = fit_categories(rows, built_in_table(), OnnxEncoder(encoder), say=lambda _: None)
    write_artifact(fitted, folder / "mine@1", [], {})
    return {
        "router": {
            "artifact": str(folder / "mine@1"),
            "encoder": {
                "model": str(encoder),
                "when_below": 1.0,
                "min_gain": 0.0,
                "timeout_ms": 1000,
            },
        },
        "shadow": {
            "share": 1.0,
            "experts": ["general", "near", "far"],
            "judge": "strong",
            "budget": {"amount": 100},
            "folder": str(folder / "outcomes"),
        },
    }


@asynccontextmanager
async def busy_site(folder: Path) -> AsyncIterator[RunningGateway]:
    """The site, and its upstream; files go into `folder`."""
    cast = Cast()
    cast.lines = dict(LINES)
    async with serving(cast) as upstream:
        given = everything(upstream.url).model_dump(mode="json", exclude_defaults=True)
        given["tenants"]["default"]["shadow"] = True
        with mock.patch("service.pool.pool_process.visible_gpus", return_value=(GPU,)):
            async with run_gateway(Config.model_validate(given | learning(folder))) as s:
                yield s


def routers_choose(s: RunningGateway) -> None:
    """As an engine tells it that runs a mixture of experts."""
    stretch = np.zeros((1, 32, 2), np.int16)
    stretch[:, :, 1] = 1
    load = np.array([[32, 32, 0, 0]], np.int64)
    sample = RoutingSample("general", (0,), 4, 2, 32, load, (stretch,))
    s.pools["cpu"].process.pool_metrics.on_routing_sample(sample)


def swap_method_is_told(s: RunningGateway) -> None:
    """As in a pool of real engines that take turns."""
    registry = s.pools["cpu"].process.pool_metrics.registry
    registry.put(metric_declarations.SWAP_METHOD, 1, "sleep", "proof")


def experts_were_idle(s: RunningGateway) -> None:
    """As where nobody had asked for them for a while."""
    slot = s.pools["cpu"].process.pool.slots[0]
    for expert in ("general", "math"):
        slot.unloads[expert, "idle"] += 1


def alias_is_rolled_back(s: RunningGateway) -> None:
    """As by many failures of a target."""
    registry = s.gateway.state.metrics.registry
    registry.add(metric_declarations.ALIAS_ROLLBACKS, 1, "shared", "far", "errors")


async def round_of_traffic(s: RunningGateway) -> None:
    """Every kind of request once: streamed or not, routed, swapped, remote, refused, failed."""
    routers_choose(s)
    swap_method_is_told(s)
    alias_is_rolled_back(s)
    experts_were_idle(s)
    for model in ("general", "math", "auto", "auto/math"):
        for stream in (True, False):
            async with s.post(chat(model=model, stream=stream, max_tokens=6)) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
    usage = {"stream_options": {"include_usage": True}}
    for model in ("far", "careful"):
        async with s.post(chat(model=model, stream=model == "far", **usage)) as reply:
            assert reply.status == 200, await reply.text()
            await reply.read()
    status, _, _ = await s.ask(chat("write to somebody@example.com", model="general"))
    assert status == 200
    for _ in range(2):
        kept = {"x-coe-cache": "exact"}
        status, _, _ = await s.ask(chat("again", model="general", temperature=0), headers=kept)
        assert status == 200
    for content in ("how do I bake lasagna?", "and which sauce?"):
        session = {"x-session-id": "dinner"}
        status, _, _ = await s.ask(chat(content, model="auto"), headers=session)
        assert status == 200
    turns = [
        {"role": "user", "content": "how do I bake lasagna?"},
        {"role": "assistant", "content": "slowly"},
        {"role": "user", "content": "and then?"},
    ]
    for messages in (turns[:1], turns):
        status, _, _ = await s.ask({"model": "general", "messages": messages})
        assert status == 200
    status, _, _ = await s.ask(chat("hello", model="shared"))
    assert status == 200
    status, _, _ = await s.ask(chat(model="nobody"))
    assert status == 404
    for _ in range(3):
        status, _, _ = await s.ask({"model": "general", "input": "hello"}, "/v1/responses")
        assert status == 200
    await a_batch_ends(s)


async def a_batch_ends(s: RunningGateway) -> None:
    """A batch of one line."""
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": chat(model="general")}
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", orjson.dumps(line), filename="lines.jsonl")
    async with s.client.post(s.url + "/v1/files", data=form) as reply:
        assert reply.status == 200, await reply.text()
        file = (await reply.json())["id"]
    wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    status, _, batch = await s.ask(wanted, "/v1/batches")
    assert status == 200, batch

    async def over() -> bool:
        async with s.client.get(f"{s.url}/v1/batches/{batch['id']}") as reply:
            return bool((await reply.json())["status"] == "completed")

    await until(over, "the batch is completed")


async def an_engine_dies(s: RunningGateway) -> None:
    """While requests run on it: they are answered by the next one."""
    pool = s.pools["cpu"]
    with held_requests() as gate:
        running = [asyncio.create_task(s.ask(chat(model="general"))) for _ in range(2)]
        await until(lambda: pool.engine.now == 2, "both run")
        pool.engine.kill("told to die")
        gate.open()
    for status, _, _ in await asyncio.gather(*running):
        assert status == 200
