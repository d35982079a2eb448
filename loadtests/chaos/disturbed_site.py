"""The site of a chaos run: the service, its Redis, and a misbehaving endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil

from loadtests.lib.child_processes import admin_key_of, fetch, running
from service.broker.limit_and_budget_ledger import Ledger
from service.config import Config
from service.errors import StoreUnavailableError
from service.gateway.store_setup import open_store
from service.types import Tenant

KEY_ENV = "COE_CHAOS_KEY"
POOL, GATEWAY = "ray::ServeReplica:coe:pool-", "ray::ServeReplica:coe:gateway"
# One more than a request may take down.
MAIN_REPLICAS = 3
POISON = "this text ends a pool's process"
EXPERTS = frozenset({"general", "math"})


def settings(port: int, redis_port: int, upstream_port: int) -> dict[str, Any]:
    """Two gateways that share a Redis, three replicas of a pool, a swapping one, remote experts."""
    remote = {"url": f"http://127.0.0.1:{upstream_port}/v1", "model": "m"}
    return {
        "server": {
            "port": port,
            "drain_s": 5.0,
            "gateways": 2,
            "breaker": {"min_hang_s": 1.0, "open_duration_s": 1.0, "max_open_duration_s": 4.0},
        },
        "store": {"kind": "redis", "url": f"redis://127.0.0.1:{redis_port}/0", "lease_s": 5.0},
        "tenants": {
            "chaos": {
                "requests_per_min": 1_000_000,
                "tokens_per_min": 1_000_000_000,
                "concurrent": 10_000,
                "budget": {"amount": 1_000_000_000, "period": "day"},
            }
        },
        "keys": {"chaos": {"tenant": "chaos", "key_env": KEY_ENV}},
        "experts": {
            "general": {"model": "m", "categories": ["general"]},
            "math": {"model": "m", "categories": ["math"]},
            "turn-a": {"model": "m"},
            "turn-b": {"model": "m"},
            "other": {"remote": remote, "categories": ["other"]},
        },
        "pools": {
            "main": {
                "engine": "simulated",
                "experts": ["general", "math"],
                "min_replicas": MAIN_REPLICAS,
                "cpus": 0.1,
                "simulated": {"decode_ms": 10, "tokens": 8, "poison": POISON},
            },
            "turns": {
                "engine": "simulated",
                "experts": ["turn-a", "turn-b"],
                "slots": 1,
                "cpus": 0.1,
                "swap": {"min_stay_s": 0.1, "max_wait_s": 2.0},
                "simulated": {"decode_ms": 5, "tokens": 8, "swap_s": 0.02, "fill_s": 0.05},
            },
        },
    }


class Misbehaving:
    """An OpenAI endpoint with a set behaviour: correct, silent, slow, or invalid answers."""

    def __init__(self) -> None:
        self.manner = "well"
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[Misbehaving]:
        """Listen on loopback."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        try:
            yield self
        finally:
            server.close()
            for writer in list(self._open):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
                    body = orjson.loads(await reader.readexactly(length))
                    await self._answer(body, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        from service.engine.simulated_engine import answer_text

        while self.manner == "hangs":  # noqa: ASYNC110  # a flag of the test has no event
            await asyncio.sleep(0.05)
        if self.manner == "garbage":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n\xff\xfe{no>")
            await writer.drain()
            return
        text = body["messages"][0]["content"]
        # As the expert that the gateway will name it.
        words = answer_text("other", text, body.get("max_tokens", 8))
        step_s = 0.15 if self.manner == "slow" else 0.0
        base = {"id": "x", "created": 1, "model": "m"}
        if not body.get("stream"):
            await asyncio.sleep(step_s * len(words))
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(words)}}
            data = orjson.dumps({**base, "object": "chat.completion", "choices": [choice]})
            head = f"content-type: application/json\r\ncontent-length: {len(data)}"
            writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + data)
            await writer.drain()
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for word in words:
            await asyncio.sleep(step_s)
            event = {**base, "choices": [{"index": 0, "delta": {"content": word}}]}
            writer.write(_chunk(b"data: " + orjson.dumps(event) + b"\n\n"))
            await writer.drain()
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Redis:
    """A Redis server of our own, which can be stopped, hung and started again with its data.

    Args:
        port: Its port.
        folder: Where its data is.
        fsync: When it writes to its disk (`appendfsync`).
    """

    def __init__(self, port: int, folder: Path, fsync: str = "everysec") -> None:
        self._port = port
        self._folder = folder
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def there() -> bool:
        """Return whether this machine has a Redis server."""
        return shutil.which("redis-server") is not None

    def start(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self._port), "--bind", "127.0.0.1"),
                *("--dir", str(self._folder), "--appendonly", "yes", "--save", ""),
                *("--appendfsync", self._fsync),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def stop(self) -> None:
        """End it, as its operator would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(10)

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def hang(self) -> None:
        """Stop it where it stands."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """A file system of 256 MiB for the service's own files; None where none can be mounted.

    Its path is short: HAProxy's sockets below it must not have long names.
    """
    for letter in "abcdefgh":
        folder = Path("/tmp", letter)
        try:
            folder.mkdir()
        except OSError:
            continue
        break
    else:
        yield None
        return
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "coe-chaos", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        folder.rmdir()


@dataclass
class Poisoned:
    """The result of a poison request. `pools` are the process ids before it."""

    pools: frozenset[int]
    status: int = 0
    code: str = ""


@dataclass
class Site:
    """The running service, and the means to hurt it."""

    port: int
    pid: int
    key: str
    redis: Redis | None
    upstream: Misbehaving
    disk: Path | None
    config: dict[str, Any]
    stop: Callable[[], None]
    admin_key: str
    filler: Path | None = field(default=None)
    poisoned: list[Poisoned] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Return the service's processes whose titles contain `part`."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if part in (" ".join(process.cmdline()) or process.name()):
                        found.append(process)
        return found

    def kill(self, part: str, *, every: bool = False) -> None:
        """Kill the first process, or all, with SIGKILL. Raises RuntimeError if there is none."""
        found = self.processes(part)
        if not found:
            raise RuntimeError(f"no process {part!r} to kill")
        # HAProxy may have one on its way out beside the one that serves.
        for process in found if every else found[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def poison(self) -> None:
        """Send a request that ends every process that runs it."""
        sent = Poisoned(frozenset(process.pid for process in self.processes(POOL)))
        self.poisoned.append(sent)

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            body = {"model": "general", "messages": [{"role": "user", "content": POISON}]}
            try:
                headers = {"content-type": "application/json"}
                headers["authorization"] = f"Bearer {self.key}"
                connection.request("POST", "/v1/chat/completions", orjson.dumps(body), headers)
                reply = connection.getresponse()
                sent.status = reply.status
                sent.code = str(orjson.loads(reply.read())["error"]["code"])
            except (OSError, http.client.HTTPException, orjson.JSONDecodeError, KeyError):
                pass
            finally:
                connection.close()

        threading.Thread(target=ask, daemon=True).start()

    def count_lost(self) -> None:
        """Note how many pools the last poison request has ended."""
        now = {process.pid for process in self.processes(POOL)}
        self.lost.append(len(self.poisoned[-1].pools - now))

    def fill_disk(self) -> None:
        """Use up what is left of the service's disk."""
        assert self.disk is not None
        self.filler = self.disk / "filler"
        with open(self.filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024 * 1024))
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))

    def free_disk(self) -> None:
        """And free it again."""
        assert self.filler is not None
        self.filler.unlink()

    async def reserved(self) -> float:
        """Return the amount that is still reserved in the tenant's limits after the service's end.

        The method waits until the leases of killed gateways have expired.
        """
        return await reserved(self.config, "chaos") if self.redis is not None else 0.0

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        _, body = fetch(self.port, "/metrics", admin_key=self.admin_key)
        lines = [
            line for line in body.decode().splitlines() if line.startswith((name + " ", name + "{"))
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def reserved(settings: dict[str, Any], tenant: str) -> float:
    """Return what is still reserved in a tenant's limits.

    The function waits for zero until the leases of killed gateways must have expired.
    """
    config = Config.model_validate(settings)
    store = open_store(config, "auditor")
    await store.start()
    try:
        end_s = time.monotonic() + 2 * config.store.lease_s + 5
        while True:
            with contextlib.suppress(StoreUnavailableError):
                limits = await Ledger(config, store).limits(Tenant(tenant))
                left = float(sum(balance.reserved for _, balance in limits.values()))
                if left == 0 or time.monotonic() > end_s:
                    return left
            await asyncio.sleep(0.5)
    finally:
        await store.stop()


@contextmanager
def service(config: Any, folder: Path, key: str, disk: Path | None) -> Iterator[int]:
    """`coe serve` with this config; gives its pid."""
    import sys

    import yaml

    path = folder / "coe.yaml"
    path.write_text(yaml.safe_dump(config))
    port = config["server"]["port"]

    def ready() -> bool:
        status, body = fetch(port, "/ready", admin_key=admin_key_of(folder / "home"))
        if status != 200:
            return False
        states = [item["state"] for item in orjson.loads(body)["experts"].values()]
        return all(item in ("device", "host", "disk") for item in states)

    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(path)]
    env = {KEY_ENV: key, "COE_HOME": str(folder / "home"), "PYTHONPATH": os.getcwd()}
    if disk is not None:
        env["TMPDIR"] = str(disk)
    with running("coe", command, ready, timeout_s=300, env=env) as process:
        yield process.pid


@asynccontextmanager
async def site(port: int) -> AsyncIterator[Site]:
    """Everything, running. Ports: three in a row."""
    key = "coe-" + secrets.token_urlsafe(32)
    with (
        tempfile.TemporaryDirectory(prefix="loadtests-chaos-") as name,
        small_disk() as disk,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        config = settings(port, port + 1, port + 2)
        redis = Redis(port + 1, folder) if Redis.there() else None
        if redis is None:
            config["server"]["gateways"] = 1
            del config["store"]
        else:
            redis.start()
            stack.callback(redis.stop)
        upstream = Misbehaving()
        async with upstream.listening(port + 2):
            # Starting blocks, and the endpoint must answer meanwhile.
            running_service = contextlib.ExitStack()
            context = service(config, folder, key, disk)
            pid = await asyncio.to_thread(running_service.enter_context, context)
            stop = running_service.close
            try:
                admin_key = admin_key_of(folder / "home")
                yield Site(port, pid, key, redis, upstream, disk, config, stop, admin_key)
            finally:
                await asyncio.to_thread(stop)
