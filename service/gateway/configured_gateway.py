"""Assembles the gateway of one config. Everything in it ends with the config."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import random
from typing import Any

from service.batches.batch_planner import BatchPlanner
from service.batches.batch_service import BatchService
from service.batches.batch_types import PlansBatches
from service.broker.limit_and_budget_ledger import Ledger
from service.broker.savings import Saving, SavingsTotal
from service.config import Config
from service.default_prices import with_default_prices
from service.encoder.shared_encoders import SharedEncoders
from service.expert_capabilities import with_capabilities
from service.gateway.added_experts import AddedExpertService
from service.gateway.admission import Admission
from service.gateway.app import build_app
from service.gateway.auth import Authenticator
from service.gateway.budget_prices import BudgetPrices
from service.gateway.cache.response_cache import ResponseCache
from service.gateway.console.event_stream import EventStream
from service.gateway.dependencies import GatewayServices, Reload
from service.gateway.dispatch.circuit_breakers import CircuitBreakers
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.dispatch.internal_expert_calls import SideCalls
from service.gateway.dispatch.recipe_executor import RecipeExecutor
from service.gateway.dispatch.remote_pool import RemotePool
from service.gateway.guard.guard import Guard
from service.gateway.guard.screen_interface import Screen
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.learned_budgets import LearnedBudgets
from service.gateway.request.request_intake import RequestIntake
from service.gateway.request.stored_turn import StoredTurns
from service.gateway.request_record import ExpertCall
from service.gateway.request_scope import RequestObservers
from service.gateway.routes.inference import InferenceEndpoint, InferenceHandler
from service.gateway.routing.alias_resolution import AliasResolution
from service.gateway.routing.alias_traffic import AliasTraffic
from service.gateway.routing.batch_estimates import BatchEstimator
from service.gateway.routing.feedback_learning import FeedbackService
from service.gateway.routing.quality_cost_frontier import frontier_of
from service.gateway.routing.routing_setup import RoutingSetup
from service.gateway.routing.session_affinity import SessionService
from service.gateway.shadow.evaluator import ShadowEvaluator
from service.gateway.state_across_reloads import GatewayState
from service.gateway.store_setup import key_book, keys_marker
from service.gateway.stored_response_send import ResponseKeeper
from service.rpc.pool_directory import PoolDirectory
from service.store.api_keys import KeyService
from service.store.store_interface import Store
from service.store.volatile_store import VolatileStore
from service.stored_responses.conversation_service import ConversationService
from service.stored_responses.response_service import ResponseService
from service.telemetry import metric_declarations
from service.telemetry.model_server_metrics import ModelServerLoad
from service.telemetry.tracing import Traces
from service.types import NOBODY, Tenant


@dataclass(frozen=True, slots=True)
class GatewayResources:
    """The objects that a gateway keeps from one config to the next.

    Attributes:
        state: Counters and learned values.
        directory: Links to pools.
        store: Counts limits and budgets.
        volatile: Keeps values that may be lost.
        budget_prices: Prices budgets.
        remote_pools: Remote experts, by name. The mapping changes with the config, and every
            request reads it again.
        traces: Records traces; None if tracing is off.
        secret: The cluster's secret.
        admin_key: The admin key; None disables the admin endpoints.
        wake: Requests the start of a pool for an expert that no running pool holds.
        neighbours: Returns the metrics of the node's other gateways, as texts.
        behind_serve: Whether Ray Serve's HTTP server is around the gateway, see `build_app`.
        added: The experts that an admin has added.
        reload: Reads the config's file again and applies it; None if another process does this.
        screens: Screens that replace the guard's built-in screens, by name.
        encoders: The router's encoders.
        batches: Files and batches; None where the service has none.
        responses: Stored responses; None where the service has none.
        conversations: Stored conversations; None where the service has none.
    """

    state: GatewayState
    directory: PoolDirectory
    store: Store
    volatile: VolatileStore
    budget_prices: BudgetPrices
    remote_pools: Mapping[str, RemotePool]
    traces: Traces | None
    secret: str
    admin_key: str | None
    wake: Callable[[str], None]
    neighbours: Callable[[], Awaitable[list[str]]]
    behind_serve: bool
    added: AddedExpertService
    reload: Reload | None
    screens: Mapping[str, Screen] | None
    encoders: SharedEncoders
    batches: BatchService | None = None
    responses: ResponseService | None = None
    conversations: ConversationService | None = None


class ConfiguredGateway:
    """The gateway of one config.

    Args:
        config: The config.
        resources: The objects that the gateway keeps from one config to the next.
        ledger: Counts this config's limits and budgets.
        predecessor: The gateway of the previous config. Clients can still vote on its replies.
        same_file: Whether only added experts differ from the previous config. What a new file
            begins anew, such as roll-backs of aliases, then goes on.

    Raises:
        ConfigError: The config can't be served.
        ArtifactError: The router's artifact can't be used.
    """

    def __init__(
        self,
        config: Config,
        resources: GatewayResources,
        ledger: Ledger,
        predecessor: ConfiguredGateway | None = None,
        *,
        same_file: bool = False,
    ) -> None:
        self.config = config
        config = with_default_prices(with_capabilities(config))
        self.ledger = ledger
        self._resources = resources
        state = resources.state
        self._registry = state.metrics.registry
        book = key_book(config, resources.store)
        self.authenticator: Authenticator = Authenticator(
            config,
            book,
            secret=resources.secret,
            marker=keys_marker(config),
            after=None if predecessor is None else predecessor.authenticator,
        )
        remotes = {name: expert.remote for name, expert in config.experts.items() if expert.remote}
        self._remote_owners = {name: config.owner_of(name) for name in remotes}
        learned = LearnedBudgets(config, state.thinking)
        defaults = RequestDefaults(config, learned)
        self.breakers = CircuitBreakers(
            {name: remote.url for name, remote in remotes.items()},
            config.server.breaker.min_hang_s,
            state.breakers,
            state.retries,
            self._registry,
        )
        routing = RoutingSetup(
            config, state.lengths, state.escalations, self._registry, state.review_lengths
        )
        for (expert, category), samples in routing.thinking.items():
            state.thinking.seed(expert, category, samples)
        self._stages = routing.stages
        self.cost_model = routing.cost_model
        self.dispatcher = Dispatcher(
            routing.catalog,
            routing.cost_model,
            resources.directory,
            resources.remote_pools,
            resources.wake,
            resources.budget_prices,
            self.breakers,
            state.prefix_affinity,
            defaults,
            {name: owner for name, owner in self._remote_owners.items() if name != owner},
        )
        self.feedback: FeedbackService = FeedbackService(
            config.feedback,
            resources.store,
            resources.volatile,
            routing.quality_model,
            routing.catalog,
            shared=(config.store.cache_url or config.store.cache_url_env) is not None,
            tenants=[NOBODY.name, *config.tenants],
            after=None if predecessor is None else predecessor.feedback,
        )
        shared = (config.store.cache_url or config.store.cache_url_env) is not None
        self.sessions = SessionService(
            config.router.sessions, state.sessions, resources.volatile, shared=shared
        )
        self._admission = Admission(
            config,
            self.authenticator,
            ledger,
            self.dispatcher.context,
            self._count_charged,
            defaults,
            self._count_savings,
        )
        self.shadow = ShadowEvaluator(
            config,
            SideCalls(self.dispatcher),
            resources.store,
            defaults,
            self.dispatcher.context,
            self._registry,
            random,
        )
        self.alias_traffic: AliasTraffic = AliasTraffic(
            config,
            self._registry,
            resources.volatile,
            shared=shared,
            after=predecessor.alias_traffic if predecessor is not None and same_file else None,
        )
        self._begins_anew = predecessor is not None and not same_file
        self.aliases = AliasResolution(config, self.alias_traffic.left_out)
        stored, conversations = resources.responses, resources.conversations
        self._keeper = ResponseKeeper(stored, self._registry)
        intake = RequestIntake(
            config,
            Guard(config, resources.screens),
            self._registry,
            self.aliases,
            StoredTurns(stored, conversations) if stored and conversations else None,
        )
        planner = BatchPlanner(
            BatchEstimator(
                config, routing, intake, defaults, self.dispatcher.context, self.dispatcher.views
            )
        )
        self.services = GatewayServices(
            config=config,
            state=state,
            admission=self._admission,
            intake=intake,
            aliases=self.aliases,
            alias_traffic=self.alias_traffic,
            planner=routing.planner,
            executor=RecipeExecutor(
                self.dispatcher,
                routing.catalog,
                routing.cost_model,
                routing.quality_model,
                resources.budget_prices,
                state.prefix_affinity,
                self.feedback,
                routing.savings,
                learned,
                state.round_gains,
            ),
            sessions=self.sessions,
            feedback=self.feedback,
            keys=KeyService(book),
            directory=resources.directory,
            views=self.dispatcher.views,
            remote_failures=self._remote_failures,
            remote_load=self._remote_load,
            neighbours=resources.neighbours,
            admin_key=resources.admin_key,
            added=resources.added,
            reload=resources.reload,
            batches=resources.batches,
            batch_planner=planner,
            responses=stored,
            conversations=conversations,
        )
        self.batch_planner: PlansBatches = planner
        # By recipe, the experts that it asks first.
        self.batch_members: Mapping[str, tuple[str, ...]] = {
            name: recipe.recipe().members for name, recipe in config.recipes.items()
        }
        self.inference = InferenceEndpoint(self._inference_handler())
        self.events = EventStream(
            config,
            resources.directory,
            self.dispatcher.views,
            self._remote_failures,
            lambda: state.metrics.in_flight,
            state.recent,
            resources.budget_prices.prices,
            state.history,
            state.savings,
            self._frontier(routing),
            self.alias_traffic.to_json,
            None if resources.batches is None else resources.batches.statistics,
        )
        self.app = build_app(
            self.services, self.inference, self.events, behind_serve=resources.behind_serve
        )

    def _frontier(self, routing: RoutingSetup) -> dict[str, Any] | None:
        """What `auto` chooses at which price, for the console; None without a choice."""
        if len(self.config.experts) < 2 or not routing.stages.classifies:
            return None
        return frontier_of(self.config, routing).to_json(self.config)

    def _inference_handler(self) -> InferenceHandler:
        services, resources = self.services, self._resources
        return InferenceHandler(
            intake=services.intake,
            planner=services.planner,
            cache=ResponseCache(
                services.config, resources.volatile, self._registry, resources.added.times()
            ),
            admission=self._admission,
            executor=services.executor,
            shadow=self.shadow,
            sessions=self.sessions,
            keeper=self._keeper,
            observers=RequestObservers(
                services.state.metrics,
                services.state.recent,
                self.alias_traffic,
                resources.traces,
                access_log=services.config.server.access_log,
                sends_request_id=not resources.behind_serve,
            ),
            behind_serve=resources.behind_serve,
        )

    def _remote_failures(self) -> dict[str, str | None]:
        pools = self._resources.remote_pools
        return {
            name: pools[owner].failed
            for name, owner in self._remote_owners.items()
            if owner in pools
        }

    def _remote_load(self) -> ModelServerLoad:
        pools = self._resources.remote_pools.values()
        return ModelServerLoad(
            waiting=sum(pool.waiting for pool in pools), running=sum(pool.running for pool in pools)
        )

    async def start(self) -> None:
        """Start to follow changes of keys and votes.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """
        await self.authenticator.start()
        await self.feedback.start()
        self.shadow.start()
        await self.sessions.start()
        await self.alias_traffic.start(anew=self._begins_anew)
        await self._stages.start(self._resources.encoders)

    async def stop(self) -> None:
        """Stop the background tasks."""
        await self.events.close()
        await self.shadow.stop()
        await self.dispatcher.close()
        await self._stages.stop()
        await self.feedback.stop()
        await self.sessions.stop()
        await self._keeper.stop()
        await self.alias_traffic.stop()
        await self._admission.stop()
        await self.authenticator.stop()

    async def drain(self) -> None:
        """Stop after the last request of this config."""
        # Consoles reconnect at once, to the gateway of the newer config.
        await self.events.close()
        await self.inference.wait_idle()
        await self.stop()

    def _count_charged(self, tenant: Tenant, outcome: str, calls: Sequence[ExpertCall]) -> None:
        """Count a request in its tenant's usage."""
        self._registry.add(metric_declarations.TENANT_REQUESTS, 1, tenant.name, outcome)
        for call in calls:
            tokens = (call.prompt_tokens or 0) + (call.completion_tokens or 0)
            self._registry.add(metric_declarations.TENANT_TOKENS, tokens, tenant.name)

    def _count_savings(self, tenant: Tenant, savings: Sequence[Saving]) -> None:
        """Count what a request saved, for the tenant's metrics and the operator's console."""
        for saving in savings:
            self._resources.state.savings.setdefault(saving.baseline, SavingsTotal()).add(saving)
            labels = tenant.name, saving.baseline
            self._registry.add(metric_declarations.SAVINGS_REQUESTS, 1, *labels)
            self._registry.add(metric_declarations.SAVINGS_COST, saving.cost, *labels)
            self._registry.add(
                metric_declarations.SAVINGS_BASELINE_COST, saving.baseline_cost, *labels
            )
            self._registry.add(metric_declarations.SAVINGS_QUALITY, saving.quality, *labels)
            self._registry.add(
                metric_declarations.SAVINGS_BASELINE_QUALITY, saving.baseline_quality, *labels
            )
