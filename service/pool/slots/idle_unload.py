"""When experts that nobody asks for give their memory back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Keep = Literal["host", "disk"]

# Reasons of an unload, as metrics name them.
IDLE, UNLOAD, RELEASE = "idle", "unload", "release"
# Unmet demand that brings an unloaded expert back: that of one request that it would have won
# by all of the quality.
WAKING_DEMAND = 1.0


@dataclass(frozen=True, slots=True)
class IdlePolicy:
    """The settings by which the experts of a slot are unloaded.

    Attributes:
        limits_s: By expert, seconds without a request after which it is unloaded; 0 or absent:
            never.
        keep: Where weights stay: in host memory if the engine can sleep, or only on disk. None
            means host memory if the engine can sleep.
    """

    limits_s: Mapping[str, float] = field(default_factory=dict)
    keep: Keep | None = None

    def is_due(self, experts: Iterable[str], used_s: Mapping[str, float], now_s: float) -> bool:
        """Return whether all of these experts have been idle for as long as they may.

        Args:
            experts: The experts whose weights can only be unloaded together.
            used_s: When each expert was asked or became ready last; absent: it was not yet.
            now_s: The present time.
        """
        names = list(experts)
        return bool(names) and all(
            0 < self.limits_s.get(name, 0.0) <= now_s - used_s.get(name, now_s) for name in names
        )


def longest_limit(limits_s: Iterable[float]) -> float:
    """The limit of weights that several names share: the longest, and 0 (never) before any."""
    given = list(limits_s)
    return 0.0 if not given or 0.0 in given else max(given)
