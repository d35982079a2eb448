"""Gateways and pools in this process, over real HTTP and without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import aiohttp
import uvicorn

from service.config import Config, SimulatedOptions
from service.deployment.coalescing_protocol import CoalescingProtocol
from service.engine.engine_interface import EngineObserver, EngineRequest, Send
from service.engine.simulated_engine import SimulatedEngine
from service.gateway.dependencies import Reload
from service.gateway.gateway_reload import GatewayRuntime
from service.pool import engine_factory
from service.pool.pool_process import PoolProcess
from service.rpc.pool_link import PoolAddress
from service.rpc.snapshot import Snapshot
from tests.support.polling import until

SECRET = "the-cluster-s-secret"
ADMIN_KEY = "admin-key-of-the-tests"
CHAT = "/v1/chat/completions"
# In which requests may end when a server does; then they are cancelled.
_GRACE_S = 1.0


class _Server(uvicorn.Server):
    """A uvicorn server with events for its start and end, which installs no signal handlers.

    uvicorn looks for the end ten times a second, and then waits for as long twice: too long where
    a test starts and ends three servers.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self._end = asyncio.Event()

    def end(self) -> None:
        """Let the server end."""
        self.should_exit = True
        self._end.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        seconds = 0
        while not await self.on_tick(10 * seconds):
            seconds += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        await asyncio.sleep(0)
        end_s = asyncio.get_running_loop().time() + _GRACE_S
        while state.connections or state.tasks:
            if asyncio.get_running_loop().time() > end_s:
                for task in state.tasks:
                    task.cancel()
                break
            await asyncio.sleep(0.002)
        for server in self.servers:
            await server.wait_closed()


@dataclass(frozen=True)
class RunningServer:
    """A running server."""

    url: str
    server: uvicorn.Server

    def cut(self) -> None:
        """Abort every connection, as a killed process would."""
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()


