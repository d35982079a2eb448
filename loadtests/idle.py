"""`python -m loadtests.idle`: what a service takes while nobody asks: processor time and memory.

It starts the service, lets it be idle, and then reads the processor time of every process by role:
ours, Ray's, HAProxy's and vLLM's apart. Then it releases the accelerator (`POST /admin/release`),
reads the memory of all processes before and after, and asks once more.

A pool's process is ours, and vLLM's front end runs inside it. Ray's core worker runs in threads of
its own in our gateway and pool: its main loop wakes up a hundred times a second. It is
shown apart, and the target is told with it and without it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtests.lib.child_processes import admin_key_of, say
from loadtests.lib.coe_service import serving
from loadtests.lib.command_line import parser, tell
from loadtests.lib.machine_load import descendants
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

_ROOT = Path(__file__).resolve().parents[1]
_DEMO = _ROOT / "deploy" / "config" / "demo.yaml"
_MOST_SHARE = 2.0  # per cent of a core, of our own processes together
_SETTLE_S = 10.0
# Ray's core worker in our processes: the first thread, and threads with these names.
_RAY_INSIDE = "our processes: Ray's threads"
_RAY_THREADS = (
    "client.poll",
    "event_engine",
    "gcs_client",
    "grpc",
    "nexting_thread",
    "server.poll",
    "task_event",
    "timer_manager",
    "worker.io",
)
# The first match by words of the command line. Ours come before Ray's, whose workers they are.
_ROLES: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("our gateway", (b"ServeReplica", b":gateway")),
    ("our pool", (b"ServeReplica", b":pool-")),
    ("our encoder", (b"service.encoder.encoder_worker",)),
    ("vLLM", (b"VLLM::",)),
    ("HAProxy", (b"bin/haproxy",)),
    ("Redis", (b"redis-server",)),
    ("Ray", (b"ray::",)),
    ("Ray", (b"site-packages/ray/",)),
    ("our command", (b"/coe serve",)),
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What processes of one role have used and hold.

    Attributes:
        processes: Their number.
        busy_s: Processor time so far, in s.
        switches: Times that their threads went to sleep so far.
        resident_bytes: Their resident memory; pages that several share count once for each.
        proportional_bytes: The same, with each shared page divided among those that share it.
    """

    processes: int = 0
    busy_s: float = 0.0
    switches: int = 0
    resident_bytes: int = 0
    proportional_bytes: int = 0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(
            self.processes + other.processes,
            self.busy_s + other.busy_s,
            self.switches + other.switches,
            self.resident_bytes + other.resident_bytes,
            self.proportional_bytes + other.proportional_bytes,
        )


def role_of(command: bytes) -> str:
    """The role of a process by its command line; `other` where no word is known."""
    for role, words in _ROLES:
        if all(word in command for word in words):
            return role
    return "other"


def usage_of(pids: Iterable[int], proc: Path = Path("/proc")) -> dict[str, Usage]:
    """What these processes have used, by role, threads included.

    Args:
        pids: The processes; those that have ended are left out.
        proc: Where the kernel tells of processes.
    """
    found: dict[str, Usage] = {}
    for pid in pids:
        with suppress(OSError, ValueError):
            place = proc / str(pid)
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ")
            if not command:
                continue  # it has ended
            role = role_of(command)
            found[role] = found.get(role, Usage()).plus(_memory(place)).plus(Usage(processes=1))
            for thread in os.listdir(place / "task"):
                with suppress(OSError):
                    name = (place / "task" / thread / "comm").read_text()
                    inside = b"ServeReplica" in command and (
                        thread == str(pid) or name.startswith(_RAY_THREADS)
                    )
                    of = _RAY_INSIDE if inside else role
                    found[of] = found.get(of, Usage()).plus(_thread(place / "task" / thread))
    return found


