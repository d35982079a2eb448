"""Runs a scenario: traffic, gateways and pools on one virtual clock."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loadtests.fleet.cpu_sections import CpuSections
from loadtests.fleet.market_traffic import Arrival, Pattern, arrivals, mean_rates
from loadtests.fleet.modelled_engine import DEFAULT_COSTS, EngineCosts, FirstToken
from loadtests.fleet.simulated_gateway import Answered, SimulatedGateway
from loadtests.fleet.simulated_pools import SimulatedPool
from loadtests.lib.virtual_clock import run_on_virtual_clock
from service.config import Config
from service.gateway.routing.routing_setup import RoutingSetup
from service.pool import pool as pool_module
from service.pool.slots import shared_slot
from service.pool.swap_planner import SwapPolicy

# The objective: the first token within this time, and then a token within this time on average.
FIRST_S, TOKEN_S = 10.0, 0.1
DEADLINE_S = 60.0
# Pools of a dead node leave the registry after Ray Serve has missed their health checks.
NOTICED_S = 30.0
_DRAIN_S = 30.0
# The start of an engine in a rolling reload.
_START_S = 20.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet and what happens to it.

    Attributes:
        pattern: Its traffic.
        accelerators: Its accelerators, each with a pool of its own.
        kinds: The kinds of pools. Each has its part of the accelerators and of the experts.
        gateways: Its gateways. Each request goes to one of them at random.
        held: Experts that fit in the host memory of an accelerator, the running one included.
        costs: The engines' times.
        warm_s: Requests before this time do not count.
        kill_s: When a part of the accelerators dies; None: never.
        kill_share: How large this part is.
        reload_s: When a rolling reload begins, which replaces every pool; None: never.
        reload_at_once: The share of the pools that are replaced at the same time.
    """

    pattern: Pattern
    accelerators: int = 10
    kinds: int = 1
    gateways: int = 1
    held: int = 18
    costs: EngineCosts = DEFAULT_COSTS
    warm_s: float = 60.0
    kill_s: float | None = None
    kill_share: float = 0.1
    reload_s: float | None = None
    reload_at_once: float = 0.05

    def names(self) -> tuple[str, ...]:
        """The experts, in the config's order."""
        return tuple(f"e{i}" for i in range(self.pattern.experts))

    def experts_of(self, kind: int) -> tuple[str, ...]:
        """The experts of a kind of pools."""
        return self.names()[kind :: self.kinds]

    def policy(self) -> SwapPolicy:
        """The policy of every pool: the service's own but for its memory."""
        return SwapPolicy(host_bytes=self.held * self.costs.unit_bytes)


@dataclass(slots=True)
class Answer:
    """How a request ended.

    Attributes:
        arrival: The request.
        first_s: Seconds to the first token; infinite without one.
        token_s: Seconds for each further token, on average.
        expert: The expert that answered; empty without an answer.
        fault: Why it has none.
        attempts: How many pools were tried.
    """

    arrival: Arrival
    first_s: float
    token_s: float
    expert: str
    fault: str
    attempts: int

    @property
    def good(self) -> bool:
        """Whether it met the objective."""
        return bool(self.expert) and self.first_s <= FIRST_S and self.token_s <= TOKEN_S


@dataclass(slots=True)
class Outcome:
    """What came of a scenario, of the requests that count.

    Attributes:
        answers: The requests that came after `warm_s`.
        window_s: Seconds in which they came.
        accelerators: The fleet's size.
        switches: Swaps in that time.
        cpu_s: By section, processor time of the service's code.
        calls: By section, how often it ran.
        whole_s: Processor time of the whole simulation.
        agreement: Share of the gateways that choose the most frequent pool for an expert, for the
            experts that are asked for most, as a mean over several moments.
    """

    answers: list[Answer]
    window_s: float
    accelerators: int
    switches: int
    cpu_s: dict[str, float]
    calls: dict[str, int]
    whole_s: float
    agreement: float = 1.0

    @property
    def attainment(self) -> float:
        """The share of the requests that met the objective."""
        return sum(one.good for one in self.answers) / max(1, len(self.answers))

    @property
    def goodput(self) -> float:
        """Requests per second and accelerator that met the objective."""
        return sum(one.good for one in self.answers) / self.window_s / self.accelerators

    @property
    def good_tokens(self) -> float:
        """Their tokens per second and accelerator."""
        tokens = sum(one.arrival.answer_tokens for one in self.answers if one.good)
        return tokens / self.window_s / self.accelerators

    @property
    def switches_per_min(self) -> float:
        """Swaps per minute and accelerator."""
        return 60 * self.switches / self.window_s / self.accelerators

    def cpu_ms(self, *sections: str) -> float:
        """Processor time of sections for each request, in ms."""
        return 1e3 * sum(self.cpu_s.get(one, 0.0) for one in sections) / max(1, len(self.answers))

    def first_percentile_s(self, percent: float) -> float:
        """A percentile of the seconds to the first token; a request without one counts as 60 s."""
        times = [min(one.first_s, DEADLINE_S) for one in self.answers]
        return float(np.percentile(times, percent)) if times else 0.0


