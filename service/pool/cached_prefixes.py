"""The conversations that a pool's engines have in their prefix caches. Snapshots tell of them.

It is a guess: an engine drops blocks of its cache without a word. So a conversation is forgotten
after a while, when many others came after it, and when its expert leaves the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

_MOST = 1024
_KEEP_S = 600.0


class CachedPrefixes:
    """The conversations that were answered last, each with the expert that answered."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._wire: dict[str, str] | None = None

    def record(self, prefix: str, expert: str, now_s: float) -> None:
        """Record that an expert has answered.

        Args:
            prefix: Digest of the conversation; nothing is recorded if it is empty.
            expert: The expert.
            now_s: The time.
        """
        if not prefix:
            return
        self._known[prefix] = expert, now_s
        self._known.move_to_end(prefix)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        self._wire = None

    def to_wire(self, resident: Collection[str], now_s: float) -> dict[str, str]:
        """Return the expert of each conversation that is still likely to be in a cache.

        Args:
            resident: The experts on the device. The conversations of all others are forgotten.
            now_s: The time.

        Returns:
            The same object as the last time, if nothing has changed.
        """
        while self._known:
            prefix, (_, at_s) = next(iter(self._known.items()))
            if now_s - at_s <= _KEEP_S:
                break
            del self._known[prefix]
            self._wire = None
        if any(expert not in resident for expert, _ in self._known.values()):
            self._known = OrderedDict(
                (prefix, known) for prefix, known in self._known.items() if known[0] in resident
            )
            self._wire = None
        if self._wire is None:
            self._wire = {prefix: expert for prefix, (expert, _) in self._known.items()}
        return self._wire
