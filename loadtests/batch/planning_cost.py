"""Time and memory of planning a large batch, in the gateway of a whole service.

16 simulated experts with a router in front of them. All lines are for `auto`, so that each is
classified and the choice among all experts is open. Meanwhile a client asks one short request
after another, which shows what planning does to people.
"""

from __future__ import annotations

import http.client
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

from loadtests.chaos.disturbed_site import GATEWAY, service
from loadtests.lib.child_processes import say
from loadtests.lib.coe_service import config
from loadtests.lib.median_intervals import percentile
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.cli.batch.batch_client import BatchClient

_EXPERTS = 16
_CATEGORIES = ("general", "math", "intents", "code")
_TEXT = (
    "how many cows are in the field and what is their sum after we add seven more of them "
    "write a function that sorts a list book a table for two name the capital of a country"
)
_TIMEOUT_S = 600.0


def settings(port: int, folder: Path) -> dict[str, Any]:
    """A service of 16 experts on one engine."""
    chance = random.Random(4)
    experts = {}
    for number in range(_EXPERTS):
        price = round(chance.uniform(1, 40), 2)
        experts[f"expert-{number}"] = {
            "model": f"m{number}",
            "categories": [_CATEGORIES[number % len(_CATEGORIES)]],
            "quality": {name: round(chance.uniform(0.3, 0.95), 3) for name in _CATEGORIES},
            "price": {"prompt": price, "completion": price},
        }
    pools = {
        "cpu": {
            "engine": "simulated",
            "slots": 1,
            "cpus": 0.1,
            "simulated": {"decode_ms": 5, "tokens": 8, "swap_s": 0.05},
        }
    }
    return {
        **config(port, experts, pools),
        "batches": {"folder": str(folder / "batches")},
    }


def _write_input(path: Path, lines: int) -> None:
    chance, words = random.Random(5), _TEXT.split()
    with path.open("wb") as file:
        for number in range(lines):
            content = " ".join(chance.choices(words, k=chance.randint(8, 60)))
            body = {
                "model": "auto",
                "max_tokens": chance.choice((32, 128, 512)),
                "messages": [{"role": "user", "content": f"{content} {number}"}],
            }
            given = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(orjson.dumps({**given, "body": body}) + b"\n")


class _Person:
    """Asks one short request after another, in a thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.took_s: list[float] = []

    def __enter__(self) -> _Person:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        body = orjson.dumps(
            {
                "model": "expert-0",
                "max_tokens": 1,
                "messages": [{"role": "user", "content": "hello"}],
            }
        )
        while not self._done.is_set():
            began_s = time.monotonic()
            connection.request(
                "POST", "/v1/chat/completions", body, {"content-type": "application/json"}
            )
            connection.getresponse().read()
            self.took_s.append(time.monotonic() - began_s)
            time.sleep(0.05)
        connection.close()


def _gateway(pid: int) -> psutil.Process:
    for process in psutil.Process(pid).children(recursive=True):
        if GATEWAY in " ".join(process.cmdline()):
            return process
    raise RuntimeError("no gateway process found")


def _peak_mib(pid: int) -> float:
    """The most memory that a process has had, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not tell the peak of a process's memory")


def measure(report: Report, port: int, *, lines: int) -> None:
    """Plan a batch by the endpoint and by creating it."""
    with tempfile.TemporaryDirectory(prefix="loadtests-plan-") as name:
        folder = Path(name)
        path = folder / "input.jsonl"
        _write_input(path, lines)
        with service(settings(port, folder), folder, "", None) as pid:
            client = BatchClient(f"http://127.0.0.1:{port}", None)
            gateway = _gateway(pid)
            with _Person(port) as alone:
                time.sleep(5)
            file_id = client.upload(path)
            before_mib = gateway.memory_info().rss / 2**20
            say(f"forecasting {lines} lines")
            began_s = time.monotonic()
            forecast = client.plan(file_id, "/v1/chat/completions", {}, [])
            forecast_s = time.monotonic() - began_s
            costs = [point["cost"] for point in forecast["curve"]]
            terms = {"max_cost": (costs[0] + costs[-1]) / 2}
            cpu_s = sum(gateway.cpu_times()[:2])
            say(f"planning {lines} lines")
            began_s = time.monotonic()
            with _Person(port) as beside:
                made = client.create(file_id, "/v1/chat/completions", terms)
                batch = made
                while batch["status"] == "validating":
                    time.sleep(0.1)
                    batch = client.batch(made["id"])
                plan_s = time.monotonic() - began_s
            plan_cpu_s = sum(gateway.cpu_times()[:2]) - cpu_s
            grown_mib = _peak_mib(gateway.pid) - before_mib
            client.cancel(made["id"])
            while client.batch(made["id"])["status"] == "cancelling":
                time.sleep(0.1)
    if batch["status"] != "in_progress":
        raise RuntimeError(f"the batch is {batch['status']}: {batch['errors']}")
    planned = batch["coe"]["planned"]
    p99_ms = tuple(1000 * percentile(one.took_s, 99) for one in (alone, beside))
    table = Table(
        f"Planning {lines} lines for {_EXPERTS} experts",
        ("", "value"),
        [
            (f"forecast of {len(costs)} budgets without running it, s", f"{forecast_s:.1f}"),
            ("a batch with a budget: time until the first line may run, s", f"{plan_s:.1f}"),
            ("of that, processor time of the gateway, s", f"{plan_cpu_s:.1f}"),
            ("memory of the gateway, at its peak above before, MiB", f"{grown_mib:.0f}"),
            ("a short request alone, p99, ms", f"{p99_ms[0]:.0f}"),
            ("a short request meanwhile, p99, ms", f"{p99_ms[1]:.0f}"),
            ("the longest one meanwhile, ms", f"{1000 * max(beside.took_s):.0f}"),
        ],
    )
    report.tables.append(table)
    shares = {name: model["total"] for name, model in batch["coe"]["models"].items()}
    complete = sum(shares.values()) == lines
    report.reach.append(
        TargetCheck("lines planned", float(lines), float(sum(shares.values())), complete)
    )
    report.facts |= {
        "forecast_s": round(forecast_s, 2),
        "costs": costs,
        "seconds": round(plan_s, 2),
        "cpu_s": round(plan_cpu_s, 2),
        "mib": round(grown_mib, 1),
        "p99_ms": [round(one, 1) for one in p99_ms],
        "planned": planned,
        "shares": shares,
    }
