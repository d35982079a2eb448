"""The console's stream of events. All listeners share one stream.

The stream collects data only while it has listeners. The first event is `hello`, with the config
and recent requests. Then follow `state`, at most twice a second, and `routes`, when requests end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson

from service import __version__
from service.batches.batch_state import BatchStatistics
from service.broker.pool_state import PoolView
from service.broker.savings import SavingsTotal
from service.config import Config
from service.errors import CoeError, OverCapacityError, PoolUnavailableError
from service.gateway.console.expert_views import describe_experts, describe_pools
from service.gateway.console.request_history import RequestHistory
from service.rpc.pool_directory import PoolDirectory
from service.rpc.pool_link import PoolLink

log = logging.getLogger("coe.api")

_TICK_S = 0.5
_BEAT_S = 3.0
_MOST_LISTENERS = 64
# A listener that does not read loses its oldest events. The next `state` event is complete anyway.
_MOST_QUEUED = 16
# Number of points in the console's graphs.
HISTORY = 240
# Rates are averages over this many seconds, because the rate of one second varies with the batch.
_OVER = 4
# Maximum length of a stream. A stopping gateway must not wait for it. With local pools the stream
# ends as soon as they drain; a gateway without pools uses the short maximum instead.
_LONGEST_S = 600.0
_LONGEST_ALONE_S = 10.0


class EventStream:
    """Collects the console's data, and sends it to all listeners.

    Args:
        config: The config.
        directory: Links to pools.
        views: Returns the state of every pool.
        remotes: Returns the error of each remote expert; None for a working expert.
        in_flight: Returns the number of requests in flight.
        recent: The last requests.
        budgets: Returns (name, shadow price, share that is left) of each budget.
        history: The points of the graphs, at most `HISTORY`. They outlive a config.
        routing: What `auto` chooses at which price (`Frontier.to_json`); None without a router.
        savings: What requests saved, by baseline.
        aliases: Returns the aliases that share requests (`AliasTraffic.to_json`).
        batches: Counts the batches of all tenants that have not ended; None where the service has
            no batches.
    """

    def __init__(
        self,
        config: Config,
        directory: PoolDirectory,
        views: Callable[[], list[PoolView]],
        remotes: Callable[[], dict[str, str | None]],
        in_flight: Callable[[], float],
        recent: RequestHistory,
        budgets: Callable[[], list[tuple[str, float, float]]],
        history: deque[dict[str, Any]],
        savings: Mapping[str, SavingsTotal],
        routing: Mapping[str, Any] | None = None,
        aliases: Callable[[], Mapping[str, Any]] = dict,
        batches: Callable[[], Awaitable[BatchStatistics]] | None = None,
    ) -> None:
        self._config = config
        self._batches = batches
        # What the page needs to see that there is news: it reads its tenant's batches itself.
        none: dict[str, Any] = {"states": {}, "lines": 0}
        self._open_batches = None if batches is None else none
        self._aliases = aliases
        self._routing = routing
        self._budgets = budgets
        self._directory = directory
        self._views = views
        self._remotes = remotes
        self._in_flight = in_flight
        self._recent = recent
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._details: dict[str, dict[str, dict[str, Any]]] = {}
        self._gpus: dict[str, list[dict[str, Any]]] = {}
        self._rates: dict[tuple[str, str], float] = {}
        self._counted: deque[tuple[float, dict[tuple[str, str], int]]] = deque(maxlen=_OVER)
        self._history = history
        self._savings = savings

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events.

        Raises:
            OverCapacityError: There are too many listeners.
        """
        if len(self._listeners) >= _MOST_LISTENERS:
            raise OverCapacityError(f"{_MOST_LISTENERS} consoles listen to this gateway already")
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_QUEUED)
        longest_s = _LONGEST_S if self._config.pools else _LONGEST_ALONE_S
        end_s = time.monotonic() + longest_s
        self._listeners.add(queue)
        try:
            yield b"retry: 500\n\n" + _event("hello", self._hello())
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._gather())
            while time.monotonic() < end_s:
                data = await queue.get()
                if data is None:
                    return
                yield data
        finally:
            self._listeners.discard(queue)

    async def close(self) -> None:
        """Close every stream."""
        self._tell(None)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def state(self) -> dict[str, Any]:
        """The current state, as JSON."""
        now_s = time.time()
        pools = describe_pools(self._views(), self._details, self._rates, self._gpus)
        remotes = {
            name: {"state": "failed", "reason": why} if why else {"state": "device"}
            for name, why in self._remotes().items()
        }
        return {
            "at_s": round(now_s, 1),
            "in_flight": int(self._in_flight()),
            "pools": pools,
            "remotes": remotes,
            "budgets": [
                {"name": name, "price": price, "left": round(left, 4)}
                for name, price, left in self._budgets()
            ],
            "savings": [
                {"against": name, **total.to_json()} for name, total in self._savings.items()
            ],
            "aliases": self._aliases(),
            "batches": self._open_batches,
            "totals": self._recent.totals(now_s),
            "flows": self._recent.flows(now_s),
        }

    def _hello(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "gateway": self._directory.gateway,
            "experts": describe_experts(self._config),
            "routing": self._routing,
            "cost_unit": self._config.prices.unit,
            "categories": sorted(self._config.category_map()),
            "routes": self._recent.since(0),
            "history": list(self._history),
            "state": self.state(),
        }

    async def _gather(self) -> None:
        """Send changes while there are listeners."""
        try:
            await self._follow()
        except Exception:
            # Otherwise listeners would wait for ever. A page reconnects when its stream ends.
            log.exception("console event stream failed")
            self._tell(None)

    async def _follow(self) -> None:
        sent = b""
        sent_s = counted_s = 0.0
        seen = self._recent.count
        self._counted.clear()
        while self._listeners:
            now_s = time.monotonic()
            if now_s - counted_s >= 1.0:
                counted_s = now_s
                await self._count(now_s)
            state = self.state()
            if _over(state["pools"]):
                self._tell(None)
                return
            if self._recent.count > seen:
                self._tell(_event("routes", {"routes": self._recent.since(seen)}))
                seen = self._recent.count
            # The time is left out of the comparison, because it always changes.
            data = orjson.dumps({**state, "at_s": 0})
            if data != sent or now_s - sent_s >= _BEAT_S:
                sent, sent_s = data, now_s
                self._tell(_event("state", state))
            await asyncio.sleep(_TICK_S)

    async def _count(self, now_s: float) -> None:
        """Fetch details from every pool, and compute token rates from its counters."""
        links = self._directory.links()
        replies = await asyncio.gather(*(link.experts() for link in links), return_exceptions=True)
        details = {}
        for link, reply in zip(links, replies, strict=True):
            if isinstance(reply, dict):
                details[link.address.boot] = reply
            elif not isinstance(reply, PoolUnavailableError):
                raise reply
        self._details = details
        self._gpus = await self._gpus_of(links)
        await self._count_batches()
        counted = {
            (boot, name): int(expert.get("tokens", 0))
            for boot, experts in details.items()
            for name, expert in experts.items()
        }
        before_s, before = self._counted[0] if self._counted else (now_s, counted)
        self._counted.append((now_s, counted))
        by_expert: dict[str, float] = {}
        self._rates = {}
        for key, tokens in counted.items():
            made = tokens - before.get(key, tokens)
            rate = made / (now_s - before_s) if now_s > before_s else 0.0
            self._rates[key] = rate
            by_expert[key[1]] = round(by_expert.get(key[1], 0.0) + rate, 1)
        self._history.append({"at_s": round(time.time(), 1), "tokens_per_s": by_expert})

    async def _count_batches(self) -> None:
        if self._batches is None:
            return
        # While their state is away, the page keeps what it has.
        with contextlib.suppress(CoeError):
            counted = await self._batches()
            self._open_batches = {"states": dict(counted.by_status), "lines": counted.lines}

    async def _gpus_of(self, links: Sequence[PoolLink]) -> dict[str, list[dict[str, Any]]]:
        """Fetch the memory of GPUs from the pools that have any, by boot id."""
        pools = self._config.pools
        asked = [
            link
            for link in links
            if (pool := pools.get(link.address.kind)) is not None and pool.gpus > 0
        ]
        replies = await asyncio.gather(*(link.gpus() for link in asked), return_exceptions=True)
        found = {}
        for link, reply in zip(asked, replies, strict=True):
            if isinstance(reply, list):
                found[link.address.boot] = reply
            elif not isinstance(reply, PoolUnavailableError):
                raise reply
        return found

    def _tell(self, data: bytes | None) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(data)


def _over(pools: list[dict[str, Any]]) -> bool:
    """Whether every local pool drains. Streams must then end, so that the gateway can stop."""
    local = [pool for pool in pools if pool["boot"] is not None]
    return bool(local) and all(pool["draining"] for pool in local)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
