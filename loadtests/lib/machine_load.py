"""The machine of a measurement, and the share of it that other programs took meanwhile.

A load test's own processes are those that it started, in any session, because services put Ray and
engines into sessions of their own. All other processes are foreign. This matters beyond
bookkeeping: with autogroups, Linux divides processors by session, and then the niceness of foreign
processes does not keep them from slowing the measurement.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In /proc/stat's first line: user, nice, system, idle, iowait, irq, softirq, steal.
_IDLE, _IOWAIT = 3, 4
_BUSY_SHARE = 0.05


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def revision() -> str:
    """The commit that is measured, marked where the checkout differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--match=NONE"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@dataclass(frozen=True, slots=True)
class Process:
    """A process by /proc/<pid>/stat. ticks: used so far, with those of children that ended."""

    pid: int
    parent: int
    session: int
    ticks: int


def parse_stat(line: str) -> Process:
    """A process by its line in /proc."""
    fields = line.rsplit(")", 1)[1].split()
    ticks = sum(int(field) for field in fields[11:15])
    return Process(int(line.split(" ", 1)[0]), int(fields[1]), int(fields[3]), ticks)


def ours_of(processes: Sequence[Process], session: int) -> list[Process]:
    """Return a session's processes with all descendants and their sessions."""
    sessions, pids = {session}, set[int]()
    while True:
        found = [p for p in processes if p.session in sessions or p.parent in pids]
        if len(found) == len(pids):
            return found
        pids = {p.pid for p in found}
        sessions |= {p.session for p in found}


def _processes() -> list[Process]:
    processes = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            line = Path(entry.path, "stat").read_text()
        except OSError:
            continue  # it has just ended; its parent's next figure holds its ticks
        processes.append(parse_stat(line))
    return processes


def _our_ticks(session: int) -> int:
    return sum(process.ticks for process in ours_of(_processes(), session))


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    found = {pid}
    children = _processes()
    while more := {p.pid for p in children if p.parent in found} - found:
        found |= more
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Ticks:
    """Processor time since boot: of all kinds, idle, and used by us."""

    whole: int
    idle: int
    ours: int

    @classmethod
    def now(cls) -> Ticks:
        """Read the present counters."""
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0]
        except OSError:
            return cls(0, 0, 0)
        fields = [int(n) for n in first.split()[1:9]]
        idle = fields[_IDLE] + fields[_IOWAIT]
        return cls(sum(fields), idle, _our_ticks(os.getsid(0)))

    def since(self, before: Ticks) -> Ticks:
        """Return the usage since `before`."""
        return Ticks(self.whole - before.whole, self.idle - before.idle, self.ours - before.ours)

    def plus(self, more: Ticks) -> Ticks:
        """The sum of both."""
        return Ticks(self.whole + more.whole, self.idle + more.idle, self.ours + more.ours)

    @property
    def others_share(self) -> float:
        """The part of all processor time that other people's work took."""
        return max(0.0, (self.whole - self.idle - self.ours) / max(1, self.whole))

    @property
    def idle_share(self) -> float:
        """The part of all processor time that nobody used."""
        return self.idle / max(1, self.whole)


@dataclass(slots=True)
class Watch:
    """From its making to `report`: how busy the machine was, and with whose work.

    Processes that end take their ticks with them, so whoever starts some measures in
    a `window`, while they all live.
    """

    load_before: float
    began: Ticks
    began_at: str
    spent: Ticks | None = None

    @classmethod
    def start(cls) -> Watch:
        """Begin, before anything of ours has been started."""
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return cls(os.getloadavg()[0], Ticks.now(), at)

    @contextmanager
    def window(self) -> Iterator[None]:
        """Only what happens in windows is reported, once there is one."""
        before = Ticks.now()
        yield
        spent = Ticks.now().since(before)
        self.spent = spent if self.spent is None else self.spent.plus(spent)

    def report(self) -> dict[str, Any]:
        """Return the values for the JSON object."""
        spent = self.spent or Ticks.now().since(self.began)
        return {
            "date": self.began_at,
            "revision": revision(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load_before": round(self.load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others_share": round(spent.others_share, 3),
            "idle_share": round(spent.idle_share, 3),
            "busy_with_others": spent.others_share > _BUSY_SHARE,
        }


def describe(machine: dict[str, Any]) -> str:
    """Describe the machine in one line."""
    return (
        f"{machine['date']}, at {machine['revision']}, {machine['cores']} cores of "
        f"{machine['cpu']}; load {machine['load_before']} before and {machine['load_after']} "
        f"after; other people's work took {machine['others_share']:.0%} of the processor time, "
        f"{machine['idle_share']:.0%} was idle"
        + (": the machine was BUSY" if machine["busy_with_others"] else "")
    )