def config_of(scenario: Scenario) -> Config:
    """The config of a fleet: its experts with their categories, and its kinds of pools."""
    draw = random.Random(7)
    categories = [f"c{i}" for i in range(scenario.pattern.categories)]
    experts = {
        name: {
            "model": "m",
            "categories": [categories[i % len(categories)]],
            "quality": {categories[i % len(categories)]: round(draw.uniform(0.4, 0.9), 2)},
        }
        for i, name in enumerate(scenario.names())
    }
    pools = {
        f"k{kind}": {
            "engine": "simulated",
            "experts": list(scenario.experts_of(kind)),
            "slots": 1,
        }
        for kind in range(scenario.kinds)
    }
    return Config.model_validate(
        {"experts": experts, "pools": pools, "router": {"artifact": "none"}}
    )


_SECTIONS = (
    (pool_module, "encode", "snapshots told"),
    (pool_module.Pool, "snapshot", "snapshots told"),
    (shared_slot.SharedSlot, "_unit_views", "planning"),
    (shared_slot, "bounded", "planning"),
    (shared_slot, "next_step", "planning"),
    (shared_slot, "next_fetch", "planning"),
    (shared_slot, "units_to_evict", "planning"),
    (shared_slot.SharedSlot, "_grant", "queueing"),
)
SECTIONS = ("choice", "snapshots taken over", "snapshots told", "planning", "queueing")
_WATCHED = 20
_LOOK_S = 5.0


