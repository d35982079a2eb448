"""The composition root: builds gateways and pools from a config. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.api.accounts import Accounts
from service.api.admission import Admission, Called
from service.api.answering import Answering
from service.api.cache import Cache
from service.api.feedback import Feedback
from service.api.gateway import Gateway
from service.api.guard.guard import Guard
from service.api.guard.screen import Screen
from service.api.keyring import Keyring, any_key
from service.api.relay import Relay
from service.api.routing import Routing
from service.api.seats import RemoteSeat
from service.api.spending import Spending
from service.api.trips import Trips
from service.assembly import Assembly, folder_here
from service.broker.ledger import Ledger
from service.config import Config
from service.engine.remote import RemoteEngine
from service.errors import CoeError, ConfigError
from service.link.call import Call
from service.link.directory import Directory
from service.link.secret import keys_path
from service.link.server import PoolApp
from service.models import inspect_model
from service.pool.pool import Pool
from service.steered import profile_bytes
from service.store.keys import FileBook, KeyBook, Keys, StoreBook
from service.store.memory import MemoryStore
from service.store.protocol import Store
from service.telemetry import table
from service.telemetry.logs import log_fields
from service.telemetry.node import NodeTarget
from service.telemetry.pool_metrics import PoolMetrics
from service.types import Tenant

if TYPE_CHECKING:
    from service.telemetry.traces import Traces

log = logging.getLogger("coe.app")

# How often a gateway that was succeeded looks whether its last request has ended.
_ENDED_S = 0.5


class GatewayProcess:
    """A gateway with what it holds: links to pools, clients of remote experts.

    `node`: folder where the node's processes find each other's metrics (`node_folder`).
    `screens` take the places of the guard's own, by name. `after`: the gateway by another
    config that this one comes after, see `succeed`.
    """

    def __init__(
        self,
        config: Config,
        gateway_id: str,
        secret: str,
        *,
        admin_key: str | None,
        wake: Callable[[str], None],
        behind_serve: bool,
        node: Path | None = None,
        screens: Mapping[str, Screen] | None = None,
        after: GatewayProcess | None = None,
    ) -> None:
        self._again: Callable[..., GatewayProcess] = partial(
            GatewayProcess,
            gateway_id=gateway_id,
            secret=secret,
            admin_key=admin_key,
            wake=wake,
            behind_serve=behind_serve,
            node=node,
            screens=screens,
        )
        self._follows = after is not None
        self._succeeded = False
        self._ending: asyncio.Task[None] | None = None
        # Links to pools, and what tenants have used, outlive a config.
        self.directory: Directory = (
            Directory(gateway_id, secret) if after is None else after.directory
        )
        self._seats = {
            name: RemoteSeat(
                RemoteEngine(name, expert.remote),
                expert.remote.max_in_flight,
                expert.remote.max_queue,
            )
            for name, expert in config.experts.items()
            if expert.remote is not None
        }
        trips = Trips(
            config.server.breaker,
            {
                name: expert.remote.url
                for name, expert in config.experts.items()
                if expert.remote is not None
            },
        )
        self.store: Store = open_store(config, gateway_id) if after is None else after.store
        book = key_book(config, self.store)
        self._keyring = Keyring(config, book)
        self.ledger = Ledger(config, self.store)
        self._spending = Spending(self.ledger, any_budgets=_any_budgets(config))
        routing = Routing(config)
        self._relay = Relay(
            routing.book, routing.market, self.directory, self._seats, wake, self._spending, trips
        )
        self._feedback = Feedback(
            config.feedback,
            self.store,
            routing.worth,
            routing.book,
            shared=config.store.kind != "memory",
        )
        self._admission = Admission(
            config, self._keyring, self.ledger, self._relay.context, self._charged
        )
        self._traces = _traces(config, "gateway", gateway_id)
        self.gateway = Gateway(
            config,
            routing.router,
            self._relay,
            self._admission,
            Accounts(config, self._admission, Keys(book)),
            Answering(self._relay, routing.worth, self._feedback),
            self.directory,
            lambda: {name: seat.failed for name, seat in self._seats.items()},
            self._neighbours,
            admin_key=admin_key,
            traces=self._traces,
            behind_serve=behind_serve,
            guard=Guard(config, screens),
            cache=Cache(config, self.store),
        )
        metrics, labels = self.gateway.metrics, {"gateway": gateway_id}
        metrics.meter.on_read(self._read)
        trips.meter = metrics.meter
        metrics.meter.on_read(trips.read)
        metrics.on_ask(self._ask_budgets)
        self._node = _node_target(
            config, node, f"gateway-{gateway_id}", lambda: metrics.text(labels)
        )

    async def _neighbours(self) -> list[str]:
        """The metrics of the node's other gateways."""
        return await self._node.others("gateway-") if self._node is not None else []

    def _charged(self, tenant: Tenant, outcome: str, calls: Sequence[Called]) -> None:
        """A request that somebody is charged for has ended."""
        add = self.gateway.metrics.meter.add
        add(table.TENANT_REQUESTS, 1, tenant.name, outcome)
        for call in calls:
            add(table.TENANT_TOKENS, call.prompt_tokens + call.completion_tokens, tenant.name)

    def _read(self) -> None:
        """The queues of remote experts, the budgets and the state of the store, for the metrics."""
        put = self.gateway.metrics.meter.put
        told = self.store.health()
        put(table.STORE_UP, told.up)
        put(table.STORE_OWED, told.owed)
        self.gateway.metrics.meter.total(table.STORE_OUTAGES, told.outages)
        self.gateway.metrics.meter.total(table.STORE_SLICE_GRANTS, told.slice_grants)
        for name, seat in self._seats.items():
            put(table.QUEUED, seat.waiting, name)
            put(table.RUNNING, seat.running, name)
        for name, price, _ in self._spending.prices():
            put(table.SHADOW_PRICE, price, name)

    async def _ask_budgets(self) -> None:
        """What is left of every budget, for the metrics; nothing while the store is gone."""
        with contextlib.suppress(CoeError):
            for name, state in (await self.ledger.state()).items():
                left = max(0.0, 1 - state.spent / state.amount)
                self.gateway.metrics.meter.put(table.BUDGET_LEFT, left, name)

    async def start(self) -> None:
        """Connect remote experts; one that can't be is shown as failed."""
        if not self._follows:
            await self.store.start()
        await self._keyring.start()
        await self._spending.start()
        await self._feedback.start()
        if self._node is not None:
            await self._node.start()
        for name, seat in self._seats.items():
            try:
                await seat.engine.start()
            except CoeError as error:
                seat.failed = error.message
                log.error("expert %s failed: %s", name, error.message)

    async def succeed(self, config: Config) -> GatewayProcess:
        """A gateway by another config in this one's place; requests under way end in this one."""
        heir = self._again(config, after=self)
        heir.gateway.reload = self.gateway.reload
        self._succeeded = True
        if self._node is not None:
            await self._node.stop()
        await heir.start()
        heir._ending = asyncio.create_task(self._end())
        return heir

    async def _end(self) -> None:
        while self.gateway.metrics.in_flight:  # noqa: ASYNC110  # a gauge has no event
            await asyncio.sleep(_ENDED_S)
        await self.stop()

    async def stop(self) -> None:
        """Close every connection."""
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        await self.gateway.feed.close()
        if self._node is not None and not self._succeeded:
            await self._node.stop()
        await self._relay.close()
        await self._feedback.stop()
        await self._spending.stop()
        await self._admission.stop()
        await self._keyring.stop()
        if not self._succeeded:
            await self.directory.close()
            await self.store.stop()
        await asyncio.gather(*(seat.engine.stop() for seat in self._seats.values()))
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)


