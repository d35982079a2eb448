"""`python -m loadtests.soak`: Sends mixed traffic for a long time, and measures what grows.

The traffic has named experts and `auto`, whole answers and streams, clients that leave, experts
that take turns in a slot, a remote expert, and two gateways with their Redis. The test records
memory, descriptors and threads of every process all the time.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import psutil

from loadtests.chaos.__main__ import MIX, calm
from loadtests.chaos.disturbed_site import Site, site
from loadtests.chaos.judged_traffic import LEFT, RIGHT, Traffic
from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

_ROLES = {"gateways": "coe:gateway", "pools": "coe:pool-", "HAProxy": "bin/haproxy"}
_LOOKS = 60
# What a process takes in its first minutes is no leak: tables fill, code is compiled.
_WARM_SHARE = 0.25
_GROWTH = 1.05
_SLACK_MIB = 3.0
_DESCRIPTORS = 16


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """A sample of a role's processes."""

    at_s: float
    resident_mib: float
    descriptors: int
    threads: int


def _look(running: Site, part: str, began_s: float) -> ProcessSample:
    resident, descriptors, threads = 0, 0, 0
    for process in running.processes(part):
        try:
            resident += process.memory_info().rss
            descriptors += process.num_fds()
            threads += process.num_threads()
        except psutil.Error:
            continue
    return ProcessSample(time.monotonic() - began_s, resident / 2**20, descriptors, threads)


async def soak(port: int, minutes: float, clients: int) -> Report:
    """Everything, for so long."""
    report = Report("soak")
    looks: dict[str, list[ProcessSample]] = {role: [] for role in _ROLES}
    ended: Counter[str] = Counter()
    details: Counter[str] = Counter()
    async with site(port) as running:
        began_s = time.monotonic()
        end_s = began_s + minutes * 60
        step_s = minutes * 60 / _LOOKS
        async with Traffic(
            port, MIX, clients, key=running.key, seed=3, pause_s=0.01, leaving=0.1
        ) as traffic:
            number = 0
            while time.monotonic() < end_s:
                number += 1
                with traffic.tally() as tally:
                    await asyncio.sleep(max(0.0, began_s + number * step_s - time.monotonic()))
                    for role, part in _ROLES.items():
                        sample = await asyncio.to_thread(_look, running, part, began_s)
                        looks[role].append(sample)
                ended.update(tally.kinds)
                details.update(
                    f"{verdict.kind} {verdict.model}: {verdict.detail}"
                    for verdict in tally.verdicts
                    if verdict.kind not in (RIGHT, LEFT)
                )
                if number % (_LOOKS // 6) == 0:
                    say(f"{number * step_s / 60:.1f} min: {sum(ended.values())} requests")
        left = await calm(running)
        await asyncio.to_thread(running.stop)
        left["reserved in Redis"] = await running.reserved()
    _tell(report, looks, ended, details, left, minutes)
    return report


def _tell(
    report: Report,
    looks: dict[str, list[ProcessSample]],
    ended: Counter[str],
    details: Counter[str],
    left: dict[str, float],
    minutes: float,
) -> None:
    requests = sum(ended.values())
    bad = requests - ended[RIGHT] - ended[LEFT]
    report.reach += [
        TargetCheck(
            "requests, at least", 20.0 * minutes, float(requests), requests >= 20 * minutes
        ),
        TargetCheck("requests not answered right, at most", 0.0, float(bad), bad == 0),
    ]
    columns = ("processes", "MiB, early", "MiB, late", "descriptors", "threads")
    table = Table(f"{requests} requests in {minutes:g} minutes", columns)
    for role, seen in looks.items():
        warm = seen[int(len(seen) * _WARM_SHARE) :]
        quarter = max(1, len(warm) // 4)
        early, late = warm[:quarter], warm[-quarter:]
        before = statistics.median(sample.resident_mib for sample in early)
        after = statistics.median(sample.resident_mib for sample in late)
        most = before * _GROWTH + _SLACK_MIB
        more = max(sample.descriptors for sample in late) - max(
            sample.descriptors for sample in early
        )
        table.rows.append(
            (
                role,
                f"{before:.1f}",
                f"{after:.1f}",
                f"{early[0].descriptors} to {late[-1].descriptors}",
                f"{early[0].threads} to {late[-1].threads}",
            )
        )
        report.reach += [
            TargetCheck(f"MiB of {role}, at most", round(most, 1), round(after, 1), after <= most),
            TargetCheck(
                f"descriptors more of {role}", _DESCRIPTORS, float(more), more <= _DESCRIPTORS
            ),
        ]
    report.tables.append(table)
    report.reach += [
        TargetCheck(f"{name} afterwards, at most", 0.0, value, value == 0)
        for name, value in left.items()
    ]
    report.notes += [f"{count} x {what}" for what, count in details.most_common(5)]
    report.facts |= {
        "minutes": minutes,
        "ended": dict(ended),
        "looks": {
            role: [
                [round(sample.at_s), round(sample.resident_mib, 1), sample.descriptors]
                for sample in seen
            ]
            for role, seen in looks.items()
        },
    }


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("soak", __doc__)
    words.add_argument("--minutes", type=float, default=30.0, help="minutes to run (default 30)")
    words.add_argument(
        "--clients", type=int, default=16, help="number of concurrent requests (default 16)"
    )
    words.add_argument(
        "--port",
        type=int,
        default=8200,
        help="first of three consecutive free ports (default 8200)",
    )
    given = words.parse_args()
    return tell(
        lambda _: asyncio.run(soak(given.port, given.minutes, given.clients)),
        as_json=given.json,
    )


if __name__ == "__main__":
    sys.exit(main())
