"""A gateway's process: the gateway of a config, what it holds, and the one that comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from service.api.accounts import Accounts
from service.api.admission import Admission, Called
from service.api.answering import Answering
from service.api.cache import Cache
from service.api.feedback import Feedback
from service.api.gateway import Gateway
from service.api.guard.guard import Guard
from service.api.guard.screen import Screen
from service.api.keyring import Keyring
from service.api.relay import Relay
from service.api.routing import Routing
from service.api.seats import RemoteSeat
from service.api.spending import Spending
from service.api.trips import Trips
from service.app.stores import key_book, keys_marker, open_store, open_volatile
from service.app.watched import node_target, traces_of
from service.broker.ledger import Ledger
from service.config import Config
from service.engine.remote import RemoteEngine
from service.errors import CoeError
from service.link.directory import Directory
from service.store.keys import Keys
from service.store.protocol import Store
from service.store.volatile import VolatileStore
from service.telemetry import table
from service.types import NOBODY, Tenant

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
        # The one that this one came after, until that has ended.
        self._before: GatewayProcess | None = None
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
        # What may be lost stands apart from what counts.
        self.volatile: VolatileStore = open_volatile(config) if after is None else after.volatile
        book = key_book(config, self.store)
        self._keyring: Keyring = Keyring(
            config,
            book,
            secret=secret,
            marker=keys_marker(config),
            after=None if after is None else after._keyring,
        )
        self.ledger = Ledger(config, self.store)
        self._spending = Spending(self.ledger)
        routing = Routing(config)
        self._relay = Relay(
            routing.book, routing.market, self.directory, self._seats, wake, self._spending, trips
        )
        self._feedback: Feedback = Feedback(
            config.feedback,
            self.store,
            self.volatile,
            routing.worth,
            routing.book,
            shared=(config.store.cache_url or config.store.cache_url_env) is not None,
            tenants=[NOBODY.name, *config.tenants],
            after=None if after is None else after._feedback,
        )
        self._admission = Admission(
            config, self._keyring, self.ledger, self._relay.context, self._charged
        )
        self._traces = traces_of(config, "gateway", gateway_id)
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
            cache=Cache(config, self.volatile),
        )
        metrics, labels = self.gateway.metrics, {"gateway": gateway_id}
        metrics.meter.on_read(self._read)
        trips.meter = metrics.meter
        metrics.meter.on_read(trips.read)
        metrics.on_ask(self._ask_budgets)
        self._node = node_target(
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
        if self._node is not None:
            await self._node.stop()
        await heir.start()
        self._succeeded = True
        heir._before = self
        heir._ending = asyncio.create_task(heir._let_end(self))
        return heir

    async def _let_end(self, before: GatewayProcess) -> None:
        """Stop the one that this one came after, once its last request has ended, and those
        before it have."""
        while before.gateway.metrics.in_flight or before._before is not None:  # noqa: ASYNC110
            await asyncio.sleep(_ENDED_S)  # a gauge has no event
        await before.stop()
        self._before = None

    async def stop(self) -> None:
        """Close every connection, and those of who has not ended yet of those before."""
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        if self._before is not None:
            await self._before.stop()
            self._before = None
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
            await self.volatile.close()
        await asyncio.gather(*(seat.engine.stop() for seat in self._seats.values()))
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
