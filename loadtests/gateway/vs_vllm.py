"""Compares this service and vLLM's own API server in turn, with the same model and prompts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from loadtests.gateway.vllm_server import EngineArguments, bare_server, model_folder
from loadtests.lib import median_intervals
from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import config, serving
from loadtests.lib.load_client import Asker, Target, closed_loop, completion_tokens, once
from loadtests.lib.machine_load import Ticks, Watch
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.lib.varied_prompts import prompts

_MODEL = "general"
_THROUGHPUT = 0.97
_ADDED_FIRST_MS = 5.0
_PROMPT_CHARACTERS = 120
# Beyond these a comparison says more of the neighbours than of the two servers.
_OTHERS_SHARE = 0.10
_OTHERS_APART = 0.03
_TOO_GOOD = 1.05


@dataclass(frozen=True, slots=True)
class Plan:
    """Pairs of turns at one number of requests in flight."""

    in_flight: int
    requests: int
    tokens: int
    pairs: int


def plans(quick: bool) -> tuple[Plan, ...]:
    """Return the plans; a single request gets many short turns, for its time to first token."""
    if quick:
        return Plan(1, 1, 12, 10), Plan(8, 8, 24, 7), Plan(32, 32, 16, 7)
    return Plan(1, 1, 16, 40), Plan(8, 16, 24, 9), Plan(32, 32, 32, 9)


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One turn: tokens per second, times to first token, processor time."""

    tokens_per_s: float
    first_ms: list[float]
    spent: Ticks

    @property
    def median_first_ms(self) -> float:
        """The turn's median time to the first token."""
        return median_intervals.percentile(self.first_ms, 50)


