"""What the service's decisions are compared with, on the same engines and the same requests.

The dispatchers of the baselines know the queue of every accelerator at every moment, which is more
than any gateway can know.

- First come, first served, with LRU in host memory: a request goes where its expert runs with a
  free place, or else to the shortest queue. An accelerator serves its queue strictly in order.
- Least loaded, random placement: each expert is on a few accelerators drawn at random, and a
  request goes to the one with the fewest requests. Inside, the service's own queue and planner.
- Static best placement: as before, but the accelerators of each expert are chosen by the true rates
  of all experts, which nobody knows in practice. They never change.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

from loadtests.fleet.market_traffic import Arrival, mean_rates
from loadtests.fleet.modelled_engine import ENDPOINT, EngineCosts, ModelledEngine
from loadtests.fleet.simulated_fleet import DEADLINE_S, FleetRun
from loadtests.fleet.simulated_gateway import Answered
from loadtests.fleet.simulated_pools import SimulatedPool
from loadtests.mixed.fcfs_baseline import Fcfs
from service.engine.engine_interface import EngineRequest, Message
from service.errors import CoeError
from service.rpc.call_headers import Call

_COPIES = 3
# A replica of a popular expert for each such part of an accelerator's work.
_FULL = 0.6
# Tokens of a mean answer, for the true load of an expert.
_MEAN_ANSWER = 140


class _Dispatched(FleetRun):
    """A fleet whose requests are sent by a dispatcher that knows everything."""

    def _gateways(self) -> None:
        """There are none."""


class FirstComeRun(_Dispatched):
    """First come, first served, with LRU in host memory."""

    def _pools(self) -> None:
        names, scenario = self.scenario.names(), self.scenario
        self._engines = [
            ModelledEngine(names, scenario.costs, self._firsts)
            for _ in range(scenario.accelerators)
        ]
        self._queues = [
            Fcfs(
                engine,
                names[0],
                capacity=scenario.costs.capacity,
                most_held=scenario.held,
            )
            for engine in self._engines
        ]
        self._tasks = [asyncio.create_task(queue.run()) for queue in self._queues]
        self._load: Counter[int] = Counter()
        self._turn = random.Random(self._seed)

    def _switches(self) -> int:
        return sum(queue.switches for queue in self._queues)

    async def _serve(self, arrival: Arrival, model: str, request_id: str) -> Answered:
        every = range(len(self._queues))
        running = [
            i
            for i in every
            if self._queues[i].running == model and self._load[i] < self.scenario.costs.capacity
        ]
        chosen = min(running or every, key=lambda i: (self._load[i], self._turn.random()))
        self._load[chosen] += 1
        body = b"%d %d" % (arrival.prompt_tokens, arrival.answer_tokens)

        async def send(_message: Message) -> None:
            """Nobody reads it."""

        try:
            async with asyncio.timeout(DEADLINE_S), self._queues[chosen].lease(model):
                request = EngineRequest(ENDPOINT, model, body, request_id)
                await self._engines[chosen].run(request, send)
        except TimeoutError:
            return Answered(fault="deadline_exceeded", attempts=1)
        finally:
            self._load[chosen] -= 1
        return Answered(model, str(chosen), attempts=1)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class LeastLoadedRun(_Dispatched):
    """Least loaded among the accelerators that hold an expert, placed at random."""

    def _pools(self) -> None:
        scenario = self.scenario
        self._holders = self._placement()
        inside: list[list[str]] = [[] for _ in range(scenario.accelerators)]
        for name, holders in self._holders.items():
            for i in holders:
                inside[i].append(name)
        # An accelerator needs at least one expert.
        self._at = [
            self._add_pool(0, names or [scenario.names()[0]], scenario.costs) for names in inside
        ]

    def _placement(self) -> dict[str, list[int]]:
        """The accelerators of each expert."""
        draw, scenario = random.Random(self._seed), self.scenario
        every = range(scenario.accelerators)
        copies = min(_COPIES, scenario.accelerators)
        return {name: draw.sample(every, copies) for name in scenario.names()}

    async def _serve(self, arrival: Arrival, model: str, request_id: str) -> Answered:
        pool = min((self._at[i] for i in self._holders[model]), key=_queued)
        call = Call(
            ENDPOINT,
            model,
            request_id,
            int(1000 * DEADLINE_S),
            stream=False,
            gateway="dispatcher",
            seq=0,
            prompt_tokens=arrival.prompt_tokens,
        )
        try:
            await pool.run(call, b"%d %d" % (arrival.prompt_tokens, arrival.answer_tokens))
        except CoeError as error:
            return Answered(fault=error.code, attempts=1)
        return Answered(model, pool.boot, attempts=1)


def _queued(pool: SimulatedPool) -> int:
    return pool.in_flight


class StaticBestRun(LeastLoadedRun):
    """Least loaded, with the accelerators of each expert chosen by its true rate."""

    def _placement(self) -> dict[str, list[int]]:
        scenario = self.scenario
        rates = mean_rates(scenario.pattern, self._seed)
        return best_placement(
            {name: float(rate) for name, rate in zip(scenario.names(), rates, strict=True)},
            scenario.accelerators,
            scenario.held,
            scenario.costs,
        )


def best_placement(
    rates: dict[str, float], accelerators: int, held: int, costs: EngineCosts
) -> dict[str, list[int]]:
    """Place experts by their rates: the greatest loads first, each on the emptiest accelerator.

    An expert has a replica for each `_FULL` of an accelerator's work. No accelerator has more
    experts than its host memory holds, as far as there is room.

    Args:
        rates: Requests per second of each expert.
        accelerators: Their number.
        held: Experts that the host memory of one holds.
        costs: The times of an engine.

    Returns:
        The accelerators of each expert.
    """
    step_s = costs.step_s + costs.each_s * costs.capacity
    work = {name: rate * _MEAN_ANSWER * step_s / costs.capacity for name, rate in rates.items()}
    loads = [0.0] * accelerators
    counts = [0] * accelerators
    placed: dict[str, list[int]] = {}
    for name in sorted(work, key=lambda one: (-work[one], one)):
        replicas = min(accelerators, max(1, math.ceil(work[name] / _FULL)))
        order = sorted(range(accelerators), key=lambda i: (counts[i] >= held, loads[i], counts[i]))
        placed[name] = order[:replicas]
        for i in placed[name]:
            loads[i] += work[name] / replicas
            counts[i] += 1
    return placed
