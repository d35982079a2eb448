"""Whole requests for `auto` with the encoder and without, side by side.

Two services with the demo's four experts on the simulated engine, and the built-in classifier. They
take turns with the same prompts, the demo's mix, each of which comes once. So no cache answers any.
Replies a second depend on what else the machine does, processor time per request hardly does.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack

from loadtests.lib.child_processes import admin_key_of, fetch, say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.load_client import Target, closed_loop
from loadtests.lib.median_intervals import Estimate, median, ratios
from loadtests.lib.process_times import ServiceTimes
from loadtests.lib.targets_and_report import Report, Table, at_least
from router_models.demo.prompt_templates import templated

# The experts of the demo, and the categories of the built-in classifier that each answers.
_EXPERTS = {
    "general": ["general"],
    "math": ["math-word-problems", "symbolic-math"],
    "intents": ["commands"],
    "code": ["coding", "shell-sql"],
}
_IN_FLIGHT = 32
_WARM_S = 3.0
_REASONS = "coe_router_encoder_total{"


def demo_mix(seed: int) -> Iterator[str]:
    """Prompts of the demo's four kinds in equal parts, without end; none comes twice."""
    seen: set[str] = set()
    for turn in itertools.count():
        found = [
            text for kind in _EXPERTS for text in templated(kind, 500, 1_000_000 * seed + turn)
        ]
        random.Random(turn).shuffle(found)
        for text in found:
            # Templates repeat themselves; a number in parentheses makes another text of it.
            while text in seen:
                text = f"{text} ({len(seen)})"
            seen.add(text)
            yield text


def asked_by_reason(text: str) -> dict[str, float]:
    """How often the encoder was asked, or why not, by a gateway's metrics."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(_REASONS):
            reason = line.partition('reason="')[2].partition('"')[0]
            found[reason] = found.get(reason, 0.0) + float(line.rpartition(" ")[2])
    return found


def measure(report: Report, port: int, rounds: int, seconds: float) -> None:
    """Measure. Raises RuntimeError where a service does not come up or a reply is not whole."""
    experts = {
        name: {"model": name, "categories": categories} for name, categories in _EXPERTS.items()
    }
    simulated = {"engine": "simulated", "simulated": {"decode_ms": 1.0, "max_num_seqs": 64}}
    settings = [config(at, experts, {"sim": simulated}) for at in (port, port + 40)]
    for one in settings:
        del one["router"]["artifact"]  # the built-in one
    settings[1]["router"]["encoder"] = {}
    with ExitStack() as stack:
        pids = [stack.enter_context(serving(one)) for one in settings]
        asyncio.run(_compare(report, (port, port + 40), pids, rounds, seconds))


async def _compare(
    report: Report, ports: tuple[int, int], pids: list[int], rounds: int, seconds: float
) -> None:
    targets = [Target("127.0.0.1", port) for port in ports]
    rates: list[list[float]] = [[], []]
    costs: list[list[dict[str, float]]] = [[], []]
    asked: dict[str, float] = {}
    for turn in range(rounds + 1):
        say(f"round {turn} of {rounds}" if turn else "warming up")
        order = (0, 1) if turn % 2 else (1, 0)
        before = _asked(ports[1])
        for which in order:
            texts, target = _requests(targets[which], turn), targets[which]
            times = ServiceTimes(pids[which])
            done = await closed_loop(
                target,
                texts.__next__,
                _IN_FLIGHT,
                for_s=seconds if turn else _WARM_S,
            )
            done.check()
            if turn:
                rates[which].append(done.rate)
                costs[which].append(dict(times.per_request(len(done.exchanges))))
        if turn:
            for reason, count in _asked(ports[1]).items():
                asked[reason] = asked.get(reason, 0.0) + count - before.get(reason, 0.0)
    total = sum(rate * seconds for rate in rates[1])
    _tell(report, rates, costs, {reason: count / total for reason, count in asked.items()})


def _requests(target: Target, seed: int) -> Iterator[bytes]:
    for prompt in demo_mix(seed):
        message = {"role": "user", "content": prompt}
        yield target.request(
            {"model": "auto", "messages": [message], "max_tokens": 1, "stream": True}
        )


def _asked(port: int) -> dict[str, float]:
    _, text = fetch(port, "/metrics", admin_key=admin_key_of())
    return asked_by_reason(text.decode())


def _tell(
    report: Report,
    rates: list[list[float]],
    costs: list[list[dict[str, float]]],
    asked: dict[str, float],
) -> None:
    without, with_one = rates
    of_rates: Estimate = ratios(with_one, without)
    whole = [[sum(one.values()) for one in each] for each in costs]
    of_costs: Estimate = ratios(whole[0], whole[1])
    table = Table(
        f"Whole requests for `auto`, {_IN_FLIGHT} in flight, the demo's mix, simulated engine",
        ("what", "without", "with the encoder"),
        [("replies/s", median(without).text(0), median(with_one).text(0))],
    )
    for role in sorted({role for each in costs for one in each for role in one}):
        cells = [median([one.get(role, 0.0) for one in each]).text(3) for each in costs]
        table.rows.append((f"processor time of {role} per request, ms", cells[0], cells[1]))
    report.tables.append(table)
    report.tables.append(
        Table(
            "Prompts of which the first stage was unsure, as a share of all",
            ("reason", "%"),
            [(reason, f"{100 * share:.1f}") for reason, share in sorted(asked.items())],
        )
    )
    report.reach += [
        at_least("replies/s with the encoder, of without", 0.9, of_rates),
        at_least("requests per processor second with the encoder, of without", 0.9, of_costs),
    ]
    report.facts |= {"asked": asked, "rates": rates}