@asynccontextmanager
async def serving(application: Any, http: Any = CoalescingProtocol) -> AsyncIterator[RunningServer]:
    """Serve an ASGI application on a free port of loopback, by one of uvicorn's protocols."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        application,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    served = RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    try:
        await server.up.wait()
        yield served
    finally:
        served.cut()  # the server would wait for them
        server.end()
        await task


class RecordingEngine(SimulatedEngine):
    """A simulated engine that records its requests and counts those that run."""

    def __init__(
        self,
        experts: tuple[str, ...],
        options: SimulatedOptions,
        observer: EngineObserver | None = None,
        bases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(experts, options, observer, bases)
        self.asked: list[EngineRequest] = []
        self.now = 0

    async def run(self, request: EngineRequest, send: Send) -> None:
        self.asked.append(request)
        self.now += 1
        try:
            await super().run(request, send)
        finally:
            self.now -= 1


@dataclass
class RunningPool:
    """A pool, its server, and all engines that it has started."""

    process: PoolProcess
    served: RunningServer
    engines: list[RecordingEngine]

    @property
    def url(self) -> str:
        return self.served.url

    @property
    def address(self) -> PoolAddress:
        pool = self.process.pool
        return PoolAddress(self.url, pool.kind, pool.boot)

    @property
    def engine(self) -> RecordingEngine:
        """The engine that was started last."""
        return self.engines[-1]

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self.process.pool.snapshot().queues.values())


@dataclass
class RunningGateway:
    """A gateway, its pools, and an HTTP client."""

    gateway: GatewayRuntime
    url: str
    client: aiohttp.ClientSession
    pools: dict[str, RunningPool]
    woken: list[str] = field(default_factory=list)

    def post(self, body: Any, path: str = CHAT, **more: Any) -> Any:
        """Return a POST of JSON as an async context manager."""
        return self.client.post(self.url + path, json=body, **more)

    def get(self, path: str, **more: Any) -> Any:
        return self.client.get(self.url + path, **more)

    async def ask(
        self, body: Any, path: str = CHAT, **more: Any
    ) -> tuple[int, Mapping[str, str], Any]:
        """POST JSON and return status, headers and JSON of the response."""
        async with self.post(body, path, **more) as reply:
            return reply.status, reply.headers, await reply.json()

    def idle(self) -> bool:
        """Return whether no request runs or waits in any pool or engine."""
        return all(
            pool.process.pool.queued() == 0 and all(e.now == 0 for e in pool.engines)
            for pool in self.pools.values()
        )


@asynccontextmanager
async def run_pool(config: Config, kind: str) -> AsyncIterator[RunningPool]:
    """Run one pool with its server, and drain and stop it at the end."""
    process = PoolProcess(config, kind, SECRET)
    engines: list[RecordingEngine] = []

    def build(
        experts: tuple[str, ...],
        options: SimulatedOptions,
        observer: EngineObserver | None = None,
        bases: Mapping[str, str] | None = None,
    ) -> RecordingEngine:
        engines.append(RecordingEngine(experts, options, observer, bases))
        return engines[-1]

    # Each slot asks for its engine whenever it needs one: the name stays patched
    # for the pool's own slots only.
    for slot in process.pool.slots:
        slot._build_engine = _patched(  # type: ignore[method-assign]
            slot._build_engine, build
        )
    async with serving(process.app) as served:
        await process.start()
        try:
            yield RunningPool(process, served, engines)
        finally:
            await process.stop(0)


def _patched(real: Callable[[], Any], build: Any) -> Callable[[], Any]:
    def make() -> Any:
        with patch.object(engine_factory, "SimulatedEngine", build):
            return real()

    return make


@asynccontextmanager
async def run_gateway(
    config: Config, reload: Reload | None = None
) -> AsyncIterator[RunningGateway]:
    """Run a gateway and one pool of each kind; at the end nothing may run or wait."""
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        pools = {
            kind: await stack.enter_async_context(run_pool(config, kind)) for kind in config.pools
        }
        woken: list[str] = []

        async def count_replicas() -> dict[str, dict[str, int]]:
            return {f"pool-{kind}": {"starting": 0, "running": 1, "stopping": 0} for kind in pools}

        gateway = GatewayRuntime(
            config,
            "gateway",
            SECRET,
            admin_key=ADMIN_KEY,
            wake=woken.append,
            behind_serve=False,
            reload=reload,
            count_replicas=count_replicas,
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        gateway.directory.update([pool.address for pool in pools.values()])
        served = await stack.enter_async_context(serving(gateway))
        client = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        )
        made = RunningGateway(gateway, served.url, client, pools, woken)
        await until(lambda: _settled(made), "every expert loaded or failed, and the gateway knows")
        yield made
        await until(made.idle, "every request ended, in pools and engines")
        metrics = gateway.state.metrics
        await until(lambda: metrics.in_flight == 0, "the gateway counts none in flight")
    await until(lambda: not asyncio.all_tasks() - before, "no task is left")


def _settled(made: RunningGateway) -> bool:
    links = made.gateway.directory.links()
    known = [link.snapshot for link in links if link.snapshot is not None]
    return len(known) == len(made.pools) and all(map(_up, known))


def _up(snapshot: Snapshot) -> bool:
    """Return whether each expert is ready or failed, or rests, or shares a slot with a ready one.

    On a slow machine an expert with a short `idle_unload_s` rests before the gateway sees it ready.
    """
    states = snapshot.experts.values()
    answering = {state.slot for state in states if state.state == "device"}
    return all(
        state.state in ("device", "failed")
        or state.released
        or (state.state in ("host", "disk") and state.slot in answering)
        for state in states
    )


def simulated(
    pools: dict[str, dict[str, Any]],
    *,
    experts: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    kinds: dict[str, dict[str, Any]] | None = None,
    router: dict[str, Any] | None = None,
    **sections: Any,
) -> Config:
    """Build a config of simulated pools.

    Args:
        pools: Options of the simulated engine, by pool.
        kinds: Further settings of a pool, by pool.
        experts: The experts; by default one, `general`.
        server: The `server` section.
        router: The `router` section; without `artifact` there is no classifier.
        sections: Further sections of the config.
    """
    given = experts or {"general": {"model": "m"}}
    return Config.model_validate(
        {
            "server": server or {},
            "router": {"artifact": "none", **(router or {})},
            "experts": given,
            "pools": {
                kind: {"engine": "simulated", "simulated": options, **(kinds or {}).get(kind, {})}
                for kind, options in pools.items()
            },
            **sections,
        }
    )


def chat(text: str = "hello there", **more: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": "general", "messages": [{"role": "user", "content": text}], **more}


def events(data: bytes) -> list[str]:
    """Return the payloads of a stream of server-sent events."""
    return [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
