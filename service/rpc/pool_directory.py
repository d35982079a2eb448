"""The pools that a gateway knows, with a link to each."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import aiohttp

from service.errors import PoolUnreachableError, UnknownModelError
from service.rpc.pool_link import PoolAddress, PoolLink, SnapshotListener, new_session
from service.rpc.snapshot import GONE_S, Snapshot, SnapshotDelta

_MOST_POOLS = 64
# Pools of each kind that a gateway follows at least, as far as there are so many. The kinds have
# different experts, and a kind of which no pool is followed could not be asked at all.
_LEAST_OF_KIND = 4


def followed_subset(gateway: str, addresses: list[PoolAddress]) -> list[PoolAddress]:
    """The pools that a gateway follows: all of them, or 64 that a rendezvous hash selects.

    Of each kind there are at least four, if the kind has so many. With many kinds there may be more
    than 64 in all.
    """
    if len(addresses) <= _MOST_POOLS:
        return addresses

    def weight(address: PoolAddress) -> bytes:
        return hashlib.blake2b(f"{gateway}\0{address.boot}".encode()).digest()

    ranked = sorted(addresses, key=weight, reverse=True)
    of_kind: Counter[str] = Counter()
    sure: list[PoolAddress] = []
    others: list[PoolAddress] = []
    for address in ranked:
        of_kind[address.kind] += 1
        (sure if of_kind[address.kind] <= _LEAST_OF_KIND else others).append(address)
    return sure + others[: max(0, _MOST_POOLS - len(sure))]


class PoolDirectory:
    """Links to the pools that exist now.

    If there are more than 64 pools, a gateway follows a stable subset of them, which has pools of
    every kind. A rendezvous hash of the gateway's id and the pool's id selects it.

    Args:
        gateway: This gateway's id.
        secret: The cluster's secret.
        make_link: Makes the link to a pool, with the arguments of `PoolLink`.
    """

    def __init__(
        self, gateway: str, secret: str, make_link: Callable[..., PoolLink] = PoolLink
    ) -> None:
        self.gateway = gateway
        self._secret = secret
        self._make_link = make_link
        self._session: aiohttp.ClientSession | None = None
        # By boot id. Also pools that have sent no snapshot yet, or not for a while.
        self.followed: dict[str, PoolLink] = {}
        # Links to former pools that still have open calls.
        self._leaving: dict[PoolLink, asyncio.Task[None]] = {}
        self._waiters: set[asyncio.Event] = set()
        self._listeners: set[SnapshotListener] = set()
        # The greatest context of each expert over all pools; None if it has to be computed again.
        self._contexts: dict[str, int] | None = None

    def update(self, addresses: Iterable[PoolAddress]) -> None:
        """Follow exactly these pools. The call must happen in the event loop's thread."""
        wanted = {
            address.boot: address for address in followed_subset(self.gateway, list(addresses))
        }
        if self._session is None:
            self._session = new_session()
        for boot in [boot for boot in self.followed if boot not in wanted]:
            link = self.followed.pop(boot)
            self._leaving[link] = asyncio.create_task(self._disconnect(link))
        for boot in [boot for boot in wanted if boot not in self.followed]:
            self.followed[boot] = self._make_link(
                wanted[boot],
                self._session,
                self._secret,
                self.gateway,
                self._changed,
                self._forget_contexts,
                self._received,
            )
        self._forget_contexts()
        self._changed()

    def listen(self, listener: SnapshotListener) -> Callable[[], None]:
        """Call `listener` with each snapshot of each pool.

        Returns:
            A function that ends this.
        """
        self._listeners.add(listener)
        return partial(self._listeners.discard, listener)

    def _received(self, boot: str, snapshot: Snapshot, delta: SnapshotDelta | None) -> None:
        for listener in self._listeners:
            listener(boot, snapshot, delta)

    async def _disconnect(self, link: PoolLink) -> None:
        await link.unused()
        await link.close()
        del self._leaving[link]

    def links(self) -> list[PoolLink]:
        """Links to pools whose last snapshot is at most 3 s old."""
        now_s = time.monotonic()
        return [link for link in self.followed.values() if link.age_s(now_s) <= GONE_S]

    def link(self, boot: str) -> PoolLink:
        """Return the link to a pool.

        Raises:
            PoolUnreachableError: The pool is unknown, or has sent no snapshot for 3 s.
        """
        link = self.followed.get(boot)
        if link is None or link.age_s(time.monotonic()) > GONE_S:
            raise PoolUnreachableError("the pool can't be reached any more")
        return link

    def holding(self, expert: str) -> list[PoolLink]:
        """Return the links to pools that have an expert, in any state.

        Raises:
            UnknownModelError: No pool has the expert.
        """
        found = [
            link
            for link in self.links()
            if link.snapshot is not None and expert in link.snapshot.experts
        ]
        if not found:
            raise UnknownModelError(f"no running pool holds an expert {expert[:128]!r}")
        return found

    def context(self, expert: str) -> int:
        """The greatest context of an expert in any pool, in tokens; 0 if it is unknown.

        The contexts of all experts are cached until a pool tells of others.
        """
        if self._contexts is None:
            self._contexts = {}
            for link in self.followed.values():
                states = link.snapshot.experts if link.snapshot is not None else {}
                for name, state in states.items():
                    known = self._contexts.get(name, 0)
                    self._contexts[name] = max(known, state.max_model_len)
        return self._contexts.get(expert, 0)

    def _forget_contexts(self) -> None:
        self._contexts = None

    def silences(self) -> dict[str, float]:
        """Seconds since each pool's last snapshot, by the pool's name. Includes silent pools."""
        now_s = time.monotonic()
        return {link.address.name: link.silent_s(now_s) for link in self.followed.values()}

    def _changed(self) -> None:
        for waiter in self._waiters:
            waiter.set()

    async def change(self, timeout_s: float) -> None:
        """Wait until any snapshot changes, but at most `timeout_s` seconds."""
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            # On Python 3.11, `wait_for` may swallow a cancellation, so that a request would go on
            # after its client has disconnected. `timeout` does not.
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await waiter.wait()
        finally:
            self._waiters.discard(waiter)

    async def close(self) -> None:
        """Stop following all pools, and close their connections."""
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        links = [*self.followed.values(), *self._leaving]
        await asyncio.gather(*(link.close() for link in links))
        self.followed.clear()
        self._leaving.clear()
        if self._session is not None:
            await self._session.close()