def _thread(place: Path) -> Usage:
    busy_s = int((place / "schedstat").read_text().split()[0]) / 1e9
    switches = 0
    for line in (place / "status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            switches = int(line.split()[1])
    return Usage(busy_s=busy_s, switches=switches)


def _memory(place: Path) -> Usage:
    sizes = {"Rss:": 0, "Pss:": 0}
    with suppress(OSError):
        for line in (place / "smaps_rollup").read_text().splitlines():
            name, *words = line.split()
            if name in sizes:
                sizes[name] = int(words[0]) * 1024
    return Usage(resident_bytes=sizes["Rss:"], proportional_bytes=sizes["Pss:"])


def _settings(path: Path, port: int, engine: str | None) -> Any:
    settings = yaml.safe_load(path.read_text())
    settings.setdefault("server", {}).update({"port": port, "drain_s": 5.0})
    for expert in settings["experts"].values():
        for field in ("model", "adapter", "profile"):
            given = expert.get(field)
            if isinstance(given, str) and given.startswith("."):
                expert[field] = str((path.parent / given).resolve())
    artifact = settings.get("router", {}).get("artifact")
    if artifact not in (None, "none"):
        settings["router"]["artifact"] = str((path.parent / artifact).resolve())
    for pool in settings["pools"].values():
        if engine is not None:
            pool["engine"] = engine
            pool.setdefault("swap", {}).pop("method", None)
    return settings


def _post(port: int, path: str, body: Any, *, admin_key: str = "") -> None:
    """POST JSON to this machine. Raises RuntimeError for any status but 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json"}
    if admin_key:
        headers["Authorization"] = f"Bearer {admin_key}"
    try:
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        text = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise RuntimeError(f"{path} got {reply.status}: {text[:300]!r}")


def _ask(port: int, model: str) -> float:
    began_s = time.perf_counter()
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    _post(port, "/v1/chat/completions", body)
    return time.perf_counter() - began_s


def measure(path: Path, port: int, engine: str | None, idle_s: float, over_s: float) -> Report:
    """Start the service, and read what it takes while it is idle, and after a release."""
    settings = _settings(path, port, engine)
    model = next(iter(settings["experts"]))
    report = Report("idle")
    with serving(settings) as pid:
        _ask(port, model)
        say(f"idle for {idle_s:.0f} s")
        time.sleep(idle_s)
        resident = _watch(report, pid, "Idle", over_s)
        before = usage_of(descendants(pid))
        _post(port, "/admin/release", {}, admin_key=admin_key_of())
        time.sleep(_SETTLE_S)
        released = _watch(report, pid, "Idle, and released", over_s)
        after = usage_of(descendants(pid))
        back_s = _ask(port, model)
    columns = ("role", "before", "after", "before, shared", "after, shared")
    table = Table("Memory of all processes, MiB", columns)
    for role in sorted({*before, *after} - {_RAY_INSIDE}):
        b, a = before.get(role, Usage()), after.get(role, Usage())
        sizes = (b.resident_bytes, a.resident_bytes, b.proportional_bytes, a.proportional_bytes)
        table.rows.append((role, *(f"{size / 2**20:.0f}" for size in sizes)))
    report.tables.append(table)
    whole = [
        sum(one.proportional_bytes for one in each.values()) / 2**20 for each in (before, after)
    ]
    report.facts |= {
        "idle": resident,
        "released": released,
        "proportional_mib": {"before": round(whole[0]), "after": round(whole[1])},
        "back_s": round(back_s, 2),
    }
    report.notes += [
        f"All processes: {whole[0]:.0f} MiB before the release, {whole[1]:.0f} after it, each "
        f"shared page counted once. The next answer took {back_s:.1f} s.",
        "A pool's process is ours; vLLM's front end runs inside it.",
    ]
    return report


def _watch(report: Report, pid: int, title: str, over_s: float) -> dict[str, float]:
    """Read every role's processor time over a while, in per cent of a core."""
    before, began_s = usage_of(descendants(pid)), time.monotonic()
    time.sleep(over_s)
    after, passed_s = usage_of(descendants(pid)), time.monotonic() - began_s
    table = Table(
        f"{title}, over {passed_s:.0f} s", ("role", "processes", "% of a core", "wake-ups per s")
    )
    shares: dict[str, float] = {}
    for role in sorted(after):
        b, a = before.get(role, Usage()), after[role]
        shares[role] = round(100 * max(0.0, a.busy_s - b.busy_s) / passed_s, 3)
        wakes = max(0, a.switches - b.switches) / passed_s
        count = str(a.processes) if a.processes else ""
        table.rows.append((role, count, f"{shares[role]:.2f}", f"{wakes:.0f}"))
    report.tables.append(table)
    ours = sum(share for role, share in shares.items() if role.startswith("our "))
    alone = ours - shares.get(_RAY_INSIDE, 0.0)
    for what, share in (("processes", ours), ("threads, without Ray's in them", alone)):
        name = f"{title.lower()}: % of a core by our own {what}, at most"
        report.reach.append(TargetCheck(name, _MOST_SHARE, round(share, 3), share <= _MOST_SHARE))
    return shares


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("idle", __doc__)
    words.add_argument("--config", type=Path, default=_DEMO, help="config (default: the demo's)")
    words.add_argument("--engine", choices=("simulated", "vllm"), help="another engine for pools")
    words.add_argument("--port", type=int, default=8470)
    words.add_argument("--idle", type=float, default=300.0, help="s before (default 300)")
    words.add_argument("--over", type=float, default=30.0, help="s of each look (default 30)")
    given: argparse.Namespace = words.parse_args()
    return tell(
        lambda _: measure(given.config, given.port, given.engine, given.idle, given.over),
        as_json=given.json,
    )


if __name__ == "__main__":
    sys.exit(main())
