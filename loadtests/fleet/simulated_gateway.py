"""A gateway of a simulated fleet: the service's planner, choice, breakers and reports of demand.

What HTTP does around them is left out: the body of a request is its lengths, and retries follow
the dispatcher's rule for single experts, which excludes places that have failed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from loadtests.fleet.cpu_sections import CpuSections
from loadtests.fleet.market_traffic import Arrival
from loadtests.fleet.modelled_engine import ENDPOINT
from loadtests.fleet.simulated_pools import SimulatedLink, SimulatedPool
from service.broker.limit_and_budget_ledger import Ledger
from service.broker.pool_state import BootId, Place
from service.config import Config
from service.errors import CoeError, UnavailableError
from service.gateway.budget_prices import BudgetPrices
from service.gateway.dispatch.circuit_breakers import CircuitBreakers
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest
from service.gateway.routing.routing_setup import RoutingSetup
from service.gateway.state_across_reloads import GatewayState
from service.rpc.call_headers import Call
from service.rpc.pool_directory import PoolDirectory
from service.store.memory_store import MemoryStore

_MOST_ATTEMPTS = 4


@dataclass(slots=True)
class Answered:
    """How a request ended: by whom it was answered; empty where it failed, and why."""

    expert: str = ""
    boot: str = ""
    fault: str = ""
    attempts: int = 0


class SimulatedGateway:
    """One gateway.

    Args:
        name: Its id, by which it selects the pools that it follows.
        config: The config.
        routing: The router of the config. It learns, and is this gateway's alone.
        pools: The pools of the fleet, by boot id.
        cpu: Counts processor time.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        routing: RoutingSetup,
        pools: Mapping[str, SimulatedPool],
        cpu: CpuSections,
    ) -> None:
        self._cpu = cpu
        self.directory = PoolDirectory(name, "secret", partial(SimulatedLink, pools, cpu))
        state = GatewayState.new(config.server.breaker)
        store = MemoryStore()
        self._planner = routing.planner
        self._cost_model = routing.cost_model
        self.catalog = routing.catalog
        self.breakers = CircuitBreakers(
            {},
            config.server.breaker.min_hang_s,
            state.breakers,
            state.retries,
            state.metrics.registry,
        )
        self.dispatcher = Dispatcher(
            routing.catalog,
            routing.cost_model,
            self.directory,
            {},
            lambda _expert: None,
            BudgetPrices(Ledger(config, store), store),
            self.breakers,
            state.prefix_affinity,
            RequestDefaults(config),
            {},
        )

    async def ask(
        self, arrival: Arrival, model: str, request_id: str, deadline_s: float
    ) -> Answered:
        """Choose an expert for a request and call it, with retries elsewhere."""
        ends_s = time.monotonic() + deadline_s
        request = _request(model, request_id, arrival.prompt_tokens, deadline_s)
        body = b"%d %d" % (arrival.prompt_tokens, arrival.answer_tokens)
        result = Answered()
        excluded: frozenset[Place] = frozenset()
        with self._cpu.of("choice"):
            plan = self._planner.plan(request)
            selection = self.dispatcher.select_first(request, plan, deadline_s)
        self.breakers.record_request()
        while (left_s := ends_s - time.monotonic()) > 0 and result.attempts < _MOST_ATTEMPTS:
            position = selection.best_position()
            if position is None:
                await self.directory.change(min(left_s, 1.0))
            else:
                recipe = self.catalog.recipes[int(plan.rows[position])]
                option = selection.expert_in_pool(recipe.members[0])
                assert option is not None
                assert option.boot is not None
                result.attempts += 1
                try:
                    with self.breakers.attempt(option.expert, option.boot, left_s):
                        await self._call(option.expert, option.boot, request, left_s, body)
                except UnavailableError as error:
                    result.fault = error.code
                    excluded |= {(option.expert, option.boot)}
                except CoeError as error:
                    result.fault = error.code
                    return result
                else:
                    self._cost_model.observe(option.expert, plan.category, arrival.answer_tokens)
                    return Answered(option.expert, option.boot, "", result.attempts)
            left_s = max(0.0, ends_s - time.monotonic())
            with self._cpu.of("choice"):
                selection = self.dispatcher.weigh_candidates(
                    request, plan, left_s=left_s, excluded=excluded
                )
        result.fault = result.fault or "deadline_exceeded"
        return result

    async def _call(
        self, expert: str, boot: str, request: InferenceRequest, left_s: float, body: bytes
    ) -> None:
        link = cast(SimulatedLink, self.directory.link(boot))
        call = Call(
            endpoint=request.endpoint,
            expert=expert,
            request_id=request.request_id,
            deadline_ms=max(1, int(left_s * 1000)),
            stream=request.stream,
            gateway=self.directory.gateway,
            seq=link.next_seq(expert),
            tenant=request.tenant,
            prompt_tokens=request.prompt_tokens,
            places=request.sequences,
        )
        await link.exchange(call, body)

    def place_for(self, expert: str) -> BootId:
        """The pool that a request for an expert would go to now."""
        request = _request(expert, "look", 200, 60.0)
        selection = self.dispatcher.weigh_candidates(request, self._planner.plan(request))
        option = selection.expert_in_pool(expert)
        return option.boot if option is not None else None

    async def close(self) -> None:
        """Stop following pools."""
        await self.dispatcher.close()
        await self.directory.close()

    async def ready(self) -> None:
        """Wait until every followed pool has told its state."""
        while len(self.directory.links()) < len(self.directory.followed):
            await self.directory.change(1.0)


def _request(
    model: str, request_id: str, prompt_tokens: int, deadline_s: float
) -> InferenceRequest:
    return InferenceRequest(
        endpoint=ENDPOINT,
        model=model,
        stream=False,
        needs=frozenset({"chat"}),
        data={},
        raw=b"",
        request_id=request_id,
        client_id=request_id,
        deadline_ms=int(1000 * deadline_s),
        body_bytes=4 * prompt_tokens,
    )
