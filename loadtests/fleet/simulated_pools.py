"""The pools of a simulated fleet: the service's own pools around modelled engines.

A pool that a gateway talks to is a process of its own in the service. Here it is an object: calls
and snapshot lines reach it without a network, and a node that dies takes its pools with it without
a word, as a host without power does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

from loadtests.fleet.cpu_sections import CpuSections
from loadtests.fleet.modelled_engine import EngineCosts, FirstToken, ModelledEngine
from service.engine.engine_interface import Message, SwappingEngine
from service.errors import PoolUnavailableError, PoolUnreachableError
from service.pool.pool import Pool
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.rpc.call_headers import Call
from service.rpc.pool_link import PoolAddress, PoolLink
from service.rpc.snapshot import GONE_S, Snapshot, decode

_CONNECT_TIMEOUT_S = 2.0
_MOST_WAITING = 256


class SimulatedPool:
    """One accelerator with its pool.

    Args:
        kind: The kind of the pool.
        boot: Its id.
        experts: The experts of the kind, in the config's order.
        costs: The times of its engine.
        policy: How it weighs its units.
        firsts: By request id, where engines write the time of the first token.
    """

    def __init__(
        self,
        kind: str,
        boot: str,
        experts: Sequence[str],
        costs: EngineCosts,
        policy: SwapPolicy,
        firsts: dict[str, FirstToken],
    ) -> None:
        self.pool = Pool(kind)
        # Not a random one, so that a run can be repeated.
        self.pool.boot = self.boot = boot
        self.dead = False
        self.engines: list[ModelledEngine] = []
        self._calls: set[asyncio.Task[Any]] = set()

        def build(_unit: str) -> SwappingEngine:
            self.engines.append(ModelledEngine(experts, costs, firsts))
            return self.engines[-1]

        self.slot = SharedSlot(
            tuple(Unit(name, (name,), size_bytes=costs.unit_bytes) for name in experts),
            build,
            policy,
            capacity=costs.capacity,
            max_waiting=_MOST_WAITING,
            start_guess_s=max(costs.start_s, 1.0),
            guess=UnitState(costs.unit_bytes, fill_s=costs.fill_s, swap_s=costs.swap_s),
            changed=self.pool.changed,
        )
        self.pool.add(self.slot)
        self.pool.start()
        self.address = PoolAddress(f"http://{boot}:80", kind, boot)

    @property
    def switches(self) -> int:
        """Swaps so far."""
        return sum(self.pool.swap_counts().values())

    @property
    def in_flight(self) -> int:
        """Calls that wait or run."""
        return len(self._calls)

    async def run(self, call: Call, body: bytes) -> bytes:
        """Run a call, and return the body of its answer.

        Raises:
            CoeError: The pool refused it.
            asyncio.CancelledError: The pool died.
        """
        answer = b""

        async def send(message: Message) -> None:
            nonlocal answer
            answer = message.get("body", b"")

        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            await self.pool.run(call, body, send)
        finally:
            self._calls.discard(task)
        return answer

    async def kill(self) -> None:
        """Die at once, without a word to anybody."""
        self.dead = True
        for engine in self.engines:
            engine.kill("the node died")
        for task in self._calls:
            task.cancel()
        await self.pool.stop(0)

    async def stop(self, drain_s: float) -> None:
        """Drain, and end: a replica that a rolling update replaces."""
        await self.pool.stop(drain_s)
        self.dead = True


class _Connections:
    """Stands for the connections of a link: it lets the calls of a silent pool fail."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def abort_calls(self) -> None:
        """Let calls that wait for a dead pool fail."""
        self.lost.set()

    def close(self) -> None:
        """Do the same."""
        self.lost.set()


class SimulatedLink(PoolLink):
    """The service's link to a pool, without the network in between.

    Args:
        pools: The pools, by boot id.
        cpu: Counts the processor time of taking over snapshots.
        args: The arguments of `PoolLink`.
    """

    def __init__(self, pools: Mapping[str, SimulatedPool], cpu: CpuSections, *args: Any) -> None:
        super().__init__(*args)
        self._pools = pools
        self._cpu = cpu
        self._connections: Any = _Connections()

    async def exchange(self, call: Call, body: bytes) -> bytes:
        """Send a call, and return the answer.

        Raises:
            PoolUnreachableError: The pool's host does not answer.
            PoolUnavailableError: The pool died with the call.
            CoeError: The pool refused the call.
        """
        pool = self._pools[self.address.boot]
        self._calls += 1
        self._unused.clear()
        try:
            if pool.dead:
                await asyncio.sleep(_CONNECT_TIMEOUT_S)
                raise PoolUnreachableError("the pool's host does not answer")
            return await pool.run(call, body)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if not pool.dead or task.uncancel():
                raise
            # Nothing closes the connection: the link gives the pool up after a while.
            await self._connections.lost.wait()
            raise PoolUnavailableError("the pool went away with the call") from None
        finally:
            self._unseen.pop(call.seq, None)
            self._calls -= 1
            if not self._calls:
                self._unused.set()

    async def demand(self, wanted: dict[str, float]) -> None:
        pool = self._pools[self.address.boot]
        if pool.dead:
            raise PoolUnavailableError("the pool can't be reached")
        pool.pool.demand(orjson.loads(orjson.dumps(wanted)))

    async def _read_snapshots(self) -> None:
        pool = self._pools[self.address.boot]
        snapshot: Snapshot | None = None
        async for line in _lines(pool):
            with self._cpu.of("snapshots taken over"):
                snapshot, delta = decode(line, snapshot)
                self.receive_snapshot(snapshot, delta)
        await asyncio.sleep(GONE_S)
        raise aiohttp.ClientError("the pool is silent")


async def _lines(pool: SimulatedPool) -> AsyncIterator[bytes]:
    if pool.dead:
        return
    async for line in pool.pool.snapshots():
        if pool.dead:
            return
        yield line
