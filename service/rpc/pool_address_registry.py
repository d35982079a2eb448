"""Registry of the pool addresses that this process knows, with a single listener.

Each source registers its own addresses, possibly in another thread than that of the listener.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.rpc.pool_link import PoolAddress

Listener = Callable[[list[PoolAddress]], None]

_lock = threading.Lock()
_known: dict[str, list[PoolAddress]] = {}
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener` with all addresses, now and after every change.

    After a change, the call happens in the thread that made the change.
    """
    with _lock:
        _listeners[:] = [listener]
        _notify()


def put(source: str, addresses: list[PoolAddress]) -> None:
    """Replace the addresses of one source."""
    with _lock:
        _known[source] = addresses
        _notify()


def _notify() -> None:
    every = [address for addresses in _known.values() for address in addresses]
    for listener in _listeners:
        listener(every)
