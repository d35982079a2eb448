"""A gateway's process: what it holds as long as it runs, and the gateway of the config in force."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from service.broker.ledger import Ledger
from service.config import Config
from service.engine.remote import RemoteEngine
from service.errors import CoeError
from service.gateway.budget_prices import BudgetPrices
from service.gateway.configured_gateway import ConfiguredGateway, GatewayResources
from service.gateway.dependencies import Reload
from service.gateway.dispatch.remote_pool import RemotePool
from service.gateway.guard.screen import Screen
from service.gateway.state import GatewayState, replaced
from service.gateway.store_setup import open_store, open_volatile
from service.models.expert_folders import file_versions
from service.moe.profiles import profile_digests
from service.rpc.pool_directory import PoolDirectory
from service.store.protocol import Store
from service.store.volatile import VolatileStore
from service.telemetry import metrics
from service.telemetry.setup import node_target, traces_of

log = logging.getLogger("coe.app")


class GatewayRuntime:
    """A gateway with what it holds: links to pools, stores, clients of remote experts.

    It is an ASGI application that goes over to another config by `reload`: new requests are
    answered by the new config, those under way end by the one that they began with.

    Args:
        config: In force at first.
        gateway_id: Unique among gateways, and new whenever the process is.
        secret: The cluster's.
        admin_key: Without one there are no admin endpoints.
        wake: Asks for a pool that holds an expert where none runs.
        behind_serve: See `Gateway`.
        node: Folder where the node's processes find each other's metrics (`node_folder`).
        screens: Take the places of the guard's own, by name.
        reload: Puts the config's file in force anew, where somebody here keeps it.
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
        reload: Reload | None = None,
    ) -> None:
        self._files = _files(config)
        self.state = GatewayState.new(config.server.breaker)
        self.directory = PoolDirectory(gateway_id, secret)
        self.store: Store = open_store(config, gateway_id)
        # What may be lost stands apart from what counts.
        self.volatile: VolatileStore = open_volatile(config)
        traces = traces_of(config, "gateway", gateway_id)
        self.remote_pools: dict[str, RemotePool] = {}
        self._seat_all(config)
        ledger = Ledger(config, self.store)
        self.budget_prices = BudgetPrices(ledger)
        self._resources = GatewayResources(
            state=self.state,
            directory=self.directory,
            store=self.store,
            volatile=self.volatile,
            budget_prices=self.budget_prices,
            remote_pools=self.remote_pools,
            traces=traces,
            secret=secret,
            admin_key=admin_key,
            wake=wake,
            neighbours=self._neighbours,
            behind_serve=behind_serve,
            reload=reload,
            screens=screens,
        )
        self.current = ConfiguredGateway(config, self._resources, ledger)
        self._app = self.current.app
        # Those of earlier configs whose last requests have not ended yet.
        self._ending: set[asyncio.Task[None]] = set()
        self._earlier: set[ConfiguredGateway] = set()
        self._node = node_target(
            config,
            node,
            f"gateway-{gateway_id}",
            lambda: self.state.metrics.text({"gateway": gateway_id}),
        )
        self.state.metrics.meter.on_read(self._read)
        self.state.metrics.on_ask(self._ask_budgets)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    @property
    def ledger(self) -> Ledger:
        """Counts by the config in force."""
        return self.current.ledger

    async def start(self) -> None:
        """Connect remote experts; one that can't be is shown as failed.

        Raises StoreUnavailableError.
        """
        await self.store.start()
        await self.current.start()
        await self.budget_prices.start()
        if self._node is not None:
            await self._node.start()
        for name, remote_pool in self.remote_pools.items():
            await self._connect(name, remote_pool)

    async def _connect(self, name: str, pool: RemotePool) -> None:
        await pool.start()
        if pool.failed is not None:
            log.error("expert %s failed: %s", name, pool.failed)

    async def reload(self, config: Config) -> None:
        """Go on as another config says. Returns at once: requests under way end in their own time.

        Raises ConfigError, ArtifactError, StoreUnavailableError, and then all goes on as it was.
        """
        before = self.current
        files = await asyncio.to_thread(_files, config)
        ledger = Ledger(config, self.store)
        after = ConfiguredGateway(config, self._resources, ledger, before)
        try:
            await after.start()
        except BaseException:
            await after.stop()
            raise
        await self._go_over_seats(before.config, config)
        await self.budget_prices.follow(ledger)
        self.state.forget(replaced(before.config, config, self._files, files))
        self._files = files
        self.current, self._app = after, after.app
        self._earlier.add(before)
        task = asyncio.create_task(self._retire_after_drain(before))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _retire_after_drain(self, earlier: ConfiguredGateway) -> None:
        """Stop a gateway of an earlier config after its last request, and what only it needed."""
        await earlier.drain()
        self._earlier.discard(earlier)
        needed = {*self._remote(self.current.config)}
        needed.update(*(self._remote(one.config) for one in self._earlier))
        for name in [name for name in self.remote_pools if name not in needed]:
            await self.remote_pools.pop(name).stop()

    # --- remote experts

    @staticmethod
    def _remote(config: Config) -> list[str]:
        return [name for name, expert in config.experts.items() if expert.remote is not None]

    def _seat_all(self, config: Config) -> list[str]:
        """Give every remote expert a seat: those that had none."""
        new = [name for name in self._remote(config) if name not in self.remote_pools]
        for name in new:
            remote = config.experts[name].remote
            assert remote is not None
            engine = RemoteEngine(name, remote)
            self.remote_pools[name] = RemotePool(
                engine, remote.max_in_flight, remote.max_queued_requests
            )
        self.state.metrics.remote |= frozenset(new)
        return new

    async def _go_over_seats(self, old: Config, config: Config) -> None:
        new = self._seat_all(config)
        for name in self._remote(config):
            pool, remote = self.remote_pools[name], config.experts[name].remote
            assert remote is not None
            if name in new:
                await self._connect(name, pool)
                continue
            before = old.experts[name].remote if name in old.experts else None
            if before != remote or pool.failed is not None:
                engine = RemoteEngine(name, remote)
                await pool.replace(engine, remote.max_in_flight, remote.max_queued_requests)
                if pool.failed is not None:
                    log.error("expert %s failed: %s", name, pool.failed)

    # --- metrics

    async def _neighbours(self) -> list[str]:
        """The metrics of the node's other gateways."""
        return await self._node.others("gateway-") if self._node is not None else []

    def _read(self) -> None:
        """What others know, for the metrics: pools, remote queues, breakers, budgets, the store."""
        meter = self.state.metrics.meter
        meter.put(metrics.POOLS, len(self.directory.links()))
        meter.forget(metrics.SNAPSHOT_AGE)
        for boot, age_s in self.directory.silences().items():
            meter.put(metrics.SNAPSHOT_AGE, age_s, boot)
        told = self.store.health()
        meter.put(metrics.STORE_UP, told.up)
        meter.put(metrics.STORE_PENDING_SETTLEMENTS, told.pending_settlements)
        meter.total(metrics.STORE_OUTAGES, told.outages)
        meter.total(metrics.STORE_OFFLINE_ADMISSIONS, told.offline_grants)
        meter.forget(metrics.REQUESTS_WAITING, self.remote_pools)
        meter.forget(metrics.REQUESTS_RUNNING, self.remote_pools)
        for name, remote_pool in self.remote_pools.items():
            meter.put(metrics.REQUESTS_WAITING, remote_pool.waiting, name)
            meter.put(metrics.REQUESTS_RUNNING, remote_pool.running, name)
        prices = {name: price for name, price, _ in self.budget_prices.prices()}
        meter.forget(metrics.SHADOW_PRICE, prices)
        for name, price in prices.items():
            meter.put(metrics.SHADOW_PRICE, price, name)
        self.current.breakers.read()

    async def _ask_budgets(self) -> None:
        """What is left of every budget, for the metrics; nothing while the store is gone."""
        meter = self.state.metrics.meter
        with contextlib.suppress(CoeError):
            states = await self.ledger.state()
            meter.forget(metrics.BUDGET_REMAINING, states)
            for name, state in states.items():
                left = max(0.0, 1 - state.spent / state.amount)
                meter.put(metrics.BUDGET_REMAINING, left, name)

    async def stop(self) -> None:
        """Close every connection, and end what is left of earlier configs."""
        for task in list(self._ending):
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self._node is not None:
            await self._node.stop()
        for one in (*self._earlier, self.current):
            await one.stop()
        await self.budget_prices.stop()
        await self.directory.close()
        await self.store.stop()
        await self.volatile.close()
        await asyncio.gather(*(pool.stop() for pool in self.remote_pools.values()))
        if (traces := self._resources.traces) is not None:
            await asyncio.to_thread(traces.stop)


def _files(config: Config) -> dict[str, str]:
    """What files hold, as far as they are here: versions of weights, digests of profiles."""
    local = [name for name, expert in config.experts.items() if expert.remote is None]
    return {**file_versions(config, local), **profile_digests(config)}
