"""How often a turn of a conversation goes to the pool that has it in its prefix cache.

Four pools of one expert on the simulated engine, and one, two or four gateways. Conversations run
side by side, and each turn opens a connection of its own, so that any gateway may get it. The
gateways count where later turns went. A gateway by itself would know one in as many turns as there
are gateways.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from loadtests.lib.child_processes import admin_key_of, fetch, say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.median_intervals import Estimate
from loadtests.lib.redis_server import redis_server
from loadtests.lib.targets_and_report import Report, Table, at_least

GATEWAYS = (1, 2, 4)
POOLS = 4
_CONVERSATIONS, _TURNS = 24, 8
_WORDS = 300
_METRIC = "coe_prefix_cache_turns_total{"
_PLACES = ("cached", "elsewhere", "unknown")


def measure(report: Report, port: int) -> None:
    """Run the conversations with each number of gateways.

    Raises:
        RuntimeError: A service did not come up, or a request failed.
    """
    table = Table(
        f"Later turns of {_CONVERSATIONS} conversations with {POOLS} pools, in %",
        ("gateways", *_PLACES),
    )
    report.tables.append(table)
    cached = 0.0
    for gateways in GATEWAYS:
        say(f"{gateways} gateways")
        options = {
            "prefill_tokens_per_s": 2000,
            "decode_ms": 5,
            "tokens": 8,
            "max_model_len": 32_768,
        }
        settings = config(
            port,
            {"general": {"model": "general", "categories": ["general"]}},
            {"sim": {"engine": "simulated", "simulated": options, "min_replicas": POOLS}},
        )
        settings["server"]["gateways"] = gateways
        settings["store"] = {"kind": "redis", "url": f"redis://127.0.0.1:{port + 2}/0"}
        with redis_server(port + 2), serving(settings):
            asyncio.run(_converse(port))
            _, text = fetch(port, "/metrics", admin_key=admin_key_of())
        turns = turns_by_place(text.decode())
        total = sum(turns.values())
        if total < _CONVERSATIONS * (_TURNS - 1) / 2:
            raise RuntimeError(f"{total:.0f} turns were counted")
        shares = [turns.get(place, 0.0) / total for place in _PLACES]
        table.rows.append((str(gateways), *(f"{100 * share:.1f}" for share in shares)))
        report.facts[f"cached_{gateways}_gateways"] = cached = shares[0]
    report.reach.append(
        at_least(
            f"turns that find their prefix with {GATEWAYS[-1]} gateways",
            0.9,
            Estimate(cached, cached, cached),
        )
    )


def turns_by_place(text: str) -> dict[str, float]:
    """Counts of later turns by where they went, over all gateways, from metrics."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(_METRIC):
            place = line.partition('place="')[2].partition('"')[0]
            found[place] = found.get(place, 0.0) + float(line.rpartition(" ")[2])
    return found


async def _converse(port: int) -> None:
    # A connection is closed after each request: the next may reach another gateway.
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(_conversation(session, port, i) for i in range(_CONVERSATIONS)))


async def _conversation(session: aiohttp.ClientSession, port: int, number: int) -> None:
    messages: list[dict[str, Any]] = []
    for turn in range(_TURNS):
        text = " ".join(f"{number}-{turn}-{word}" for word in range(_WORDS))
        messages.append({"role": "user", "content": text})
        body = {"model": "general", "messages": messages}
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}: {(await reply.text())[:200]}")
            answer = (await reply.json())["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        # A person reads, or a tool runs.
        await asyncio.sleep(0.3)
