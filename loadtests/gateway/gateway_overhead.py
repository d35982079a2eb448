"""This service with the simulated engine, to measure everything except for an engine."""

from __future__ import annotations

from contextlib import ExitStack

from loadtests.lib import median_intervals
from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.fake_openai_start import fake_upstream
from loadtests.lib.load_client import Asker, Exchange, Target, closed_loop, once, repeat
from loadtests.lib.machine_load import Watch
from loadtests.lib.process_times import ServiceTimes
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.lib.varied_prompts import prompts

STEP_MS = 20.0
STREAMS, CHUNKS = 64, 32
_EXPERTS = ("general", "math", "intents", "code")
_IN_FLIGHT = 32
_RATE_PER_S = 400.0
_STREAMS_S = 0.75
_AUTO_MS = 1.0
_LENGTHS = (0, 500, 2000)


def body(model: str, prompt: str, tokens: int) -> dict[str, object]:
    """A streamed chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": True,
    }


async def rate(target: Target, model: str, for_s: float) -> tuple[float, float, list[float]]:
    """Streamed one-chunk replies: how many per second, our own ms for each, and their times."""
    request = target.request(body(model, prompts(1, seed=1)[0], 1))
    turn = (await closed_loop(target, repeat(request), _IN_FLIGHT, for_s=for_s)).check()
    times = [exchange.total_ms for exchange in turn.exchanges]
    return turn.rate, turn.cpu_s * 1000 / len(turn.exchanges), times


async def streams(target: Target, model: str) -> float:
    """Seconds from the first request's writing to the end of the last of 64 streams."""
    texts = prompts(STREAMS, seed=2)
    requests = [target.request(body(model, text, CHUNKS)) for text in texts]
    turn = (await closed_loop(target, once(requests), STREAMS)).check()
    return turn.wall_s


async def _auto(target: Target, pairs: int) -> list[tuple[Exchange, Exchange]]:
    """Send the same prompt to `auto` and to a named expert in turn."""
    asker = Asker(target)
    each = -(-pairs // len(_LENGTHS))
    texts = [prompts(each, seed=3 + n, characters=n) for n in _LENGTHS]
    found = []
    for i, text in enumerate(text for group in zip(*texts, strict=True) for text in group):
        requests = {model: target.request(body(model, text, 1)) for model in ("auto", _EXPERTS[0])}
        order = ("auto", _EXPERTS[0]) if i % 2 else (_EXPERTS[0], "auto")
        seen = {model: await asker.ask(requests[model]) for model in order}
        found.append((seen["auto"], seen[_EXPERTS[0]]))
    asker.close()
    return found[len(found) // 10 :]  # the first tenth warms up


async def run(port: int, watch: Watch, *, quick: bool) -> Report:
    """Measure. Raises RuntimeError if a server doesn't come up or an answer isn't whole."""
    rounds, for_s, pairs = (5, 2.0, 300) if quick else (9, 4.0, 1200)
    report = Report("gateway, simulated engine")
    ours, upstream = Target("127.0.0.1", port), Target("127.0.0.1", port + 3)
    experts = {name: {"model": name, "categories": [name]} for name in _EXPERTS}
    pool = {"engine": "simulated", "simulated": {"decode_ms": STEP_MS}}
    rates, costs, longest, ideal, ceilings = [], [], [], [], []
    slow: list[float] = []
    by_role: dict[str, list[float]] = {}
    with ExitStack() as stack:
        stack.enter_context(fake_upstream(upstream.port, STEP_MS))
        for _ in range(3):
            ceilings.append((await rate(upstream, "upstream", 1.0))[0])
            ideal.append(await streams(upstream, "upstream"))
        service = stack.enter_context(serving(config(port, experts, {"sim": pool})))
        stack.enter_context(watch.window())
        await rate(ours, _EXPERTS[0], 2.0)
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            service_times = ServiceTimes(service)
            one_rate, own_ms, times = await rate(ours, _EXPERTS[0], for_s)
            for role, ms in service_times.per_request(len(times)).items():
                by_role.setdefault(role, []).append(ms)
            rates.append(one_rate)
            costs.append(own_ms)
            slow += times
            longest.append(await streams(ours, _EXPERTS[0]))
        say(f"auto against a named expert, {pairs} pairs")
        compared = await _auto(ours, pairs)
    per_s, whole_s = median_intervals.median(rates), median_intervals.median(longest)
    auto = [a.total_ms for a, _ in compared]
    named = [n.total_ms for _, n in compared]
    added = median_intervals.differences(auto, named)
    ceiling = median_intervals.median(ceilings).value
    own = {role: median_intervals.median(costs_ms) for role, costs_ms in by_role.items()}
    report.tables.append(
        Table(
            "Simulated engine behind HAProxy, gateway and pool; medians with 95 % intervals",
            ("what", "value"),
            [
                (f"one-chunk replies/s, {_IN_FLIGHT} in flight", per_s.text(0)),
                (
                    "their time, median and 99th percentile, ms",
                    ", ".join(f"{median_intervals.percentile(slow, q):.1f}" for q in (50, 99)),
                ),
                (f"{STREAMS} streams of {CHUNKS} chunks {STEP_MS:g} ms apart, s", whole_s.text()),
                (
                    "the same from a server that does nothing, s",
                    median_intervals.median(ideal).text(),
                ),
                ("named expert, 1 in flight, ms", median_intervals.median(named).text(2)),
                ("auto, 1 in flight, ms", median_intervals.median(auto).text(2)),
                ("auto adds, ms", added.text(3)),
                ("load generator's own ceiling, replies/s", f"{ceiling:.0f}"),
                ("its processor time per reply, ms", f"{median_intervals.median(costs).value:.3f}"),
                *(
                    (f"processor time of {role} per reply, ms", cost.text(3))
                    for role, cost in own.items()
                ),
            ],
        )
    )
    report.reach += [
        at_least("one-chunk replies per second, named expert", _RATE_PER_S, per_s),
        at_most(f"seconds for {STREAMS} streams of {CHUNKS} chunks", _STREAMS_S, whole_s),
        at_most("ms that auto adds to naming an expert, median", _AUTO_MS, added),
    ]
    report.facts |= {
        "replies_per_s": per_s.as_json(),
        "streams_s": whole_s.as_json(),
        "streams_ideal_s": median_intervals.median(ideal).as_json(),
        "auto_added_ms": added.as_json(),
        "named_ms": median_intervals.median(named).as_json(),
        "generator_ceiling_per_s": ceiling,
        "generator_cpu_ms_per_reply": median_intervals.median(costs).value,
        "cpu_ms_per_reply": {role: cost.as_json() for role, cost in own.items()},
    }
    return report
