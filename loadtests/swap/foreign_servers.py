"""`python -m loadtests.swap --engines command`: what a pool adds to another project's server.

The server is `loadtests.lib.fake_openai_server`. In turn with each swap the same program is started
and stopped by hand, or put to sleep and woken, and asked whether it is ready every millisecond.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson

from loadtests.lib.child_processes import say
from loadtests.lib.median_intervals import differences, median
from loadtests.lib.targets_and_report import Report, Table, at_most
from service.config import Config
from service.engine.command.port_owner import free_port
from service.engine.engine_interface import Message, Send
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.pool.slots.shared_slot import SharedSlot
from service.rpc.call_headers import Call
from service.rpc.http_connections import HttpConnection, HttpConnections
from service.telemetry.pool_metrics import PoolMetrics

_SWAP_MS, _STREAM_MS = 100.0, 1.0
_HOST = "127.0.0.1"
_CHAT = "/v1/chat/completions"
_TOKENS, _STEP_MS = 32, 5
_POLL_S = 0.001
_numbers = itertools.count()


def command(port: int | None = None) -> list[str]:
    """Return the server's command; without a port, with `{port}`."""
    shown = "{port}" if port is None else str(port)
    module = "loadtests.lib.fake_openai_server"
    return [sys.executable, "-m", module, "--port", shown, "--step-ms", str(_STEP_MS)]


def config(*, sleeps: bool) -> Config:
    """Return a config of two servers that take turns in a slot."""
    settings: dict[str, Any] = {"run": command(), "memory_bytes": "100MiB"}
    if sleeps:
        settings |= {"sleep": {"url": "/sleep"}, "wake": {"url": "/wake"}}
    pool = {"slots": 1, "swap": {"min_stay_s": 0.0}}
    experts = {name: {"command": settings} for name in ("a", "b")}
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


@asynccontextmanager
async def running_pool(*, sleeps: bool) -> AsyncIterator[Pool]:
    """Run a pool of two servers in this process."""
    pool = Pool("p")
    builder = PoolBuilder(config(sleeps=sleeps), "p", pool, PoolMetrics())
    pool.start()
    try:
        yield pool
    finally:
        await builder.stop(1.0)


def body_for(expert: str, tokens: int) -> bytes:
    """Return a streamed request."""
    messages = [{"role": "user", "content": "hello"}]
    fields = {"model": expert, "messages": messages, "max_tokens": tokens, "stream": True}
    return orjson.dumps(fields)


async def ask(pool: Pool, expert: str, send: Send, tokens: int = 1) -> None:
    """Send a streamed request to a pool."""
    number = next(_numbers)
    call = Call(_CHAT, expert, f"r{number}", 60_000, True, "g", number)
    await pool.run(call, body_for(expert, tokens), send)


async def _ignore(message: Message) -> None:
    del message


# --- swaps


async def _until_ready(connections: HttpConnections) -> None:
    while True:
        try:
            await _post(connections, "/health", "GET")
        except OSError:
            await asyncio.sleep(_POLL_S)
        else:
            return


async def _post(connections: HttpConnections, path: str, method: str = "POST") -> None:
    connection = await connections.take()
    try:
        reply = await connection.request(connections.head(path, {}, method), b"")
        await reply.body.read()
    finally:
        connections.give_back(connection)


class ServerByHand:
    """The same server, started by hand."""

    def __init__(self) -> None:
        self._port = free_port(_HOST)
        self.connections = HttpConnections(_HOST, self._port, 5.0)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._process = await asyncio.to_thread(
            subprocess.Popen, command(self._port), stdout=subprocess.DEVNULL
        )
        await _until_ready(self.connections)

    async def stop(self) -> None:
        """Stop the server, and wait until it has ended."""
        self.connections.close()
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)


async def restarts(times: int) -> tuple[list[float], list[float]]:
    """Return the seconds of swaps by stop and start, and of the same by hand, in pairs."""
    ours, by_hand = [], []
    async with running_pool(sleeps=False) as pool:
        await ask(pool, "a", _ignore)
        (slot,) = pool.slots
        assert isinstance(slot, SharedSlot)
        hand = ServerByHand()
        await hand.start()
        for i in range(times):
            await ask(pool, "ba"[i % 2], _ignore)
            ours.append(slot.swaps[-1].swap_s)
            began_s = time.perf_counter()
            await hand.stop()
            hand = ServerByHand()
            await hand.start()
            by_hand.append(time.perf_counter() - began_s)
        await hand.stop()
        if len(slot.swaps) != times or slot.swaps[-1].method != "respawn":
            raise RuntimeError(f"not the swaps that were asked for: {slot.swap_counts()}")
    return ours, by_hand


