"""Kills the core process of a real vLLM engine with running requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import orjson
import psutil

from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import serving
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

_CORE = "EngineCore"
_REQUESTS = 8
_TOKENS = 48
_DEADLINE_S = 180.0


def _settings(port: int) -> dict[str, Any]:
    return {
        "server": {"port": port, "drain_s": 5.0},
        "experts": {"small": {"model": "smollm2-135m-instruct", "categories": ["general"]}},
        "pools": {
            "cpu": {
                "vllm": {
                    "dtype": "float32",
                    "kv_cache_bytes": "256MiB",
                    "max_model_len": 1024,
                    "enforce_eager": True,
                }
            }
        },
    }


async def _ask(session: aiohttp.ClientSession, port: int, number: int) -> tuple[str, str, float]:
    """Send a request; return its kind of end, its text and its duration in s."""
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": f"Count up from {number}."}],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"x-coe-deadline-ms": str(int(_DEADLINE_S * 1000))}
    began_s = time.monotonic()
    try:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with session.post(url, json=body, headers=headers) as reply:
            data = orjson.loads(await reply.read())
    except (aiohttp.ClientError, OSError, orjson.JSONDecodeError) as error:
        return type(error).__name__, "", time.monotonic() - began_s
    took_s = time.monotonic() - began_s
    if reply.status != 200:
        return f"{reply.status} {data['error']['code']}", "", took_s
    return "right", data["choices"][0]["message"]["content"], took_s


def _core(pid: int) -> psutil.Process:
    for process in psutil.Process(pid).children(recursive=True):
        if _CORE in (" ".join(process.cmdline()) or process.name()):
            return process
    raise RuntimeError("no engine core found to kill")


async def real(port: int, report: Report) -> None:
    """Kill the engine's core while requests run.

    The next engine must answer each request as the killed one would have.
    """
    context = serving(_settings(port))
    pid = await asyncio.to_thread(context.__enter__)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            expected = [await _ask(session, port, 0)]
            requests = [asyncio.create_task(_ask(session, port, i)) for i in range(_REQUESTS)]
            await asyncio.sleep(0.5)
            core = _core(pid)
            say(f"killing the engine's core ({core.pid})")
            core.kill()
            ended = await asyncio.gather(*requests)
            again = await _ask(session, port, 0)
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)
    kinds = [kind for kind, _, _ in ended]
    right = kinds.count("right")
    typed = sum(kind[:1].isdigit() for kind in kinds)
    longest_s = max(took_s for _, _, took_s in ended)
    table = Table(
        "A real engine killed under requests", ("requests", "right", "typed", "longest, s")
    )
    table.rows.append((str(_REQUESTS), str(right), str(typed), f"{longest_s:.1f}"))
    report.tables.append(table)
    same = expected[0][1] == again[1] != ""
    report.reach += [
        TargetCheck(
            "requests on a killed real engine answered right or typed, at least",
            float(_REQUESTS),
            float(right + typed),
            right + typed == _REQUESTS,
        ),
        TargetCheck(
            "the same text as before from the engine that came after", 1.0, float(same), same
        ),
    ]
    report.facts["real"] = {"ended": kinds, "longest_s": longest_s}