def _requests(target: Target, texts: list[str], tokens: int) -> list[bytes]:
    return [
        target.request(
            {
                "model": _MODEL,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for text in texts
    ]


async def _turn(target: Target, plan: Plan, texts: list[str], asker: Asker) -> TurnResult:
    requests = _requests(target, texts, plan.tokens)
    before = Ticks.now()
    if plan.in_flight == 1 and len(requests) == 1:
        exchanges = [await asker.ask(requests[0])]
        wall_s = exchanges[0].ended_s - exchanges[0].began_s
    else:
        turn = (await closed_loop(target, once(requests), plan.in_flight)).check()
        exchanges, wall_s = turn.exchanges, turn.wall_s
    spent = Ticks.now().since(before)
    for exchange in exchanges:
        if (got := completion_tokens(exchange.body)) != plan.tokens:
            raise RuntimeError(f"{got} tokens where {plan.tokens} were asked for")
    made = plan.tokens * len(exchanges)
    return TurnResult(made / wall_s, [exchange.first_ms for exchange in exchanges], spent)


async def _pairs(bare: Target, ours: Target, plan: Plan) -> list[tuple[TurnResult, TurnResult]]:
    """Each pair sees the same new prompts; who goes first alternates."""
    askers = {bare: Asker(bare), ours: Asker(ours)}
    measured = []
    for i in range(plan.pairs + 1):
        seed = plan.in_flight * 1000 + i
        texts = prompts(plan.requests, seed=seed, characters=_PROMPT_CHARACTERS)
        order = (bare, ours) if i % 2 else (ours, bare)
        seen = {target: await _turn(target, plan, texts, askers[target]) for target in order}
        if i:  # the first pair warms both up
            measured.append((seen[bare], seen[ours]))
    for asker in askers.values():
        asker.close()
    return measured


async def run(port: int, watch: Watch, *, quick: bool, threads: int) -> Report:
    """Measure. Raises RuntimeError if a server doesn't come up or an answer isn't whole."""
    arguments = EngineArguments(model_folder(), threads)
    report = Report("gateway")
    ours, bare = Target("127.0.0.1", port), Target("127.0.0.1", port + 1)
    settings = config(port, {_MODEL: {"model": str(arguments.model)}}, {"cpu": arguments.pool()})
    results: dict[int, list[tuple[TurnResult, TurnResult]]] = {}
    with ExitStack() as stack:
        stack.enter_context(bare_server(bare.port, _MODEL, arguments))
        stack.enter_context(serving(settings))
        stack.enter_context(watch.window())
        for plan in plans(quick):
            say(f"{plan.in_flight} in flight, {plan.pairs} pairs of turns")
            results[plan.in_flight] = await _pairs(bare, ours, plan)
    judge(report, results, threads)
    return report


Pairs = list[tuple[TurnResult, TurnResult]]


def unfairness(results: dict[int, Pairs], ratios: list[median_intervals.Estimate]) -> list[str]:
    """Why the two sides' conditions were not alike; empty where they were.

    A ratio that others made is no result, in our favour least of all: with the
    same engine behind more hops, ours can't be clearly faster than bare.
    """
    shares = []
    for side in (0, 1):
        spent = Ticks(0, 0, 0)
        for pairs in results.values():
            for pair in pairs:
                spent = spent.plus(pair[side].spent)
        shares.append(spent.others_share)
    why = []
    if max(shares) > _OTHERS_SHARE or abs(shares[0] - shares[1]) > _OTHERS_APART:
        why.append(
            f"other people's work took {shares[0]:.0%} of the processor time in bare's turns and "
            f"{shares[1]:.0%} in ours"
        )
    if any(ratio.low > _TOO_GOOD for ratio in ratios):
        why.append(f"a ratio is surely over {_TOO_GOOD}, which our service can't be the cause of")
    return why


def judge(report: Report, results: dict[int, Pairs], threads: int) -> None:
    """Fill the report. Nothing counts as met where the conditions were not alike."""
    columns = ["in flight", "pairs", "bare tok/s", "ours tok/s", "ratio"]
    columns += ["bare TTFT ms", "ours TTFT ms", "added TTFT ms"]
    table = Table(
        f"vLLM's own API server and ours, {threads} OMP thread(s) each; medians over the pairs, "
        "with 95 % intervals",
        columns,
    )
    by_load: dict[str, object] = {}
    groups = []
    found: dict[int, tuple[median_intervals.Estimate, median_intervals.Estimate]] = {}
    for in_flight, pairs in results.items():
        bares, ours = [b for b, _ in pairs], [o for _, o in pairs]
        rates = [[m.tokens_per_s for m in side] for side in (bares, ours)]
        firsts = [[m.median_first_ms for m in side] for side in (bares, ours)]
        ratio = median_intervals.ratios(rates[1], rates[0])
        added = median_intervals.differences(firsts[1], firsts[0])
        found[in_flight] = ratio, added
        groups.append([o / b for b, o in zip(*rates, strict=True)])
        medians = [median_intervals.median(values).value for values in (*rates, *firsts)]
        row = [str(in_flight), str(len(pairs)), *(f"{m:.1f}" for m in medians)]
        table.rows.append([*row[:4], ratio.text(), *row[4:], added.text(1)])
        by_load[str(in_flight)] = {
            "pairs": len(pairs),
            "bare_tokens_per_s": medians[0],
            "ours_tokens_per_s": medians[1],
            "ratio": ratio.as_json(),
            "bare_first_ms": medians[2],
            "ours_first_ms": medians[3],
            "added_first_ms": added.as_json(),
        }
    overall = median_intervals.mean_of_medians(groups)
    why = unfairness(results, [ratio for ratio, _ in found.values()])
    fair = not why
    for in_flight, (ratio, added) in found.items():
        name = f"tokens/s of bare vLLM's, {in_flight} in flight"
        report.reach.append(at_least(name, _THROUGHPUT, ratio, interval=True, valid=fair))
        if in_flight == 1:
            name = "ms added to the time to first token, 1 in flight"
            report.reach.append(at_most(name, _ADDED_FIRST_MS, added, interval=True, valid=fair))
    name = "tokens/s of bare vLLM's, overall"
    report.reach.append(at_least(name, _THROUGHPUT, overall, interval=True, valid=fair))
    report.tables.append(table)
    report.notes.append(
        f"Overall (geometric mean of the medians): {overall.text()}. "
        "A target is met when the interval reaches it."
    )
    if why:
        report.notes.append("NOT A RESULT, so nothing counts as met: " + "; ".join(why) + ".")
    report.facts |= {
        "in_flight": by_load,
        "overall": overall.as_json(),
        "threads": threads,
        "fair": fair,
        "unfair_because": why,
    }
