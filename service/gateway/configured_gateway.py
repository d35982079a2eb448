"""The gateway of one config: what decides, admits and answers by it. Nothing outlives it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from service.broker.ledger import Ledger
from service.capabilities import with_capabilities
from service.config import Config
from service.gateway.admission import Admission
from service.gateway.app import Gateway
from service.gateway.auth import Authenticator
from service.gateway.budget_prices import BudgetPrices
from service.gateway.cache.response_cache import ResponseCache
from service.gateway.dispatch.circuit_breakers import CircuitBreakers
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.dispatch.execution import RecipeExecutor
from service.gateway.dispatch.remote_pool import RemotePool
from service.gateway.guard.guard import Guard
from service.gateway.guard.screen import Screen
from service.gateway.request_record import ExpertCall
from service.gateway.routes.admin import Reload
from service.gateway.routes.feedback import FeedbackService
from service.gateway.routes.keys_and_usage import AccountEndpoints
from service.gateway.routing.setup import RoutingSetup
from service.gateway.state import GatewayState
from service.gateway.store_setup import key_book, keys_marker
from service.rpc.pool_directory import PoolDirectory
from service.store.keys import Keys
from service.store.protocol import Store
from service.store.volatile import VolatileStore
from service.telemetry import metrics
from service.telemetry.tracing import Traces
from service.types import NOBODY, Tenant


class ConfiguredGateway:
    """What answers by one config. Raises ConfigError, ArtifactError where it can't be built.

    Args:
        config: By which it answers.
        state: What the gateway has counted and learned.
        directory: Links to pools.
        store: Counts limits and budgets.
        volatile: Keeps what may be lost.
        budget_prices: Prices budgets.
        remote_pools: Of the remote experts, by name; it is read whenever one is asked.
        before: The one of the config before, whose replies may be voted on still.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: GatewayState,
        directory: PoolDirectory,
        store: Store,
        volatile: VolatileStore,
        ledger: Ledger,
        budget_prices: BudgetPrices,
        remote_pools: Mapping[str, RemotePool],
        traces: Traces | None,
        secret: str,
        admin_key: str | None,
        wake: Callable[[str], None],
        neighbours: Callable[[], Awaitable[list[str]]],
        behind_serve: bool,
        reload: Reload | None,
        screens: Mapping[str, Screen] | None,
        before: ConfiguredGateway | None,
    ) -> None:
        self.config = config
        config = with_capabilities(config)
        self.remote_pools = remote_pools
        self._meter = state.metrics.meter
        book = key_book(config, store)
        self.authenticator: Authenticator = Authenticator(
            config,
            book,
            secret=secret,
            marker=keys_marker(config),
            after=None if before is None else before.authenticator,
        )
        self.ledger = ledger
        remotes = {name: expert.remote for name, expert in config.experts.items() if expert.remote}
        self.breakers = CircuitBreakers(
            {name: remote.url for name, remote in remotes.items()},
            config.server.breaker.min_hang_s,
            state.breakers,
            state.retries,
            self._meter,
        )
        routing = RoutingSetup(config, state.lengths, state.escalations)
        self.cost_model = routing.cost_model
        self.dispatcher = Dispatcher(
            routing.catalog,
            routing.cost_model,
            directory,
            remote_pools,
            wake,
            budget_prices,
            self.breakers,
            state.prefix_affinity,
        )
        self.feedback: FeedbackService = FeedbackService(
            config.feedback,
            store,
            volatile,
            routing.quality_model,
            routing.catalog,
            shared=(config.store.cache_url or config.store.cache_url_env) is not None,
            tenants=[NOBODY.name, *config.tenants],
            after=None if before is None else before.feedback,
        )
        self._admission = Admission(
            config, self.authenticator, self.ledger, self.dispatcher.context, self._charged
        )
        self.gateway = Gateway(
            config,
            routing.router,
            self.dispatcher,
            self._admission,
            AccountEndpoints(config, self._admission, Keys(book)),
            RecipeExecutor(self.dispatcher, routing.quality_model, self.feedback),
            directory,
            lambda: {name: remote_pools[name].failed for name in remotes if name in remote_pools},
            neighbours,
            state,
            admin_key=admin_key,
            reload=reload,
            traces=traces,
            behind_serve=behind_serve,
            guard=Guard(config, screens),
            cache=ResponseCache(config, volatile, self._meter),
        )

    async def start(self) -> None:
        """Begin to follow keys and votes. Raises StoreUnavailableError."""
        await self.authenticator.start()
        await self.feedback.start()

    async def stop(self) -> None:
        """End what is under way in the background."""
        await self.gateway.feed.close()
        await self.dispatcher.close()
        await self.feedback.stop()
        await self._admission.stop()
        await self.authenticator.stop()

    async def end(self) -> None:
        """Stop after the last request that came to it."""
        # Consoles connect again at once, to the gateway of the newer config.
        await self.gateway.feed.close()
        await self.gateway.idle()
        await self.stop()

    def _charged(self, tenant: Tenant, outcome: str, calls: Sequence[ExpertCall]) -> None:
        """A request that somebody is charged for has ended."""
        self._meter.add(metrics.TENANT_REQUESTS, 1, tenant.name, outcome)
        for call in calls:
            tokens = (call.prompt_tokens or 0) + (call.completion_tokens or 0)
            self._meter.add(metrics.TENANT_TOKENS, tokens, tenant.name)
