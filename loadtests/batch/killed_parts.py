"""Batches of a service whose parts are killed (SIGKILL) at random moments.

`coe serve` runs two gateways with a Redis that writes each change to its disk, simulated pools, and
engines that are processes of their own. Gateways, pools, engines and Redis are killed in random
order, and once the service as a whole, while batches run. Each line must then be in the output
once, and be charged once; a cancelled batch must stop soon and give what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import psutil

from loadtests.chaos.disturbed_site import GATEWAY, POOL, Redis, service
from loadtests.lib.child_processes import say
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.broker.limit_and_budget_ledger import Ledger
from service.broker.token_prices import MICRO
from service.cli.batch.batch_client import ENDED, BatchClient
from service.config import Config
from service.errors import CoeError, StoreUnavailableError
from service.gateway.store_setup import open_store
from service.store.api_keys import digest_of
from service.types import Tenant

T = TypeVar("T")

KEPT, CANCELLED = "kept", "cancelled"
_ENGINE = "loadtests.lib.fake_openai_server"
_MODELS = ("general", "math", "turn-a", "turn-b", "server", "auto")
_LINES = 400
# More than they cost: a batch with a bound is also planned again while it runs.
_TERMS = {"max_cost": 1000.0}
_TOKENS, _STEP_MS = 40, 25
_CANCELLED_S = 5.0
_LEASE_S = 3.0
# A part of a service comes again within this time, and each call is answered.
_AGAIN_S = 180.0
_LOOK_S = 0.1


def settings(port: int, folder: Path, keys: dict[str, str]) -> dict[str, Any]:
    """Two gateways, two replicas of a pool, a swapping one, and one whose engine is a process."""
    price = {"price": {"prompt": 100, "completion": 300}}
    server = [sys.executable, "-m", _ENGINE, "--port", "{port}"]
    server += ["--whole-ms", str(_TOKENS * _STEP_MS)]
    limits = {"budget": {"amount": 1_000_000_000, "period": "month"}}
    simulated = {"decode_ms": _STEP_MS, "tokens": _TOKENS, "max_num_seqs": 8}
    command = {
        "run": server,
        "memory_bytes": "100MiB",
        # Its processes are known by their folder: they are no children of the service's.
        "cwd": str(folder),
        "env": {"PYTHONPATH": str(Path.cwd())},
    }
    return {
        "server": {"port": port, "drain_s": 5.0, "gateways": 2},
        "store": {
            "kind": "redis",
            "url": f"redis://127.0.0.1:{port + 1}/0",
            "lease_s": 5.0,
        },
        "batches": {"folder": str(folder / "batches"), "lease_s": _LEASE_S},
        "tenants": {name: limits for name in keys},
        "keys": {name: {"tenant": name, "sha256": digest_of(key)} for name, key in keys.items()},
        "experts": {
            "general": {"model": "m", "categories": ["general"], **price},
            "math": {"model": "m", "categories": ["math"], **price},
            "turn-a": {"model": "m", **price},
            "turn-b": {"model": "m", **price},
            "server": {"command": command, **price},
        },
        "pools": {
            "main": {
                "engine": "simulated",
                "experts": ["general", "math"],
                "min_replicas": 2,
                "cpus": 0.1,
                "simulated": simulated,
            },
            "turns": {
                "engine": "simulated",
                "experts": ["turn-a", "turn-b"],
                "slots": 1,
                "cpus": 0.1,
                "swap": {"min_stay_s": 0.1, "max_wait_s": 2.0},
                "simulated": {**simulated, "swap_s": 0.02, "fill_s": 0.05},
            },
            "servers": {"experts": ["server"], "cpus": 0.1, "vllm": {"max_num_seqs": 8}},
        },
    }


@dataclass
class Kill:
    """One kill.

    Attributes:
        what: What was killed.
        again_s: The time until the batch had a further result, in s.
    """

    what: str
    again_s: float


@dataclass
class Cancellation:
    """One batch that was cancelled.

    Attributes:
        took_s: The time until it was cancelled, in s.
        counted: Its lines with an answer.
        written: Lines in its output.
        distinct: Different lines in its output.
        cost: Units of cost of the lines in its output.
    """

    took_s: float
    counted: int
    written: int
    distinct: int
    cost: float


@dataclass
class KilledSite:
    """The service, its Redis, and its batches.

    Args:
        folder: Where everything is.
        port: The service's port; the next one is that of Redis.
        chance: Chooses the moments.
    """

    folder: Path
    port: int
    chance: random.Random
    keys: dict[str, str] = field(
        default_factory=lambda: {
            name: "coe-" + secrets.token_urlsafe(32) for name in (KEPT, CANCELLED)
        }
    )
    batches: list[str] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    cancellations: list[Cancellation] = field(default_factory=list)
    # Lines whose results were there before the service was killed as a whole, and after.
    resumed: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = settings(self.port, self.folder, self.keys)
        self.redis = Redis(self.port + 1, self.folder, "always")
        self._numbers = itertools.count()
        self._stack = contextlib.ExitStack()
        self._pid = 0
        url = f"http://127.0.0.1:{self.port}"
        self.clients = {name: BatchClient(url, key) for name, key in self.keys.items()}

    def start(self) -> None:
        """Start the service; Redis runs already."""
        self._stack = contextlib.ExitStack()
        self._pid = self._stack.enter_context(service(self.config, self.folder, "", None))

    def stop(self) -> None:
        """Stop the service."""
        self._stack.close()

    def processes(self, part: str = "") -> list[psutil.Process]:
        """The service's processes whose command has this text."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if part in (" ".join(process.cmdline()) or process.name()):
                        found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """The processes of engines."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and _ENGINE in process.cmdline():
                    found.append(process)
        return found

    # --- batches

    def submit(self, tenant: str, lines: int) -> str:
        """Create a batch, and return its id."""
        path = self.folder / f"input-{next(self._numbers)}.jsonl"
        with path.open("wb") as file:
            for i in range(lines):
                model = _MODELS[i % len(_MODELS)]
                content = f"question {i} of {path.stem}"
                body = {
                    "model": model,
                    "max_tokens": _TOKENS,
                    "messages": [{"role": "user", "content": content}],
                }
                given = {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions"}
                file.write(orjson.dumps({**given, "body": body}) + b"\n")
        client = self.clients[tenant]
        file_id = patient(lambda: client.upload(path))

        def create() -> str:
            # A creation whose reply was lost counts.
            made = [one for one in client.batches() if one["input_file_id"] == file_id]
            if made:
                return str(made[0]["id"])
            return str(client.create(file_id, "/v1/chat/completions", _TERMS)["id"])

        return patient(create)

    def batch(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """A batch as it is now."""
        return patient(lambda: self.clients[tenant].batch(batch_id))

    def ended(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """A batch, once it has ended."""
        _until(lambda: self.batch(tenant, batch_id)["status"] in ENDED, f"the end of {batch_id}")
        return self.batch(tenant, batch_id)

    def done(self, batch_id: str) -> int:
        """The lines of a kept batch that have a result."""
        counts = self.batch(KEPT, batch_id)["request_counts"]
        return int(counts["completed"]) + int(counts["failed"])

    def content(self, tenant: str, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of a file; none of a file that is not there."""
        if file_id is None:
            return []

        def read() -> bytes:
            with self.clients[tenant].content(file_id) as reply:
                data: bytes = reply.read()
                return data

        return [orjson.loads(line) for line in patient(read).splitlines()]

    def running_batch(self) -> str:
        """A batch with enough lines left; a new one where the last one is near its end."""
        if self.batches and self.done(self.batches[-1]) < _LINES // 2:
            return self.batches[-1]
        self.batches.append(self.submit(KEPT, _LINES))
        return self.batches[-1]

    # --- kills

    def kill(self, part: str) -> None:
        """Kill a random process of a part, at a random moment, and wait until lines go on."""
        batch_id = self.running_batch()
        self._until_more(batch_id, self.done(batch_id))
        time.sleep(self.chance.uniform(0.0, 2.0))
        if part == "Redis":
            self.redis.kill()
            time.sleep(self.chance.uniform(0.0, 2.0))
            self.redis.start()
        elif part == "service":
            self._kill_all(batch_id)
        else:
            title = {"gateway": GATEWAY, "pool": POOL}.get(part)
            look = self.engines if title is None else partial(self.processes, title)
            victim = self.chance.choice(_until(look, f"a process of a {part}"))
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        at_s = time.monotonic()
        before = self.done(batch_id)
        self._until_more(batch_id, before)
        self.kills.append(Kill(part, time.monotonic() - at_s))
        say(f"killed: {part}; the next result came after {self.kills[-1].again_s:.1f} s")

    def _until_more(self, batch_id: str, before: int) -> None:
        _until(
            lambda: self.done(batch_id) > before or self.batch(KEPT, batch_id)["status"] in ENDED,
            "a further result",
        )

    def _kill_all(self, batch_id: str) -> None:
        """Kill every process of the service but Redis, and start it again."""
        before = self.done(batch_id)
        root = psutil.Process(self._pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.stop()
        self.start()
        self.resumed.append((before, self.done(batch_id)))

    def cancel(self, *, after_kill: bool) -> None:
        """Cancel a batch in the middle, and read its output.

        Args:
            after_kill: Whether a gateway is killed just before, perhaps the one that runs it.
        """
        batch_id = self.submit(CANCELLED, _LINES)
        few = len(_MODELS)
        _until(
            lambda: self.batch(CANCELLED, batch_id)["request_counts"]["completed"] >= few,
            "some results of the batch to cancel",
        )
        client = self.clients[CANCELLED]
        if after_kill:
            victims = _until(partial(self.processes, GATEWAY), "a process of a gateway")
            self.chance.choice(victims).kill()
        at_s = time.monotonic()
        patient(lambda: client.cancel(batch_id))
        found = self.ended(CANCELLED, batch_id)
        took_s = time.monotonic() - at_s
        lines = self.content(CANCELLED, found["output_file_id"])
        self.cancellations.append(
            Cancellation(
                took_s,
                int(found["request_counts"]["completed"]),
                len(lines),
                len({line["custom_id"] for line in lines}),
                sum(map(cost_of, lines)),
            )
        )
        say(f"cancelled a batch in {took_s:.1f} s; {len(lines)} lines are there")

    # --- the account

    async def spent(self, tenant: str) -> tuple[float, float]:
        """What the ledger has of a tenant's budget: spent, and still reserved.

        Waits until the leases of killed gateways have ended.
        """
        config = Config.model_validate(self.config)
        store = open_store(config, "auditor")
        await store.start()
        try:
            end_s = time.monotonic() + 2 * config.store.lease_s + 5
            while True:
                with contextlib.suppress(StoreUnavailableError):
                    limits = await Ledger(config, store).limits(Tenant(tenant))
                    _, balance = limits[f"tenant/{tenant}/budget"]
                    if balance.reserved == 0 or time.monotonic() > end_s:
                        return balance.spent / MICRO, balance.reserved / MICRO
                await asyncio.sleep(0.5)
        finally:
            await store.stop()


def cost_of(line: dict[str, Any]) -> float:
    """What a line of an output file cost."""
    return float(line["response"]["body"]["usage"]["coe"]["cost"])


def patient(call: Callable[[], T]) -> T:
    """Repeat a call that parts of the service may be too dead to answer."""
    end_s = time.monotonic() + _AGAIN_S
    while True:
        try:
            return call()
        except (CoeError, OSError, ValueError):
            if time.monotonic() > end_s:
                raise
        time.sleep(_LOOK_S)


def _until(found: Callable[[], T], what: str) -> T:
    """Wait for a value that is true. Raises RuntimeError where none comes."""
    end_s = time.monotonic() + _AGAIN_S
    while not (value := found()):
        if time.monotonic() > end_s:
            raise RuntimeError(f"{what} did not come within {_AGAIN_S:.0f} s")
        time.sleep(_LOOK_S)
    return value


def _order(kills: int, chance: random.Random) -> list[str]:
    """What is killed, in random order: each part as often as others, the whole service once."""
    parts = list(itertools.islice(itertools.cycle(("gateway", "pool", "engine", "Redis")), kills))
    parts[-1] = "service"
    chance.shuffle(parts)
    return parts


@contextlib.contextmanager
def _site(port: int, seed: int) -> Iterator[KilledSite]:
    if not Redis.there():
        raise RuntimeError("redis-server is needed: install Debian's package")
    with tempfile.TemporaryDirectory(prefix="loadtests-kills-") as name:
        site = KilledSite(Path(name), port, random.Random(seed))
        site.redis.start()
        try:
            site.start()
            try:
                yield site
            finally:
                site.stop()
        finally:
            site.redis.stop()


def measure(report: Report, port: int, *, kills: int, seed: int) -> None:
    """Run batches while parts are killed, and compare outputs with the ledger."""
    with _site(port, seed) as site:
        parts = _order(kills, site.chance)
        say(f"to be killed: {', '.join(parts)}")
        cancelled_at = {len(parts) // 4: False, len(parts) // 2: True, 3 * len(parts) // 4: True}
        for number, part in enumerate(parts):
            if number in cancelled_at:
                site.cancel(after_kill=cancelled_at[number])
            site.kill(part)
        say("waiting for the batches")
        outputs: list[list[dict[str, Any]]] = []
        errors = 0
        ended: Counter[str] = Counter()
        for batch_id in site.batches:
            batch = site.ended(KEPT, batch_id)
            ended[batch["status"]] += 1
            outputs.append(site.content(KEPT, batch["output_file_id"]))
            errors += len(site.content(KEPT, batch["error_file_id"]))
        site.stop()
        spent = {name: asyncio.run(site.spent(name)) for name in (KEPT, CANCELLED)}
    _tell(report, site, outputs, errors, ended, spent)


def _tell(
    report: Report,
    site: KilledSite,
    outputs: list[list[dict[str, Any]]],
    errors: int,
    ended: Counter[str],
    spent: dict[str, tuple[float, float]],
) -> None:
    expected = [f"c{i}" for i in range(_LINES)]
    wrong = missing = doubled = 0
    for lines in outputs:
        counts = Counter(line["custom_id"] for line in lines)
        missing += sum(counts[name] == 0 for name in expected)
        doubled += sum(count - 1 for count in counts.values())
        wrong += [line["custom_id"] for line in lines] != expected
    cost = sum(cost_of(line) for lines in outputs for line in lines)
    off = abs(spent[KEPT][0] - cost)
    table = Table(
        f"{len(outputs)} batches of {_LINES} lines, {len(site.kills)} kills",
        ("killed", "times", "next result after at most, s"),
    )
    for part in sorted({kill.what for kill in site.kills}):
        again_s = [kill.again_s for kill in site.kills if kill.what == part]
        table.rows.append((part, str(len(again_s)), f"{max(again_s):.1f}"))
    report.tables.append(table)
    slowest_s = max(one.took_s for one in site.cancellations)
    partial = sum(
        one.counted != one.written or one.written != one.distinct for one in site.cancellations
    )
    kept = sum(one.cost for one in site.cancellations)
    back = sum(after < before for before, after in site.resumed)

    def zero(name: str, value: float) -> TargetCheck:
        return TargetCheck(f"{name}, at most", 0.0, value, value == 0)

    report.reach += [
        TargetCheck(
            "batches completed", float(len(outputs)), float(ended["completed"]),
            ended["completed"] == len(outputs),
        ),
        zero("lines lost", float(missing)),
        zero("lines twice", float(doubled)),
        zero("lines that failed", float(errors)),
        zero("outputs in another order", float(wrong)),
        TargetCheck(
            "units of cost charged beyond those of the answers, or less, at most",
            1e-6, round(off, 9), off <= 1e-6,
        ),
        zero("units of cost still reserved", sum(reserved for _, reserved in spent.values())),
        TargetCheck(
            "s until a cancelled batch has ended, at most",
            _CANCELLED_S, round(slowest_s, 2), slowest_s <= _CANCELLED_S,
        ),
        zero("cancelled batches whose output is not what was counted", float(partial)),
        TargetCheck(
            "units of cost charged for cancelled batches, at least those of their answers",
            round(kept, 6), round(spent[CANCELLED][0], 6), spent[CANCELLED][0] >= kept - 1e-6,
        ),
        zero("restarts that lost results", float(back)),
    ]  # fmt: skip
    report.facts |= {
        "kills": [(kill.what, round(kill.again_s, 2)) for kill in site.kills],
        "cancelled_s": [round(one.took_s, 2) for one in site.cancellations],
        "resumed": site.resumed,
        "cost": cost,
        "spent": spent,
    }