async def naps(times: int) -> tuple[list[float], list[float]]:
    """Return the seconds of swaps by sleep and wake, and of the calls by hand, in pairs."""
    ours, by_hand = [], []
    async with running_pool(sleeps=True) as pool:
        for name in ("a", "b", "a"):
            await ask(pool, name, _ignore)
        (slot,) = pool.slots
        assert isinstance(slot, SharedSlot)
        hand = ServerByHand()
        await hand.start()
        for i in range(times):
            await ask(pool, "ba"[i % 2], _ignore)
            if slot.swaps[-1].method != "sleep":
                raise RuntimeError(f"a swap by {slot.swaps[-1].method}")
            ours.append(slot.swaps[-1].swap_s)
            began_s = time.perf_counter()
            for path in ("/sleep", "/wake"):
                await _post(hand.connections, path)
            await _until_ready(hand.connections)
            by_hand.append(time.perf_counter() - began_s)
        await hand.stop()
    return ours, by_hand


# --- streams


class _Arrivals:
    """The times at which an answer's parts came, in seconds after the request."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self.first_s = 0.0
        self.all_s = 0.0

    def came(self) -> None:
        self.all_s = time.perf_counter() - self._began_s
        self.first_s = self.first_s or self.all_s

    async def send(self, message: Message) -> None:
        if message.get("body"):
            self.came()


async def _stream_by_hand(connections: HttpConnections) -> _Arrivals:
    arrivals = _Arrivals()
    connection: HttpConnection = await connections.take()
    try:
        head = connections.head(_CHAT, {"content-type": "application/json"})
        reply = await connection.request(head, body_for("a", _TOKENS))
        while await reply.body.read(65536):
            arrivals.came()
    finally:
        connections.give_back(connection)
    return arrivals


async def streams(times: int) -> tuple[list[_Arrivals], list[_Arrivals]]:
    """Return the arrivals of streams through a pool and of the same by hand, in pairs."""
    ours, by_hand = [], []
    async with running_pool(sleeps=False) as pool:
        hand = ServerByHand()
        await hand.start()
        for i in range(times + 3):
            arrivals = _Arrivals()
            await ask(pool, "a", arrivals.send, _TOKENS)
            direct = await _stream_by_hand(hand.connections)
            if i >= 3:  # connections and code are warm
                ours.append(arrivals)
                by_hand.append(direct)
        await hand.stop()
    return ours, by_hand


def report_of(times: int) -> Report:
    """Measure, and report."""

    def run(what: str, measure: Callable[[int], Any], count: int) -> Any:
        say(what)
        return asyncio.run(measure(count))

    report = Report("swaps of other projects' servers")
    table = Table(
        "medians with 95 % intervals",
        ("what", "pairs", "through a pool, ms", "by hand, ms", "added, ms"),
    )

    def add(name: str, pairs: tuple[list[float], list[float]], target_ms: float) -> None:
        ours, by_hand = pairs
        one, other = [1000 * s for s in ours], [1000 * s for s in by_hand]
        added = differences(one, other)
        row = (name, str(len(one)), median(one).text(2), median(other).text(2), added.text(2))
        table.rows.append(row)
        report.facts[name] = {
            "ours_ms": median(one).as_json(),
            "by_hand_ms": median(other).as_json(),
            "added_ms": added.as_json(),
        }
        report.reach.append(at_most(f"{name}: added, ms", target_ms, added))

    add("swap by stop and start", run("stop and start", restarts, times), _SWAP_MS)
    add("swap by sleep and wake", run("sleep and wake", naps, times), _SWAP_MS)
    ours, by_hand = run("streams", streams, 5 * times)
    for name, part in (("first", "first_s"), ("last", "all_s")):
        add(
            f"stream, until its {name} bytes",
            ([getattr(one, part) for one in ours], [getattr(one, part) for one in by_hand]),
            _STREAM_MS,
        )
    report.tables.append(table)
    report.notes.append(
        f"A stream has {_TOKENS} chunks at intervals of {_STEP_MS} ms, so that delays that add up "
        "show in its last bytes."
    )
    return report