def open_store(config: Config, owner: str) -> Store:
    """The store of a config. `owner`: whose reservations they are. Raises ConfigError."""
    given = config.store
    if given.kind == "memory":
        return MemoryStore()
    # Imported here: only who uses Redis needs its client.
    from service.store.redis import RedisClient
    from service.store.shared import SharedStore

    url = given.url
    if given.url_env is not None:
        url = os.environ.get(given.url_env)
        if not url:
            raise ConfigError(
                f"store.url_env: the environment variable {given.url_env} that should hold "
                "the store's URL is not set"
            )
    assert url is not None
    client = RedisClient(
        url,
        owner,
        prefix=given.prefix,
        timeout_s=given.timeout_ms / 1000,
        lease_s=given.lease_s,
    )
    return SharedStore(client, share=given.slice, lease_s=given.lease_s)


def key_book(config: Config, store: Store) -> KeyBook:
    """Where API keys made by people are kept."""
    if config.store.kind == "memory":
        given = config.store.keys_file
        return FileBook(Path(given) if given is not None else keys_path())
    return StoreBook(store)


async def has_keys(config: Config) -> bool:
    """Whether there is or was an API key. Raises ConfigError, StoreGone."""
    store = open_store(config, "starting")
    await store.start()
    try:
        return await any_key(config, key_book(config, store))
    finally:
        await store.stop()


