"""`python -m loadtests.autoscale`: replicas from zero, under a step and a spike, and their removal.

`coe serve` with simulated engines, whose speed is set, so that the right number of replicas is
known. Requests arrive at even times, whether earlier ones are answered or not. Every answer is a
stream, and must be whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import psutil

from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import serving
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

_POOL = "ray::ServeReplica:coe:pool-main"
_TOKENS, _DECODE_MS, _PLACES = 20, 50.0, 4
_SERVICE_S = _TOKENS * _DECODE_MS / 1000
_UTILIZATION = 0.8
_MOST = 5
_WAIT_S = 1.0
_LOOK_S = 0.25
# A stream that outlasts the delay of the removal and the service's own time to drain.
_LONG_TOKENS = 500
_DRAIN_S = 2.0


def settings(port: int, downscale_s: float) -> dict[str, Any]:
    """One kind of pool between 0 and `_MOST` replicas."""
    return {
        "server": {"port": port, "drain_s": _DRAIN_S},
        "experts": {"one": {"model": "m"}},
        "pools": {
            "main": {
                "engine": "simulated",
                "min_replicas": 0,
                "max_replicas": _MOST,
                "cpus": 0.1,
                "simulated": {"decode_ms": _DECODE_MS, "max_num_seqs": _PLACES},
                "autoscaling": {
                    "target_ongoing_requests": None,
                    "target_wait_s": _WAIT_S,
                    "target_utilization": _UTILIZATION,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": downscale_s,
                    "downscale_drain_s": 120,
                },
            }
        },
    }


@dataclass
class Answer:
    """One stream; times of `time.monotonic` in s."""

    asked_s: float
    tokens: int
    first_s: float = math.inf
    seen: int = 0
    fault: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return not self.fault and self.seen == self.tokens


@dataclass
class Phase:
    """A part of the run. `rate`: requests per second; `at_once`: requests at its beginning."""

    name: str
    seconds: float
    rate: float
    at_once: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    @property
    def ideal(self) -> int:
        """Replicas that the rate needs at the aimed utilization, and one for any request at all."""
        busy = self.rate * _SERVICE_S / _PLACES
        return min(_MOST, math.ceil(busy / _UTILIZATION)) if self.rate else 0


@dataclass
class Run:
    """The running service, its client, and what was seen."""

    pid: int
    url: str
    session: aiohttp.ClientSession
    looks: list[tuple[float, int]] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def ask(self, into: list[Answer], tokens: int = _TOKENS) -> None:
        """Send a request, and go on."""
        answer = Answer(time.monotonic(), tokens)
        into.append(answer)
        task = asyncio.create_task(self._stream(answer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _stream(self, answer: Answer) -> None:
        body = {
            "model": "one",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": answer.tokens,
            "stream": True,
        }
        try:
            async with self.session.post(self.url, json=body) as reply:
                if reply.status != 200:
                    answer.fault = f"status {reply.status}: {(await reply.text())[:200]}"
                    return
                ended = False
                async for line in reply.content:
                    if b'"content":"' in line:
                        answer.seen += 1
                        answer.first_s = min(answer.first_s, time.monotonic())
                    ended |= line.startswith(b"data: [DONE]")
                    if line.startswith(b'data: {"error"'):
                        answer.fault = line[:200].decode("utf-8", "replace")
                answer.fault = answer.fault or ("" if ended else "the stream has no end")
        except (aiohttp.ClientError, TimeoutError) as error:
            answer.fault = type(error).__name__

    async def phase(self, phase: Phase) -> Phase:
        """Let a phase pass. Its requests may still run at its end."""
        phase.began_s = time.monotonic()
        for _ in range(phase.at_once):
            self.ask(phase.answers)
        sent = 0
        while (passed_s := time.monotonic() - phase.began_s) < phase.seconds:
            while sent < passed_s * phase.rate:
                self.ask(phase.answers)
                sent += 1
            await asyncio.sleep(0.02)
        phase.ended_s = time.monotonic()
        say(f"{phase.name}: {len(phase.answers)} requests, {self.replicas()} replicas at its end")
        return phase

    async def all_answered(self) -> None:
        """Wait for every request."""
        while self.tasks:
            await asyncio.wait(self.tasks)

    async def look(self) -> None:
        """Count replicas until cancelled."""
        while True:
            count = await asyncio.to_thread(self._count)
            self.looks.append((time.monotonic(), count))
            await asyncio.sleep(_LOOK_S)

    def _count(self) -> int:
        found = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found += " ".join(process.cmdline()).startswith(_POOL)
        return found

    def replicas(self) -> int:
        """Replicas at the last look."""
        return self.looks[-1][1] if self.looks else 0

    def between(self, began_s: float, ended_s: float) -> list[int]:
        """Replicas at the looks within a time."""
        return [count for at_s, count in self.looks if began_s <= at_s < ended_s]

    def replica_seconds(self, began_s: float, ended_s: float) -> float:
        """Return the replicas' time within a time, those that start or drain included."""
        return sum(
            (after_s - at_s) * count
            for (at_s, count), (after_s, _) in pairwise(self.looks)
            if began_s <= at_s < ended_s
        )

    async def until(self, replicas: int, timeout_s: float) -> float:
        """Wait for a number of replicas, and return how long that took; inf: too long."""
        began_s = time.monotonic()
        while self.replicas() != replicas:
            if time.monotonic() - began_s > timeout_s:
                return math.inf
            await asyncio.sleep(0.1)
        return time.monotonic() - began_s


def turns(counts: list[int]) -> int:
    """Return how often a number changed its direction."""
    steps = [after - before for before, after in pairwise(counts) if after != before]
    return sum((before > 0) != (after > 0) for before, after in pairwise(steps))


