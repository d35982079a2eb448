"""Ours and LiteLLM's proxy in front of the same upstream, taking turns."""

from __future__ import annotations

import secrets
from contextlib import ExitStack

from loadtests.gateway import litellm_server
from loadtests.gateway.gateway_overhead import CHUNKS, STEP_MS, STREAMS, body, rate, streams
from loadtests.lib import median_intervals
from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.fake_openai_start import fake_upstream
from loadtests.lib.load_client import Asker, Target
from loadtests.lib.machine_load import Watch
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.lib.varied_prompts import prompts

_MODEL = "fake"
_TIMES = 10.0
_SHARE = 0.2
_SIDES = ("direct", "ours", "litellm")


async def _alone(targets: dict[str, Target], rounds: int) -> dict[str, list[float]]:
    """Send single requests to each server in turn, with a rotating order."""
    askers = {name: Asker(target) for name, target in targets.items()}
    texts = prompts(rounds, seed=4)
    times: dict[str, list[float]] = {name: [] for name in targets}
    for i, text in enumerate(texts):
        order = [_SIDES[(i + j) % len(_SIDES)] for j in range(len(_SIDES))]
        for name in order:
            request = targets[name].request(body(_MODEL, text, 1))
            exchange = await askers[name].ask(request)
            if i >= rounds // 10:  # the first tenth warms up
                times[name].append(exchange.total_ms)
    for asker in askers.values():
        asker.close()
    return times


async def run(port: int, watch: Watch, *, quick: bool) -> Report:
    """Measure. Raises RuntimeError if a server doesn't come up or an answer isn't whole."""
    rounds, for_s, singles = (5, 2.0, 100) if quick else (9, 4.0, 300)
    report = Report("gateway, LiteLLM")
    # Everybody is sent the key, so that the same bytes go to all three.
    key = "sk-" + secrets.token_hex(24)
    targets = {
        "ours": Target("127.0.0.1", port, key=key),
        "litellm": Target("127.0.0.1", port + 2, key=key),
        "direct": Target("127.0.0.1", port + 3, key=key),
    }
    upstream_port = targets["direct"].port
    remote = {"url": f"http://127.0.0.1:{upstream_port}/v1", "model": "upstream"}
    settings = config(port, {_MODEL: {"remote": remote, "categories": ["general"]}})
    rates: dict[str, list[float]] = {name: [] for name in _SIDES}
    longest: dict[str, list[float]] = {name: [] for name in _SIDES}
    with ExitStack() as stack:
        stack.enter_context(fake_upstream(upstream_port, STEP_MS))
        stack.enter_context(
            litellm_server.proxy(targets["litellm"].port, upstream_port, _MODEL, key)
        )
        stack.enter_context(serving(settings))
        stack.enter_context(watch.window())
        for target in targets.values():
            await rate(target, _MODEL, 2.0)
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            for j in range(len(_SIDES)):
                name = _SIDES[(i + j) % len(_SIDES)]
                rates[name].append((await rate(targets[name], _MODEL, for_s))[0])
                longest[name].append(await streams(targets[name], _MODEL))
        say(f"one in flight, {singles} rounds")
        alone = await _alone(targets, singles)
    _judge(report, rates, longest, alone)
    return report


def _judge(
    report: Report,
    rates: dict[str, list[float]],
    longest: dict[str, list[float]],
    alone: dict[str, list[float]],
) -> None:
    added = {
        name: [t - d for t, d in zip(alone[name], alone["direct"], strict=True)]
        for name in ("ours", "litellm")
    }
    times = median_intervals.ratios(rates["ours"], rates["litellm"])
    share = median_intervals.ratio_of_medians(added["ours"], added["litellm"])
    table = Table(
        f"In front of one upstream, LiteLLM {litellm_server.VERSION} with one worker, ours with "
        "one gateway; medians with 95 % intervals",
        (
            "who",
            "one-chunk replies/s, 32 in flight",
            "1 in flight, ms",
            "added, ms",
            f"{STREAMS} streams of {CHUNKS} chunks {STEP_MS:g} ms apart, s",
        ),
    )
    for name in _SIDES:
        extra = median_intervals.median(added[name]).text(2) if name in added else ""
        table.rows.append(
            (
                name,
                median_intervals.median(rates[name]).text(0),
                median_intervals.median(alone[name]).text(2),
                extra,
                median_intervals.median(longest[name]).text(),
            )
        )
    report.tables.append(table)
    report.notes.append(
        f"Ours has {times.text(1)} times LiteLLM's replies per second and {share.text(3)} of its "
        "added time. 'direct' is the upstream asked without a proxy."
    )
    report.reach += [
        at_least("times LiteLLM's one-chunk replies per second", _TIMES, times),
        at_most("of LiteLLM's added time, one in flight", _SHARE, share),
    ]
    report.facts |= {
        "litellm_version": litellm_server.VERSION,
        "replies_per_s": {name: median_intervals.median(rates[name]).as_json() for name in _SIDES},
        "alone_ms": {name: median_intervals.median(alone[name]).as_json() for name in _SIDES},
        "added_ms": {name: median_intervals.median(added[name]).as_json() for name in added},
        "streams_s": {name: median_intervals.median(longest[name]).as_json() for name in _SIDES},
        "times": times.as_json(),
        "share": share.as_json(),
    }