async def with_keys(config: Config, act: Callable[[Keys], Awaitable[Any]]) -> Any:
    """Do something with the keys where they are kept, no service running. Raises StoreGone."""
    store = open_store(config, f"keys-{os.getpid()}")
    await store.start()
    try:
        return await act(Keys(key_book(config, store)))
    finally:
        await store.stop()


def _any_budgets(config: Config) -> bool:
    return bool(config.budgets) or any(tenant.budget for tenant in config.tenants.values())


class PoolProcess:
    """A pool with its engines, its application and its metrics."""

    def __init__(self, config: Config, kind: str, secret: str, *, node: Path | None = None) -> None:
        self._metrics = PoolMetrics(config.pools[kind].vllm.moe_capture)
        self.routes = self._metrics.routes_of
        self._assembly = Assembly(config, kind, Pool(kind, self._metrics), self._metrics)
        self.pool = self._assembly.pool
        self._traces = _traces(config, "pool", f"{kind}-{self.pool.boot}")
        if self._traces is not None:
            self._metrics.traced = self._traces.pooled
        self._metrics.follow(self.pool)
        self._config = config
        self._weights: dict[str, int] = {}
        self.app = PoolApp(self, secret, config.server.max_body_bytes)
        self._node = _node_target(config, node, f"pool-{kind}-{self.pool.boot}", self.metrics)

    async def start(self) -> None:
        """Start the engines, in the background."""
        if self._node is not None:
            await self._node.start()
        self.pool.start()

    async def stop(self, drain_s: float) -> None:
        """Drain, at most so long, and stop the engines."""
        await self.pool.stop(drain_s)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        if self._node is not None:
            await self._node.stop()

    async def reload(self, config: Config) -> None:
        """Go on as another config says."""
        self._config = config
        self._weights.clear()
        await self._assembly.reload(config)

    async def run(self, call: Call, body: bytes, send: Any) -> None:
        """See `PoolHandler`."""
        log_fields(request_id=call.request_id, expert=call.expert)
        await self.pool.run(call, body, send)

    def snapshots(self) -> Any:
        """See `PoolHandler`."""
        return self.pool.snapshots()

    def experts(self) -> dict[str, Any]:
        """See `PoolHandler`."""
        told = self.pool.details()
        for name, entry in told.items():
            if (weight_bytes := self._weight_bytes(name)) is not None:
                entry["weight_bytes"] = weight_bytes
        return told

    def _weight_bytes(self, expert: str) -> int | None:
        """What an expert's files hold, from their headers; None where they are not here."""
        if expert in self._weights:
            return self._weights[expert]
        settings = self._config.experts[expert]
        if settings.profile is not None:
            return profile_bytes(self._config, expert)
        beside = settings.base is not None and settings.form == "adapter"
        try:
            folder = settings.adapter if beside else folder_here(self._config, expert)
            if folder is None:
                return None
            self._weights[expert] = inspect_model(Path(folder)).weight_bytes
        except CoeError:
            return None
        return self._weights[expert]

    def demand(self, wanted: dict[str, float]) -> None:
        """See `PoolHandler`."""
        self.pool.demand(wanted)

    async def operate(self, act: str, expert: str) -> None:
        """See `PoolHandler`."""
        await self.pool.operate(act, expert)

    async def metrics(self) -> str:
        """See `PoolHandler`."""
        return await self._metrics.text({"pool": f"{self.pool.kind}-{self.pool.boot}"})


def _traces(config: Config, process: str, instance: str) -> Traces | None:
    if config.telemetry.traces_url is None:
        return None
    # Imported here: most do without, and it takes its time.
    from service.telemetry.traces import Traces

    return Traces(config.telemetry, process, instance)


def _node_target(
    config: Config, folder: Path | None, name: str, text: Callable[[], Awaitable[str]]
) -> NodeTarget | None:
    if folder is None:
        return None
    told = config.telemetry
    return NodeTarget(folder, name, text, host=told.metrics_host, port=told.metrics_port)