async def measure(port: int, pid: int, step_s: float, downscale_s: float) -> Report:
    """From zero, a step, a spike, and down to zero under long streams."""
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        run = Run(pid, url, session)
        looking = asyncio.create_task(run.look())
        try:
            await run.until(0, 30)
            zero = await run.phase(Phase("from zero", 0, 0, at_once=1))
            await run.all_answered()
            calm = await run.phase(Phase("calm", step_s / 3, 1))
            # 2 engines' work: three replicas at 80 %.
            step = await run.phase(Phase("step", step_s, 2 * _PLACES / _SERVICE_S))
            long = Phase("long streams", 0, 0, at_once=0)
            for _ in range(2 * _PLACES):
                run.ask(long.answers, _LONG_TOKENS)
            after = await run.phase(Phase("after the step", step_s, 0.5))
            spike = await run.phase(Phase("spike", step_s / 2, 1, at_once=15 * _PLACES))
            quiet_s = time.monotonic()
            await run.all_answered()
            to_zero_s = await run.until(0, downscale_s * 3 + 60)
            ended_s = time.monotonic()
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
    report = Report("autoscale")
    _tell(report, run, [zero, calm, step, long, after, spike])
    _judge(report, run, zero, step, long, after, spike)
    ideal_s = sum(one.seconds * one.ideal for one in (calm, step, after, spike))
    spent_s = run.replica_seconds(zero.began_s, ended_s)
    report.reach += [
        TargetCheck(
            "times the ideal replica-seconds, at most", 2.5, *_checked(spent_s / ideal_s, 2.5)
        ),
        TargetCheck(
            "s from the last request's end to no replica, at most",
            downscale_s + 20,
            *_checked(to_zero_s, downscale_s + 20),
        ),
    ]
    report.facts |= {
        "replica_seconds": round(spent_s, 1),
        "ideal_replica_seconds": round(ideal_s, 1),
        "quiet_after_s": round(quiet_s - zero.began_s, 1),
        "looks": [
            [round(at_s - zero.began_s, 1), count]
            for (at_s, count), (_, before) in zip(run.looks[1:], run.looks, strict=False)
            if count != before
        ],
    }
    report.notes.append(
        f"{spent_s:.0f} replica-seconds, starts and drains included; {ideal_s:.0f} with the right "
        f"number at every time. Replicas by s: "
        + ", ".join(f"{at_s:g}: {count}" for at_s, count in report.facts["looks"])
    )
    return report


def _checked(value: float, most: float) -> tuple[float, bool]:
    return float(f"{value:.4g}"), value <= most


def _tell(report: Report, run: Run, phases: list[Phase]) -> None:
    table = Table(
        "Phases",
        ("phase", "requests", "not whole", "TTFT median, s", "TTFT p95, s", "replicas", "ideal"),
    )
    for one in phases:
        firsts = sorted(answer.first_s - answer.asked_s for answer in one.answers)
        p95 = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
        counts = run.between(one.began_s, one.ended_s) or [0]
        table.rows.append(
            (
                one.name,
                str(len(one.answers)),
                str(sum(not answer.whole for answer in one.answers)),
                f"{statistics.median(firsts):.2f}",
                f"{p95:.2f}",
                f"{min(counts)} to {max(counts)}" if one.seconds else "",
                str(one.ideal) if one.seconds else "",
            )
        )
    report.tables.append(table)
    faults = [answer.fault for one in phases for answer in one.answers if answer.fault]
    report.notes += sorted(set(faults))[:5]


def _judge(
    report: Report, run: Run, zero: Phase, step: Phase, long: Phase, after: Phase, spike: Phase
) -> None:
    everything = [answer for one in (zero, step, long, after, spike) for answer in one.answers]
    lost = sum(not answer.whole for answer in everything)
    first_s = zero.answers[0].first_s - zero.answers[0].asked_s
    counts = run.between(step.began_s, step.ended_s)
    there_s = next(
        (
            at_s - step.began_s
            for at_s, count in run.looks
            if at_s >= step.began_s and count >= step.ideal
        ),
        math.inf,
    )
    late = [a for a in step.answers if a.asked_s > (step.began_s + step.ended_s) / 2]
    late_s = statistics.quantiles((a.first_s - a.asked_s for a in late), n=20)[-1]
    removed = max(run.between(step.began_s, step.ended_s)) - min(
        run.between(after.began_s, after.ended_s)
    )
    report.reach += [
        TargetCheck("streams lost or cut, at most", 0, lost, lost == 0),
        TargetCheck("replicas removed after the step, at least", 1, removed, removed >= 1),
        TargetCheck("s to the first token from zero, at most", 20, *_checked(first_s, 20)),
        TargetCheck("s until the step's replicas are started, at most", 20, *_checked(there_s, 20)),
        TargetCheck(
            "replicas over the ideal in the step, at most",
            1,
            *_checked(max(counts) - step.ideal, 1),
        ),
        TargetCheck("changes of direction in the step, at most", 1, *_checked(turns(counts), 1)),
        TargetCheck(
            "s to the first token in the step's second half, p95, at most",
            2 * _WAIT_S,
            *_checked(late_s, 2 * _WAIT_S),
        ),
    ]


def main() -> int:
    """Measure, and print what came of it."""
    words = parser("autoscale", __doc__)
    words.add_argument("--port", type=int, default=8460, help="of the service")
    words.add_argument("--step", type=float, default=60.0, help="length of the step in s")
    words.add_argument("--downscale", type=float, default=15.0, help="downscale_delay_s")
    given = words.parse_args()

    def measured(watch: object) -> Report:
        del watch
        with serving(settings(given.port, given.downscale), scaled_to_zero=True) as pid:
            return asyncio.run(measure(given.port, pid, given.step, given.downscale))

    return tell(measured, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
