"""`python -m loadtests.nodes`: Disturbs nodes under traffic.

The arguments choose among `kill`, `partition`, `store`, `slow` and `head`. Two Ray nodes and a
Redis run in network namespaces of this machine. A node is killed, cut off (its packets are dropped,
not refused), or gets a slow link. The run reports the end of every request, and how long each
recovery took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.chaos.disturbed_site import reserved
from loadtests.chaos.judged_traffic import Traffic
from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report
from loadtests.nodes.namespace_network import ended_by_sigterm
from loadtests.nodes.node_cluster import PORT, TENANT, NodeCluster, node_cluster, resident_mib
from loadtests.nodes.node_outcomes import DEADLINE_S, Outcome, tell_outcomes

# A client leaves a request that has not ended by then, and it counts as late.
_GIVE_UP_S = 60.0
_BACK_S = 120.0
_CALM_S = 45.0
_GATEWAYS = 2
_ALL = frozenset({"here", "there", "both"})
MODELS: Mapping[str, frozenset[str]] = {
    "here": frozenset({"here"}),
    "there": frozenset({"there"}),
    "both": frozenset({"both"}),
    "auto": _ALL,
}
COUNTERS = ("coe_in_flight_requests", "coe_requests_waiting", "coe_requests_running")


@dataclass(frozen=True, slots=True)
class Case:
    """One fault: begun by `begin`, undone by `end` after `for_s`.

    Attributes:
        name: What it does.
        begin: Begins it.
        end: Ends it.
        for_s: How long it lasts.
        part: The argument of the command that selects it.
        door: The node through whose HAProxy clients come.
        durable: Whether Ray keeps its state in Redis meanwhile.
    """

    name: str
    part: str
    begin: Callable[[NodeCluster], object]
    end: Callable[[NodeCluster], object]
    for_s: float
    door: str = "head"
    durable: bool = False


CASES = (
    Case(
        "a node killed",
        "kill",
        lambda c: c.kill("far"),
        lambda c: c.start_node("far"),
        30.0,
    ),
    Case("a node cut off for 20 s", "partition", lambda c: c.far.cut(), lambda c: c.far.heal(), 20),
    Case("a node cut off for 90 s", "partition", lambda c: c.far.cut(), lambda c: c.far.heal(), 90),
    *(
        Case(
            f"Redis cut off for {for_s} s",
            "store",
            lambda c: c.nodes["store"].cut(),
            lambda c: c.nodes["store"].heal(),
            for_s,
        )
        for for_s in (15, 45)
    ),
    Case(
        "a link with 50 ms each way and 1 % loss",
        "slow",
        lambda c: c.network.slow(c.far, 50.0, 0.01),
        lambda c: c.network.fast(c.far),
        25.0,
    ),
    Case(
        "Ray's head killed, its state in Redis",
        "head",
        lambda c: c.kill("head"),
        lambda c: c.start_node("head"),
        20.0,
        door="far",
        durable=True,
    ),
)


async def _run(cluster: NodeCluster, case: Case, clients: int) -> Outcome:
    outcome = Outcome(case.name)
    say(case.name)
    async with contextlib.AsyncExitStack() as stack:
        for number, (model, experts) in enumerate(MODELS.items()):
            # Clients of one model must not wait for answers of another.
            traffic = await stack.enter_async_context(
                Traffic(
                    PORT,
                    [(model, experts, DEADLINE_S)],
                    clients,
                    key=cluster.key,
                    seed=number,
                    host=cluster.nodes[case.door].ip,
                    give_up_s=_GIVE_UP_S,
                )
            )
            outcome.tallies[model] = stack.enter_context(traffic.tally())
        supervising = asyncio.create_task(_supervise(cluster))
        stack.callback(supervising.cancel)
        await asyncio.sleep(3)
        outcome.fault_s = time.monotonic()
        await asyncio.to_thread(case.begin, cluster)
        await asyncio.sleep(case.for_s)
        await asyncio.to_thread(case.end, cluster)
        outcome.heal_s = time.monotonic()
        before = await asyncio.to_thread(cluster.requests_by_gateway, case.door)
        while time.monotonic() - outcome.heal_s < _BACK_S:
            outcome.lacks = await asyncio.to_thread(cluster.lacks)
            now = await asyncio.to_thread(cluster.requests_by_gateway, case.door)
            if not outcome.lacks:
                outcome.whole_s = min(outcome.whole_s, time.monotonic())
            if sum(count > before.get(name, 0.0) for name, count in now.items()) >= _GATEWAYS:
                outcome.gateways_s = min(outcome.gateways_s, time.monotonic())
            if outcome.is_over:
                break
            await asyncio.sleep(0.25)
        await asyncio.sleep(2)
    _say(outcome)
    return outcome


def _say(outcome: Outcome) -> None:
    for model, tally in outcome.tallies.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in tally.kinds.most_common())
        codes = ", ".join(f"{count} {code}" for code, count in tally.codes.most_common())
        say(
            f"  {model}: {kinds} ({codes}); first right {tally.works_again_s(outcome.fault_s):.1f} "
            f"s after the fault, {tally.works_again_s(outcome.heal_s):.1f} s after its end"
        )
    say(
        f"  all pools known {outcome.whole_s - outcome.heal_s:.1f} s after its end, both gateways "
        f"used after {outcome.gateways_s - outcome.heal_s:.1f} s {outcome.lacks}"
    )


async def _supervise(cluster: NodeCluster) -> None:
    while True:
        await asyncio.to_thread(cluster.supervise)
        await asyncio.sleep(0.5)


async def _calm(cluster: NodeCluster) -> dict[str, float]:
    """Wait until every counter is zero; what is left of them if never."""
    end_s = time.monotonic() + _CALM_S
    while True:
        left = {
            f"{name} at {node}": await asyncio.to_thread(cluster.metric, name, node)
            for name in COUNTERS
            for node in ("head", "far")
        }
        if not any(left.values()) or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.5)


@dataclass
class Measured:
    """The outcomes of all cases, and everything that must be zero afterwards."""

    outcomes: list[Outcome] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)


async def _measure(
    cluster: NodeCluster, cases: Sequence[Case], clients: int, measured: Measured
) -> None:
    """Add what comes of the cases in a cluster."""
    for case in cases:
        measured.outcomes.append(await _run(cluster, case, clients))
    left = await _calm(cluster)
    await asyncio.to_thread(cluster.shut_down)
    left["reserved in Redis"] = await reserved(cluster.config, TENANT)
    for name, value in left.items():
        measured.left[name] = measured.left.get(name, 0.0) + value


def _measured(given: argparse.Namespace) -> Report:
    report = Report("nodes")
    measured = Measured()
    chosen = [case for case in CASES if case.part in given.parts]
    with ended_by_sigterm():
        for durable in sorted({case.durable for case in chosen}):
            cases = [case for case in chosen if case.durable == durable]
            with node_cluster(durable=durable) as cluster:
                report.facts["resident_mib"] = resident_mib(cluster.nodes)
                asyncio.run(_measure(cluster, cases, given.clients, measured))
                for name, count in cluster.restarts.items():
                    report.notes.append(f"Ray ended by itself on {name}, {count} times.")
    tell_outcomes(report, measured.outcomes, measured.left)
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("nodes", __doc__)
    parts = tuple(dict.fromkeys(case.part for case in CASES))
    words.add_argument("parts", nargs="*", help=f"{', '.join(parts)}; default: all")
    words.add_argument(
        "--clients", type=int, default=3, help="concurrent requests for each model (default 3)"
    )
    given = words.parse_args()
    if unknown := set(given.parts) - set(parts):
        words.error(f"parts: {', '.join(sorted(unknown))} should be of {', '.join(parts)}")
    given.parts = given.parts or parts
    return tell(lambda _: _measured(given), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
