"""From traffic to a promoted map: shadow evaluation, export, refit, link, and reload."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from router_models import router_fit
from router_models.fit_settings import Settings
from service.classifier.hashed_ngrams import FeatureSpec
from service.cli import cli
from service.config import Config, load_config
from service.deployment.config_reload import RunningConfig, follow, reload, version
from service.engine import simulated_engine as engine
from service.gateway.gateway_reload import GatewayRuntime
from service.store.api_keys import digest_of
from tests.support.in_process_service import SECRET, RunningGateway, chat, run_gateway, serving
from tests.support.polling import until

KEY = "a-key-of-the-tests-a"
BEARER = {"authorization": f"Bearer {KEY}"}
SUMS, TALES = "add the cows, total number {}", "the dragon king of castle {}"
PROMPTS = 60


def answer_text(expert: str, prompt: str, tokens: int) -> list[str]:
    """`small` is wrong, and the two others agree."""
    return ["The", " answer", " is", " 5." if expert == "small" else " 4.", " end"]


def fitted(folder: Path) -> Path:
    """An artifact that takes `small` for the best at sums."""
    lines = []
    for i in range(80):
        category, text = (("sums", SUMS), ("tales", TALES))[i % 2]
        right = {"small": category == "sums", "large": False, "third": category == "tales"}
        lines.append(
            {
                "id": str(i),
                "prompt": text.format(f"x{i}"),
                "category": category,
                "outcomes": {name: {"score": int(ok)} for name, ok in right.items()},
            }
        )
    (folder / "recorded.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "costs.json").write_text(json.dumps(dict.fromkeys(("small", "large", "third"), 1.0)))
    router_fit.run(
        outcomes=[folder / "recorded.jsonl"],
        costs=folder / "costs.json",
        out=folder / "first@1",
        settings=Settings(spec=FeatureSpec(bits=10, known_bits=14)),
        say=lambda line: None,
    )
    return folder / "first@1"


def config_file(folder: Path) -> Path:
    experts = {name: {"model": "m", "categories": [of]} for name, of in EXPERTS.items()}
    price = {"prompt": 1, "completion": 1}
    given = {
        "router": {"artifact": "./current@1"},
        "experts": {name: {**one, "price": price} for name, one in experts.items()},
        "pools": {"cpu": {"engine": "simulated", "simulated": {"tokens": 4, "decode_ms": 0}}},
        "keys": {"acme": {"tenant": "acme", "sha256": digest_of(KEY)}},
        "tenants": {"acme": {"shadow": True}},
        "shadow": {
            "share": 1.0,
            "budget": {"amount": 10},
            "folder": str(folder / "outcomes"),
            "max_queued": 1000,
            "promote": {"min_rows": 20},
        },
    }
    path = folder / "coe.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


EXPERTS = {"small": "sums", "third": "tales", "large": "general"}


@asynccontextmanager
async def beside(s: RunningGateway, config: Config) -> AsyncIterator[RunningGateway]:
    """Another gateway to the same pools."""
    gateway = GatewayRuntime(
        config, "second", SECRET, admin_key=None, wake=lambda _: None, behind_serve=False
    )
    await gateway.start()
    try:
        gateway.directory.update([pool.address for pool in s.pools.values()])
        async with serving(gateway) as served:
            other = replace(s, gateway=gateway, url=served.url)
            links = gateway.directory.links
            await until(lambda: any(link.snapshot for link in links()), "it knows the pools")
            yield other
    finally:
        await gateway.stop()


async def expert_of(s: RunningGateway, text: str) -> str:
    async with s.post({**chat(text), "model": "auto", "stop": " end"}, headers=BEARER) as reply:
        assert reply.status == 200, await reply.text()
        await reply.read()
        return str(reply.headers["x-coe-expert"])


def coe(*words: Any) -> str:
    result = CliRunner().invoke(cli, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(folder: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in folder.rglob("*.jsonl"))


async def test_refit_map_of_traffic_is_promoted_and_reaches_every_running_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "answer_text", answer_text)
    link = tmp_path / "current@1"
    link.symlink_to(await asyncio.to_thread(fitted, tmp_path))
    path = config_file(tmp_path)
    config = load_config(path)
    in_force = tmp_path / "config.json"
    RunningConfig(str(path), config, config).save(in_force)
    async with run_gateway(config) as first, beside(first, config) as second:
        gateways = [first, second]
        seen = version(in_force)
        following = [
            asyncio.create_task(follow(in_force, seen, s.gateway.reload)) for s in gateways
        ]
        try:
            for s in gateways:
                assert await expert_of(s, SUMS.format("first")) == "small"
            for i in range(PROMPTS):
                assert await expert_of(gateways[i % 2], SUMS.format(f"y{i}")) == "small"
            await until(
                lambda: rows(tmp_path / "outcomes") >= PROMPTS + 2, "every request is compared"
            )
            exported, candidate = tmp_path / "traffic.jsonl", tmp_path / "next@2"
            await asyncio.to_thread(coe, "outcomes", "export", "--config", path, "--out", exported)
            found = json.loads(
                await asyncio.to_thread(
                    coe,
                    *("router", "refit", "--config", path, "--outcomes", exported),
                    *("--out", candidate, "--link", link, "--json"),
                )
            )
            assert (found["promoted"], found["linked"]) == (True, True)
            assert link.resolve() == candidate.resolve()
            # The file of the config is the same to the byte: only the link leads elsewhere.
            assert await expert_of(gateways[0], SUMS.format("before the reload")) == "small"
            changed = await asyncio.to_thread(reload, in_force)
            assert changed == {"added": [], "removed": [], "changed": []}

            async def all_changed() -> bool:
                asked = [await expert_of(s, SUMS.format("after")) for s in gateways]
                return all(name != "small" for name in asked)

            await until(all_changed, "both gateways choose by the promoted map")
            # What no outcome spoke of is as it was.
            assert await expert_of(gateways[1], TALES.format("after")) == "third"
        finally:
            for task in following:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