class FleetRun:
    """One run of a scenario by the service's own decisions."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self._seed = seed
        self._draw = random.Random(seed)
        self.cpu = CpuSections()
        self.pools: dict[str, SimulatedPool] = {}
        self.gateways: list[SimulatedGateway] = []
        self._firsts: dict[str, FirstToken] = {}
        self._answers: list[Answer] = []
        self._agreements: list[float] = []
        # Pools that the registry lists: those that were not removed.
        self._listed: dict[str, int] = {}

    async def play(self) -> Outcome:
        """Play the scenario to the end of its last request."""
        with self.cpu.patched(*_SECTIONS):
            self._pools()
            self._gateways()
            await asyncio.gather(*(gateway.ready() for gateway in self.gateways))
            return await self._traffic()

    def _pools(self) -> None:
        """Start the fleet's pools."""
        scenario = self.scenario
        for i in range(scenario.accelerators):
            kind = i % scenario.kinds
            self._add_pool(kind, scenario.experts_of(kind), scenario.costs)

    def _gateways(self) -> None:
        """Start the fleet's gateways."""
        config = config_of(self.scenario)
        for i in range(self.scenario.gateways):
            routing = RoutingSetup(config)
            self.gateways.append(
                SimulatedGateway(f"gateway-{i}", config, routing, self.pools, self.cpu)
            )
        self._publish()

    async def _traffic(self) -> Outcome:
        scenario, began_s = self.scenario, time.monotonic()
        asked = arrivals(scenario.pattern, self._seed)
        events = [asyncio.create_task(one) for one in self._events(began_s)]
        tasks: set[asyncio.Task[None]] = set()
        switches, whole_s = 0, time.thread_time()
        warm = False
        for number, arrival in enumerate(asked):
            if not warm and arrival.at_s >= scenario.warm_s:
                warm = True
                self.cpu.reset()
                switches, whole_s = self._switches(), time.thread_time()
            if (left_s := began_s + arrival.at_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            task = asyncio.create_task(self._ask(arrival, f"r{number}"))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, began_s + scenario.pattern.for_s - time.monotonic()))
        outcome = Outcome(
            [],
            scenario.pattern.for_s - scenario.warm_s,
            scenario.accelerators,
            self._switches() - switches,
            dict(self.cpu.seconds),
            dict(self.cpu.calls),
            time.thread_time() - whole_s,
            float(np.mean(self._agreements)) if self._agreements else 1.0,
        )
        while tasks:
            await asyncio.wait(tasks)
        for event in events:
            event.cancel()
        await asyncio.gather(*events, return_exceptions=True)
        await self._close()
        outcome.answers = [a for a in self._answers if a.arrival.at_s >= scenario.warm_s]
        return outcome

    async def _close(self) -> None:
        await asyncio.gather(*(gateway.close() for gateway in self.gateways))
        await asyncio.gather(*(pool.stop(0) for pool in self.pools.values()))

    def _switches(self) -> int:
        return sum(pool.switches for pool in self.pools.values())

    def _add_pool(self, kind: int, experts: Sequence[str], costs: EngineCosts) -> SimulatedPool:
        pool = SimulatedPool(
            f"k{kind}",
            f"{len(self.pools):016x}",
            experts,
            costs,
            self.scenario.policy(),
            self._firsts,
        )
        self.pools[pool.boot] = pool
        self._listed[pool.boot] = kind
        return pool

    def _publish(self) -> None:
        """Tell the gateways which pools there are, as the registry does."""
        addresses = [self.pools[boot].address for boot in self._listed]
        for gateway in self.gateways:
            gateway.directory.update(addresses)

    async def _ask(self, arrival: Arrival, request_id: str) -> None:
        began_s = time.monotonic()
        first = self._firsts[request_id] = FirstToken()
        model = f"auto/c{arrival.category}" if arrival.expert is None else f"e{arrival.expert}"
        result = await self._serve(arrival, model, request_id)
        del self._firsts[request_id]
        ended_s = time.monotonic()
        done = bool(result.expert)
        self._answers.append(
            Answer(
                arrival,
                first.at_s - began_s if done else float("inf"),
                (ended_s - first.at_s) / max(1, arrival.answer_tokens - 1) if done else 0.0,
                result.expert,
                result.fault,
                result.attempts,
            )
        )

    async def _serve(self, arrival: Arrival, model: str, request_id: str) -> Answered:
        gateway = self._draw.choice(self.gateways)
        return await gateway.ask(arrival, model, request_id, DEADLINE_S)

    # --- what happens to the fleet

    def _events(self, began_s: float) -> list[Coroutine[Any, Any, None]]:
        scenario = self.scenario
        events = []
        if scenario.gateways > 1:
            events.append(self._compare_gateways(began_s))
        if scenario.kill_s is not None:
            events.append(self._kill(began_s + scenario.kill_s))
        if scenario.reload_s is not None:
            events.append(self._reload(began_s + scenario.reload_s))
        return events

    async def _kill(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        count = round(self.scenario.kill_share * len(self._listed))
        dying = self._draw.sample(sorted(self._listed), count)
        await asyncio.gather(*(self.pools[boot].kill() for boot in dying))
        await asyncio.sleep(NOTICED_S)
        for boot in dying:
            del self._listed[boot]
        self._publish()

    async def _reload(self, at_s: float) -> None:
        """Replace each pool: the old one drains, and the new one starts in its place."""
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        costs = replace(self.scenario.costs, start_s=_START_S)
        left = sorted(self._listed)
        at_once = max(1, round(self.scenario.reload_at_once * len(left)))
        while left:
            batch, left = left[:at_once], left[at_once:]
            await asyncio.gather(*(self.pools[boot].stop(_DRAIN_S) for boot in batch))
            for boot in batch:
                self._renew(boot, costs)
            self._publish()
            await asyncio.sleep(_START_S + 1)

    def _renew(self, boot: str, costs: EngineCosts) -> None:
        kind = self._listed.pop(boot)
        self._add_pool(kind, self.scenario.experts_of(kind), costs)

    async def _compare_gateways(self, began_s: float) -> None:
        """Look from time to time whether gateways would send the same request to the same pool."""
        scenario = self.scenario
        rates = mean_rates(scenario.pattern, self._seed)
        watched = [f"e{i}" for i in np.argsort(-rates)[:_WATCHED]]
        await asyncio.sleep(max(0.0, began_s + scenario.warm_s - time.monotonic()))
        while True:
            for name in watched:
                places = Counter(gateway.place_for(name) for gateway in self.gateways)
                self._agreements.append(places.most_common(1)[0][1] / len(self.gateways))
            await asyncio.sleep(_LOOK_S)


def play(
    scenario: Scenario, seed: int, kind: Callable[[Scenario, int], FleetRun] = FleetRun
) -> Outcome:
    """Play a scenario on a clock of its own."""
    random.seed(seed)

    async def run() -> Outcome:
        return await kind(scenario, seed).play()

    return run_on_virtual_clock(run())
