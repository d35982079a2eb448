"""Gateway runtime: builds the gateway from a config, and replaces it when the config changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from service.broker.limit_and_budget_ledger import Ledger
from service.config import Config
from service.encoder.shared_encoders import SharedEncoders
from service.engine.remote_engine import RemoteEngine
from service.errors import CoeError
from service.gateway.added_experts import AddedExpertService, effective_config
from service.gateway.batch_setup import GatewayBatches
from service.gateway.budget_prices import BudgetPrices
from service.gateway.configured_gateway import ConfiguredGateway, GatewayResources
from service.gateway.dependencies import Reload
from service.gateway.dispatch.remote_pool import RemotePool
from service.gateway.guard.screen_interface import Screen
from service.gateway.response_setup import GatewayResponses
from service.gateway.state_across_reloads import GatewayState, replaced
from service.gateway.store_setup import expert_book, open_store, open_volatile
from service.models.expert_folders import file_versions
from service.moe.virtual_expert_profiles import profile_digests
from service.rpc.pool_directory import PoolDirectory
from service.store.store_interface import Store
from service.store.volatile_store import VolatileStore
from service.telemetry import metric_declarations
from service.telemetry.telemetry_setup import node_target, traces_of

log = logging.getLogger("coe.app")

CountReplicas = Callable[[], Awaitable[Mapping[str, Mapping[str, int]]]]
"""Counts replicas by deployment and state: starting, running, stopping."""

_COUNT_S = 2.0


class GatewayRuntime:
    """The gateway of one process: links to pools, stores, and clients of remote experts.

    It is an ASGI application. `reload` replaces the config. New requests then use the new config,
    and requests in flight end with their earlier config.

    Args:
        config: The first config.
        gateway_id: The gateway's id, which is new for each process.
        secret: The cluster's secret.
        admin_key: The admin key; None disables the admin endpoints.
        wake: Requests the start of a pool for an expert that no running pool holds.
        behind_serve: Whether Ray Serve's HTTP server is around the gateway, see `build_app`.
        node: Folder where the node's processes find each other's metrics (`node_folder`).
        screens: Screens that replace the guard's built-in screens, by name.
        reload: Reads the config's file again and applies it; None if another process does this.
        count_replicas: Counts the replicas of scaled deployments, by deployment and state; None
            where their number never changes.
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
        count_replicas: CountReplicas | None = None,
    ) -> None:
        self._files = _files(config)
        # The config of the file. The gateway serves it with the experts that an admin has added.
        self._given = config
        self._turn = asyncio.Lock()
        self.state = GatewayState.new(config.server.breaker)
        self.directory = PoolDirectory(gateway_id, secret)
        self.store: Store = open_store(config, gateway_id)
        # A second store holds the values that may be lost.
        self.volatile: VolatileStore = open_volatile(config)
        traces = traces_of(config, "gateway", gateway_id)
        self.remote_pools: dict[str, RemotePool] = {}
        self._add_remote_pools(config)
        ledger = Ledger(config, self.store)
        self.budget_prices = BudgetPrices(ledger, self.store)
        self.batches: GatewayBatches | None = None
        if config.batches.enabled:
            self.batches = GatewayBatches(
                config,
                gateway_id,
                self.store,
                lambda: self.current,
                self.state.metrics.registry,
            )
        self.responses: GatewayResponses | None = None
        if config.responses.enabled:
            self.responses = GatewayResponses(config, self.state.metrics.registry)
        self.added = AddedExpertService(
            expert_book(config, self.store),
            self.directory,
            lambda: self._given,
            self._serve_added,
            wake,
            shared=config.store.kind != "memory",
        )
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
            added=self.added,
            reload=reload,
            screens=screens,
            encoders=SharedEncoders(),
            batches=None if self.batches is None else self.batches.service,
            responses=None if self.responses is None else self.responses.service,
            conversations=None if self.responses is None else self.responses.conversations,
        )
        self.current = ConfiguredGateway(config, self._resources, ledger)
        self._app = self.current.app
        # Gateways of earlier configs that still drain.
        self._retiring: set[asyncio.Task[None]] = set()
        self._earlier: set[ConfiguredGateway] = set()
        self._node = node_target(
            config,
            node,
            f"gateway-{gateway_id}",
            lambda: self.state.metrics.text({"gateway": gateway_id}),
        )
        self.state.metrics.registry.on_read(self._update_metrics)
        self.state.metrics.on_read(self._update_budget_metrics)
        self._count_replicas = count_replicas
        self.state.metrics.on_read(self._update_replicas)
        if self.batches is not None:
            self.state.metrics.on_read(self.batches.update_metrics)
        if self.responses is not None:
            self.state.metrics.on_read(self.responses.update_metrics)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    @property
    def ledger(self) -> Ledger:
        """The ledger of the current config."""
        return self.current.ledger

    async def start(self) -> None:
        """Connect to stores and remote experts. An expert that can't be reached is marked failed.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """
        await self.store.start()
        await self.current.start()
        await self.budget_prices.start()
        if self._node is not None:
            await self._node.start()
        for name, remote_pool in self.remote_pools.items():
            await self._connect(name, remote_pool)
        if self.responses is not None:
            await self.responses.start()
        if self.batches is not None:
            await self.batches.start()
        await self.added.start()

    async def _connect(self, name: str, pool: RemotePool) -> None:
        await pool.start()
        if pool.failed is not None:
            log.error("expert %s failed: %s", name, pool.failed)

    async def reload(self, config: Config) -> None:
        """Replace the config of the file, without waiting for requests in flight.

        The experts that an admin has added stay, as far as they fit into it. If this raises an
        error, the old config stays in use.

        Raises:
            ConfigError: The config can't be served.
            ArtifactError: The router's artifact can't be used.
            StoreUnavailableError: The store can't be reached.
        """
        async with self._turn:
            found = await asyncio.to_thread(effective_config, config, self.added.known)
            await self._replace(found.config)
            self._given = config
            self.added.tell(found)

    async def _serve_added(self) -> None:
        """Serve the added experts that are known now.

        Raises:
            CoeError: They can't be served; the gateway goes on as before.
        """
        async with self._turn:
            found = await asyncio.to_thread(effective_config, self._given, self.added.known)
            if found.config != self.current.config:
                await self._replace(found.config, same_file=True)
            self.added.tell(found)

    async def _replace(self, config: Config, *, same_file: bool = False) -> None:
        before = self.current
        files = await asyncio.to_thread(_files, config)
        ledger = Ledger(config, self.store)
        after = ConfiguredGateway(config, self._resources, ledger, before, same_file=same_file)
        try:
            await after.start()
        except BaseException:
            await after.stop()
            raise
        await self._replace_remote_engines(before.config, config)
        await self.budget_prices.use_ledger(ledger)
        self.state.forget(replaced(before.config, config, self._files, files))
        self._files = files
        self.current, self._app = after, after.app
        self._earlier.add(before)
        task = asyncio.create_task(self._retire_after_drain(before))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire_after_drain(self, earlier: ConfiguredGateway) -> None:
        """Stop an earlier gateway once it is idle, and the remote experts that only it used."""
        await earlier.drain()
        self._earlier.discard(earlier)
        needed = {*self._remote(self.current.config)}
        needed.update(*(self._remote(gateway.config) for gateway in self._earlier))
        for name in [name for name in self.remote_pools if name not in needed]:
            await self.remote_pools.pop(name).stop()

    # --- remote experts

    @staticmethod
    def _remote(config: Config) -> list[str]:
        """Return the remote experts. Their variants use the same connections."""
        return [
            name
            for name, expert in config.experts.items()
            if expert.remote is not None and not expert.is_variant
        ]

    def _add_remote_pools(self, config: Config) -> list[str]:
        """Create a pool for each remote expert that has none, and return the experts' names."""
        new = [name for name in self._remote(config) if name not in self.remote_pools]
        for name in new:
            remote = config.experts[name].remote
            assert remote is not None
            engine = RemoteEngine(remote)
            self.remote_pools[name] = RemotePool(
                engine, remote.max_in_flight, remote.max_queued_requests
            )
        self.state.metrics.remote |= {n for n, e in config.experts.items() if e.remote is not None}
        return new

    async def _replace_remote_engines(self, old: Config, config: Config) -> None:
        new = self._add_remote_pools(config)
        for name in self._remote(config):
            pool, remote = self.remote_pools[name], config.experts[name].remote
            assert remote is not None
            if name in new:
                await self._connect(name, pool)
                continue
            before = old.experts[name].remote if name in old.experts else None
            if before != remote or pool.failed is not None:
                engine = RemoteEngine(remote)
                await pool.replace(engine, remote.max_in_flight, remote.max_queued_requests)
                if pool.failed is not None:
                    log.error("expert %s failed: %s", name, pool.failed)

    # --- metrics

    async def _neighbours(self) -> list[str]:
        """The metrics of the node's other gateways."""
        return await self._node.others("gateway-") if self._node is not None else []

    def _update_metrics(self) -> None:
        """Update the metrics of pools, remote queues, breakers, budgets and the store."""
        registry = self.state.metrics.registry
        registry.put(metric_declarations.POOLS, len(self.directory.links()))
        registry.forget(metric_declarations.SNAPSHOT_AGE)
        for boot, age_s in self.directory.silences().items():
            registry.put(metric_declarations.SNAPSHOT_AGE, age_s, boot)
        health = self.store.health()
        registry.put(metric_declarations.STORE_UP, health.up)
        registry.put(metric_declarations.STORE_PENDING_SETTLEMENTS, health.pending_settlements)
        registry.total(metric_declarations.STORE_OUTAGES, health.outages)
        registry.total(metric_declarations.STORE_OFFLINE_ADMISSIONS, health.offline_grants)
        registry.forget(metric_declarations.REQUESTS_WAITING, self.remote_pools)
        registry.forget(metric_declarations.REQUESTS_RUNNING, self.remote_pools)
        for name, remote_pool in self.remote_pools.items():
            registry.put(metric_declarations.REQUESTS_WAITING, remote_pool.waiting, name)
            registry.put(metric_declarations.REQUESTS_RUNNING, remote_pool.running, name)
        prices = {name: price for name, price, _ in self.budget_prices.prices()}
        registry.forget(metric_declarations.SHADOW_PRICE, prices)
        for name, price in prices.items():
            registry.put(metric_declarations.SHADOW_PRICE, price, name)
        self.current.breakers.read()
        self.current.alias_traffic.refresh_metrics()

    async def _update_budget_metrics(self) -> None:
        """Update the metrics of budgets. They do not change while the store can't be reached."""
        registry = self.state.metrics.registry
        with contextlib.suppress(CoeError):
            states = await self.ledger.state()
            registry.forget(metric_declarations.BUDGET_REMAINING, states)
            for name, state in states.items():
                left = max(0.0, 1 - state.spent / state.amount)
                registry.put(metric_declarations.BUDGET_REMAINING, left, name)

    async def _update_replicas(self) -> None:
        """Update the metrics of replicas. They are left out where they can't be counted."""
        if self._count_replicas is None:
            return
        registry = self.state.metrics.registry
        counted: Mapping[str, Mapping[str, int]] = {}
        with contextlib.suppress(TimeoutError, CoeError):
            async with asyncio.timeout(_COUNT_S):
                counted = await self._count_replicas()
        registry.forget(metric_declarations.REPLICAS, counted)
        for deployment, states in counted.items():
            for state, count in states.items():
                registry.put(metric_declarations.REPLICAS, count, deployment, state)

    async def stop(self) -> None:
        """Close every connection, and stop the gateways of earlier configs."""
        await self.added.stop()
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if self.batches is not None:
            await self.batches.stop()
        if self._node is not None:
            await self._node.stop()
        for gateway in (*self._earlier, self.current):
            await gateway.stop()
        if self.responses is not None:
            await self.responses.stop()
        await self.budget_prices.stop()
        await self.directory.close()
        await self.store.stop()
        await self.volatile.close()
        await asyncio.gather(*(pool.stop() for pool in self.remote_pools.values()))
        if (traces := self._resources.traces) is not None:
            await asyncio.to_thread(traces.stop)


def _files(config: Config) -> dict[str, str]:
    """Versions of local weights and digests of steering profiles, by expert."""
    local = [name for name, expert in config.experts.items() if expert.remote is None]
    return {**file_versions(config, local), **profile_digests(config)}
