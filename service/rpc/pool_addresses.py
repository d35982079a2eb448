"""Registry of the pool addresses that this process knows, by source, with one listener.

Sources may register addresses in another thread than the listener's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.rpc.client import PoolAddress

Listener = Callable[[list[PoolAddress]], None]

_lock = threading.Lock()
_known: dict[str, list[PoolAddress]] = {}
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener` with the whole list, now and after every change, in the changing thread."""
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
