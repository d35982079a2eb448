"""The pools known in this process, by where they were heard of; told to one listener.

Whoever hears of pools may do so in another thread than the one that follows them.
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
    """Tell `listener` the whole list now and whenever it changes, in the thread that changes it."""
    with _lock:
        _listeners[:] = [listener]
        _tell()


def put(source: str, addresses: list[PoolAddress]) -> None:
    """These are all the pools that `source` knows."""
    with _lock:
        _known[source] = addresses
        _tell()


def _tell() -> None:
    every = [address for addresses in _known.values() for address in addresses]
    for listener in _listeners:
        listener(every)
