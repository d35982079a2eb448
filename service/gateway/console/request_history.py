"""What was answered lately: metadata of the last requests, never a prompt or an answer."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from service.gateway.request_record import RequestRecord

WINDOW_S = 300.0
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class CompletedRequest:
    """One request that has ended.

    `at_s`: when, in s since the epoch. `asked`: the model that the client named.
    `recipe`: the way of answering that was chosen. Times in ms; `first_ms` is 0 where
    nothing was sent.
    """

    at_s: float
    request: str
    asked: str
    category: str
    confidence: float
    recipe: str
    expert: str
    status: int
    outcome: str
    route_ms: float
    queue_ms: float
    swap_ms: float
    first_ms: float
    total_ms: float

    @classmethod
    def of(cls, record: RequestRecord) -> CompletedRequest:
        """The console's view of a record that is finished."""
        return cls(
            at_s=round(time.time(), 1),
            request=record.client_id,
            asked=record.model,
            category=record.category,
            confidence=round(record.confidence, 3),
            recipe=record.recipe or record.expert,
            expert=record.expert,
            status=record.status,
            outcome=record.fault or record.outcome,
            route_ms=round(record.route_ms, 2),
            queue_ms=round(record.queue_ms, 1),
            swap_ms=round(record.swap_ms, 1),
            first_ms=round(record.first_byte_s * 1000, 1),
            total_ms=round(record.total_s * 1000, 1),
        )


class RequestHistory:
    """The last requests, newest last: `size` of them at most."""

    def __init__(self, size: int = 2000) -> None:
        self._kept: deque[CompletedRequest] = deque(maxlen=size)
        self.count = 0

    def add(self, one: CompletedRequest) -> None:
        """Remember a request that has ended."""
        self._kept.append(one)
        self.count += 1

    def since(self, count: int, most: int = 50) -> list[dict[str, Any]]:
        """Those noted after the first `count`, at most the last `most`, oldest first."""
        new = min(self.count - count, len(self._kept), most)
        return [asdict(self._kept[i]) for i in range(len(self._kept) - new, len(self._kept))]

    def flows(self, now_s: float) -> list[dict[str, Any]]:
        """How many requests went from category over recipe to expert in the last five minutes."""
        counts = Counter(
            (one.category, one.recipe, one.expert)
            for one in self._kept
            if one.expert and now_s - one.at_s <= WINDOW_S
        )
        return [
            {"category": category, "recipe": recipe, "expert": expert, "count": count}
            for (category, recipe, expert), count in sorted(counts.items())
        ]

    def totals(self, now_s: float) -> dict[str, float]:
        """Of the last minute: requests, those that failed, median time to the first byte in ms."""
        minute = [one for one in self._kept if now_s - one.at_s <= _MINUTE_S]
        firsts = sorted(one.first_ms for one in minute if one.outcome == "ok" and one.first_ms)
        return {
            "requests": len(minute),
            "failed": sum(one.outcome not in ("ok", "client_gone") for one in minute),
            "first_ms": firsts[len(firsts) // 2] if firsts else 0.0,
        }
