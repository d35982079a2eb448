"""`python -m loadtests.chaos`: Kills and disturbs parts of a service under traffic.

Parts are killed, hung, starved of disk, or answer nonsense. The run reports the end of every
request.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import orjson
import psutil

from loadtests.chaos.disturbed_site import GATEWAY, MAIN_REPLICAS, POOL, Site, site
from loadtests.chaos.judged_traffic import BAD, BROKEN, RESET, RIGHT, TYPED, Tally, Traffic
from loadtests.lib.child_processes import fetch, say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

_CALM_S = 30.0
_WORKS_AGAIN_S = 5.0
_KEEP_ALIVE_S = 100.0
_MORE_DESCRIPTORS = 24
MIX = [
    ("general", frozenset({"general"}), 15.0),
    ("math", frozenset({"math"}), 15.0),
    ("auto", frozenset({"general", "math", "turn-a", "turn-b", "other"}), 15.0),
    ("turn-a", frozenset({"turn-a"}), 15.0),
    ("turn-b", frozenset({"turn-b"}), 15.0),
    ("auto/math", frozenset({"math", "general"}), 15.0),
    ("other", frozenset({"other"}), 3.0),
    ("auto/other", frozenset({"other", "general"}), 15.0),
]


@dataclass(frozen=True, slots=True)
class Case:
    """One fault: begun by `begin`, undone by `end` after `for_s`.

    `resets`: the process that holds the client's connection is killed, so a request in it
    may see a reset. `spared`: models whose requests must all be answered right all the while.
    """

    name: str
    begin: Callable[[Site], object]
    end: Callable[[Site], object] | None = None
    for_s: float = 0.0
    resets: bool = False
    spared: frozenset[str] = frozenset()
    needs: str = ""


def _manner(what: str) -> Callable[[Site], None]:
    def tell(site: Site) -> None:
        site.upstream.manner = what

    return tell


_LOCAL = frozenset({"general", "math", "auto/math", "turn-a", "turn-b"})
CASES = (
    Case("kill -9 a pool replica", lambda s: s.kill(POOL + "main")),
    Case("kill -9 the swapping pool", lambda s: s.kill(POOL + "turns"), spared=frozenset({"math"})),
    Case("poison request", Site.poison, Site.count_lost, 8.0),
    Case("kill -9 a gateway replica", lambda s: s.kill(GATEWAY), resets=True),
    Case("kill -9 HAProxy", lambda s: s.kill("bin/haproxy", every=True), resets=True),
    Case("Redis stopped", lambda s: s.redis.stop(), lambda s: s.redis.start(), 3.0, needs="redis"),  # type: ignore[union-attr]  # left out where there is none
    Case("Redis hung", lambda s: s.redis.hang(), lambda s: s.redis.go_on(), 3.0, needs="redis"),  # type: ignore[union-attr]  # left out where there is none
    Case("disk full", Site.fill_disk, Site.free_disk, 3.0, spared=_LOCAL, needs="disk"),
    Case("an expert hangs", _manner("hangs"), _manner("well"), 5.0, spared=_LOCAL),
    Case("an expert answers garbage", _manner("garbage"), _manner("well"), 3.0, spared=_LOCAL),
    Case("an expert is slow", _manner("slow"), _manner("well"), 5.0, spared=_LOCAL),
)


@dataclass(slots=True)
class CaseResults:
    """The results of one case over all rounds."""

    case: Case
    tallies: list[Tally] = field(default_factory=list)
    again_s: list[float] = field(default_factory=list)
    spared_failed: int = 0

    def count(self, kind: str) -> int:
        """Over all rounds."""
        return sum(tally.kinds[kind] for tally in self.tallies)


def _footprint(site: Site) -> tuple[int, float]:
    """File descriptors, and resident MiB, of gateways, pools and HAProxy."""
    descriptors, resident = 0, 0
    for process in [*site.processes("ray::ServeReplica"), *site.processes("bin/haproxy")]:
        try:
            descriptors += process.num_fds()
            resident += process.memory_info().rss
        except psutil.Error:
            continue
    return descriptors, resident / 2**20


COUNTERS = ("coe_in_flight_requests", "coe_requests_waiting", "coe_requests_running")


def _left(site: Site) -> dict[str, float]:
    """Everything that must be zero when nobody asks."""
    return {name: site.metric(name) for name in COUNTERS}


async def calm(site: Site) -> dict[str, float]:
    """Wait until every counter is back, and the service whole; what is left of them if never."""
    end_s = time.monotonic() + _CALM_S
    while True:
        left = await asyncio.to_thread(_left, site)
        whole = await asyncio.to_thread(_whole, site)
        if (whole and not any(left.values())) or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.5)


async def _settled(site: Site, most_descriptors: int) -> tuple[int, float]:
    """The footprint once idle connections have been closed, which keep-alive holds for a while."""
    end_s = time.monotonic() + _KEEP_ALIVE_S
    while True:
        seen = await asyncio.to_thread(_footprint, site)
        if seen[0] <= most_descriptors or time.monotonic() > end_s:
            return seen
        await asyncio.sleep(1)


async def _case(
    site: Site, traffic: Traffic, case: Case, seen: CaseResults, settle_s: float
) -> None:
    with traffic.tally() as tally:
        await asyncio.sleep(1)
        at_s = time.monotonic()
        case.begin(site)
        if case.end is not None:
            await asyncio.sleep(case.for_s)
            case.end(site)
        # Until new requests are answered, and a while longer: faults may come late.
        end_s = time.monotonic() + 2 * _CALM_S
        while tally.works_again_s(at_s) == float("inf") and time.monotonic() < end_s:  # noqa: ASYNC110  # a tally has no event
            await asyncio.sleep(0.1)
        await asyncio.sleep(settle_s)
        end_s = time.monotonic() + _CALM_S
        while time.monotonic() < end_s and not await asyncio.to_thread(_whole, site):  # noqa: ASYNC110  # asked over HTTP
            await asyncio.sleep(0.25)
        await asyncio.sleep(0.5)
    seen.tallies.append(tally)
    seen.again_s.append(tally.works_again_s(at_s))
    seen.spared_failed += sum(
        verdict.kind != RIGHT for verdict in tally.verdicts if verdict.model in case.spared
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in tally.kinds.most_common())
    say(f"{case.name}: {kinds}; works again after {seen.again_s[-1]:.2f} s")


def _whole(site: Site) -> bool:
    """Return whether all started processes answer."""
    if len(site.processes(POOL)) < MAIN_REPLICAS + 1 or not site.processes("bin/haproxy"):
        return False
    gateways = 2 if site.redis is not None else 1
    if len(site.processes(GATEWAY)) < gateways:
        return False
    status, body = fetch(site.port, "/ready", admin_key=site.admin_key)
    return status == 200 and all(
        expert["state"] in ("device", "host", "disk")
        for expert in orjson.loads(body)["experts"].values()
    )


async def simulated(port: int, rounds: int, clients: int, settle_s: float) -> Report:
    """Rounds of every case around the simulated engine."""
    report = Report("chaos")
    async with site(port) as running:
        have = {"": True, "redis": running.redis is not None, "disk": running.disk is not None}
        cases = [case for case in CASES if have[case.needs]]
        for case in CASES:
            if not have[case.needs]:
                report.notes.append(f"Left out: {case.name} (no {case.needs} here).")
        seen = {case.name: CaseResults(case) for case in cases}
        async with Traffic(port, MIX, clients, key=running.key, seed=7):
            await asyncio.sleep(5)
        await calm(running)
        before = _footprint(running)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            async with Traffic(port, MIX, clients, key=running.key, seed=number) as traffic:
                for case in cases:
                    await _case(running, traffic, case, seen[case.name], settle_s)
        left = await calm(running)
        after = await _settled(running, before[0] + _MORE_DESCRIPTORS)
        await asyncio.to_thread(running.stop)
        left["reserved in Redis"] = await running.reserved()
        _report_poison(report, running)
    _tell(report, seen, left, before, after, rounds)
    return report


def _report_poison(report: Report, site: Site) -> None:
    """Report the cost of poison requests, which end each process that runs them."""
    beyond = float(max((lost - 2 for lost in site.lost), default=0))
    replies = [(reply.status, reply.code) for reply in site.poisoned]
    typed = sum(reply == (500, "engine_died_twice") for reply in replies)
    report.reach += [
        TargetCheck(
            "pools lost beyond two by one poison request, at most", 0.0, beyond, beyond <= 0
        ),
        TargetCheck(
            "poison requests refused as such, at least",
            float(len(replies)),
            float(typed),
            typed == len(replies),
        ),
    ]
    report.facts["poison"] = {"lost": site.lost, "answers": replies}


def _tell(
    report: Report,
    seen: Mapping[str, CaseResults],
    left: Mapping[str, float],
    before: tuple[int, float],
    after: tuple[int, float],
    rounds: int,
) -> None:
    columns = ("fault", RIGHT, TYPED, "broken", "resets", "bad", "works again, s", "codes")
    table = Table(f"What came of requests, {rounds} rounds", columns)
    for name, results in seen.items():
        codes = sum(
            (tally.codes for tally in results.tallies), start=results.tallies[0].codes.__class__()
        )
        table.rows.append(
            (
                name,
                str(results.count(RIGHT)),
                str(results.count(TYPED)),
                str(results.count(BROKEN)),
                str(results.count(RESET)),
                str(sum(results.count(kind) for kind in BAD)),
                f"{max(results.again_s):.2f}",
                ", ".join(f"{count} {code}" for code, count in codes.most_common(4)),
            )
        )
        for kind in (*BAD, RESET):
            for tally in results.tallies:
                for detail in tally.details(kind):
                    if kind in BAD or not results.case.resets:
                        report.notes.append(f"{name}: {kind}: {detail}")
    report.tables.append(table)

    def total(kind: str) -> float:
        return float(sum(results.count(kind) for results in seen.values()))

    def zero(name: str, value: float) -> TargetCheck:
        return TargetCheck(name, 0.0, value, value == 0)

    requests = total(RIGHT) + total(TYPED) + total(BROKEN) + total(RESET)
    report.reach += [
        TargetCheck("requests, at least", 100.0, requests, requests >= 100),
        *(zero(f"{kind}s, at most", total(kind)) for kind in BAD),
        zero(
            "resets where nobody held the connection was killed, at most",
            float(
                sum(results.count(RESET) for results in seen.values() if not results.case.resets)
            ),
        ),
        zero(
            "failures of requests that the fault had nothing to do with, at most",
            float(sum(results.spared_failed for results in seen.values())),
        ),
    ]
    for name, results in seen.items():
        if results.case.resets:
            worst = max(results.again_s)
            what = f"s until new requests work after {name}, at most"
            report.reach.append(
                TargetCheck(what, _WORKS_AGAIN_S, round(worst, 2), worst <= _WORKS_AGAIN_S)
            )
    report.reach += [zero(f"{name} afterwards, at most", value) for name, value in left.items()]
    grown_fds, grown_mib = after[0] - before[0], after[1] / before[1]
    report.reach += [
        TargetCheck(
            "file descriptors more than before, at most",
            float(_MORE_DESCRIPTORS),
            float(grown_fds),
            grown_fds <= _MORE_DESCRIPTORS,
        ),
        TargetCheck(
            "times the memory of before, at most", 1.25, round(grown_mib, 3), grown_mib <= 1.25
        ),
    ]
    report.facts["rounds"] = rounds
    report.facts["outcomes"] = {
        name: dict(
            sum((t.kinds for t in results.tallies), start=results.tallies[0].kinds.__class__())
        )
        for name, results in seen.items()
    }


async def _measure(given: argparse.Namespace) -> Report:
    report = await simulated(given.port, given.rounds, given.clients, given.settle)
    if given.real:
        from loadtests.chaos.engine_kill import real

        await real(given.port + 10, report)
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("chaos", __doc__)
    words.add_argument(
        "--rounds", type=int, default=3, help="how many times to inject each fault (default 3)"
    )
    words.add_argument(
        "--clients", type=int, default=16, help="number of concurrent requests (default 16)"
    )
    words.add_argument(
        "--settle", type=float, default=3.0, help="seconds of traffic after each fault (default 3)"
    )
    words.add_argument("--no-real", dest="real", action="store_false", help="skip the real engine")
    words.add_argument(
        "--port", type=int, default=8200, help="first of 12 consecutive free ports (default 8200)"
    )
    given = words.parse_args()
    return tell(lambda _: asyncio.run(_measure(given)), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
