"""Measures how traffic shifts from the best expert to others as load grows.

The real service around the simulated engine, `auto:fast`, requests at a steady rate. With
room for `_ROOM` requests of `_EACH_S` each, the best expert can answer so many a second;
beyond that its queue grows, until waiting for it costs λ · T = the lead of quality. There the
formula says that the rest goes to the next best.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import serving
from loadtests.lib.median_intervals import percentile
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.config.router_presets import FastPresetConfig

_ROOM, _TOKENS, _STEP_MS = 4, 10, 20.0
# The first token is there at once.
_EACH_S = (_TOKENS - 1) * _STEP_MS / 1000
_LEAD = 0.25
_TIME_PRICE = FastPresetConfig().time_price
_LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
_FOR_S = 8.0
_GROWN = 3.0
# What a share may be off by, in the middle of a run of random length.
_NEAR = 0.08


@dataclass(frozen=True, slots=True)
class ShareResult:
    """At one load: the share that the best expert answered, the waits of those in s."""

    load: float
    share: float
    waits_s: list[float]
    failed: int


def _config(port: int) -> dict[str, object]:
    simulated = {"decode_ms": _STEP_MS, "max_num_seqs": _ROOM, "tokens": _TOKENS}
    return {
        "server": {"port": port, "drain_s": 5.0},
        "experts": {
            "best": {"model": "m", "categories": ["general"], "quality": {"general": 0.9}},
            "next": {"model": "m", "quality": {"general": 0.9 - _LEAD}},
        },
        "pools": {
            "a": {"engine": "simulated", "experts": ["best"], "simulated": simulated},
            # Room for all: what it answers is what came to it.
            "b": {
                "engine": "simulated",
                "experts": ["next"],
                "simulated": {**simulated, "max_num_seqs": 512},
            },
        },
    }


async def _at(session: aiohttp.ClientSession, url: str, load: float) -> ShareResult:
    rate = load * _ROOM / _EACH_S
    body = {
        "model": "auto:fast",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": _TOKENS,
        "stream": True,
    }
    # Until the queue has grown to where the formula holds it, all goes to the best.
    grown_s = _LEAD / _TIME_PRICE / (load - 1) + 1.0 if load > 1 else 1.0
    for_s = max(_FOR_S, _GROWN * grown_s)
    answered: list[tuple[float, str, float]] = []
    failed = 0

    async def ask(at_s: float) -> None:
        nonlocal failed
        async with session.post(url, json=body) as reply:
            await reply.read()
            if reply.status != 200:
                failed += 1
                return
            wait_s = float(reply.headers["x-coe-queue-ms"]) / 1000
            answered.append((at_s, reply.headers["x-coe-expert"], wait_s))

    began_s = time.monotonic()
    tasks = []
    for number in range(int(rate * for_s)):
        left_s = began_s + number / rate - time.monotonic()
        if left_s > 0:
            await asyncio.sleep(left_s)
        tasks.append(asyncio.create_task(ask(time.monotonic() - began_s)))
    await asyncio.gather(*tasks)
    steady = [one for one in answered if one[0] >= grown_s]
    mine = [wait for _, expert, wait in steady if expert == "best"]
    return ShareResult(load, len(mine) / max(1, len(steady)), mine, failed)


async def _sweep(port: int) -> list[ShareResult]:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await _at(session, url, 0.3)  # warms up, and is measured by the service
        found = []
        for load in _LOADS:
            say(f"at {load:g} of what the best expert can answer")
            found.append(await _at(session, url, load))
            await asyncio.sleep(_LEAD / _TIME_PRICE + 1)
    return found


def measure(report: Report, port: int, plot: Path | None) -> None:
    """Sweep the load. Raises RuntimeError where the service does not come up."""
    with serving(_config(port)):
        found = asyncio.run(_sweep(port))
    table = Table(
        "Share of the best expert against load; it may be waited for "
        f"{_LEAD / _TIME_PRICE:g} s longer",
        ("load", "share", "by the formula", "median wait s", "95 % of waits s", "failed"),
    )
    report.tables.append(table)
    worst = 0.0
    for seen in found:
        expected = min(1.0, 1.0 / seen.load)
        worst = max(worst, abs(seen.share - expected))
        waits = seen.waits_s or [0.0]
        table.rows.append(
            (
                f"{seen.load:g}",
                f"{seen.share:.3f}",
                f"{expected:.3f}",
                f"{percentile(waits, 50):.2f}",
                f"{percentile(waits, 95):.2f}",
                str(seen.failed),
            )
        )
    over = [percentile(seen.waits_s or [0.0], 50) for seen in found if seen.load >= 1.5]
    lead_s = _LEAD / _TIME_PRICE
    off = max(abs(wait - lead_s) for wait in over)
    report.reach += [
        TargetCheck("share off the formula's, at most", _NEAR, round(worst, 4), worst <= _NEAR),
        TargetCheck(
            "wait at which traffic moves, off the formula's, in batches, at most",
            1.5,
            round(off / _EACH_S, 3),
            off <= 1.5 * _EACH_S,
        ),
        TargetCheck(
            "failed requests, at most",
            0,
            sum(s.failed for s in found),
            not any(s.failed for s in found),
        ),
    ]
    report.facts["share"] = [
        {"load": s.load, "share": s.share, "median_wait_s": percentile(s.waits_s or [0.0], 50)}
        for s in found
    ]
    if plot is not None:
        _draw(found, plot)


def _draw(found: list[ShareResult], path: Path) -> None:
    import matplotlib  # for plots only, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    loads = [seen.load for seen in found]
    fine = [0.4 + 0.02 * i for i in range(136)]
    left.plot(fine, [min(1, 1 / load) for load in fine], "k--", label="by the formula")
    left.plot(loads, [seen.share for seen in found], "C0o-", label="measured")
    left.set(xlabel="load, of what the best expert can answer", ylabel="share of the best expert")
    left.legend()
    right.axhline(_LEAD / _TIME_PRICE, color="k", linestyle="--", label="lead / λ")
    right.plot(
        loads, [percentile(seen.waits_s or [0.0], 50) for seen in found], "C1o-", label="median"
    )
    right.set(xlabel="load", ylabel="wait for the best expert, s")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
