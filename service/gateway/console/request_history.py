"""Metadata of the last requests, for the console. It contains no prompts and no answers."""

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
    """A request that has ended.

    Attributes:
        at_s: When it ended, in seconds since 1970.
        request: The request id that the client knows.
        asked: The model that the client named; of an alias its name in the config.
        category: The prompt's category.
        confidence: The probability of the category.
        recipe: The recipe that answered.
        expert: The expert that answered.
        status: The HTTP status.
        outcome: `ok`, or the kind of failure.
        route_ms: Time of routing.
        queue_ms: Time in the pool's queue.
        swap_ms: Time of swaps.
        first_ms: Time to the first byte; 0 if nothing was sent.
        total_ms: Time to the end.
        cost: The cost of all calls, in the unit of prices.
        prompt_tokens: Tokens of the prompt, of the call that answered.
        completion_tokens: Tokens of its answer.
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
    cost: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, record: RequestRecord) -> CompletedRequest:
        """Convert the record of a request that has ended now."""
        answered = [call for call in record.calls if call.expert == record.expert]
        return cls(
            at_s=round(time.time(), 1),
            request=record.client_id,
            asked=record.model if record.alias is None else record.alias.alias,
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
            cost=float(f"{record.cost:.4g}"),
            prompt_tokens=(answered[-1].prompt_tokens or 0) if answered else 0,
            completion_tokens=(answered[-1].completion_tokens or 0) if answered else 0,
        )


class RequestHistory:
    """Keeps the last requests.

    Args:
        size: The most requests to keep.
    """

    def __init__(self, size: int = 2000) -> None:
        self._kept: deque[CompletedRequest] = deque(maxlen=size)
        self.count = 0

    def add_record(self, record: RequestRecord) -> None:
        """Add a request that has ended now."""
        self.add(CompletedRequest.of(record))

    def add(self, request: CompletedRequest) -> None:
        """Add a request that has ended."""
        self._kept.append(request)
        self.count += 1

    def since(self, count: int, most: int = 50) -> list[dict[str, Any]]:
        """Return the requests after the first `count` of all, oldest first, as JSON.

        Args:
            count: An earlier value of `self.count`.
            most: The most requests to return; the newest have priority.
        """
        new = min(self.count - count, len(self._kept), most)
        return [asdict(self._kept[i]) for i in range(len(self._kept) - new, len(self._kept))]

    def flows(self, now_s: float) -> list[dict[str, Any]]:
        """Count the requests of the last five minutes by category, recipe and expert."""
        counts = Counter(
            (request.category, request.recipe, request.expert)
            for request in self._kept
            if request.expert and now_s - request.at_s <= WINDOW_S
        )
        return [
            {"category": category, "recipe": recipe, "expert": expert, "count": count}
            for (category, recipe, expert), count in sorted(counts.items())
        ]

    def totals(self, now_s: float) -> dict[str, float]:
        """Totals of the last minute: requests, failures, and median ms to the first byte."""
        minute = [request for request in self._kept if now_s - request.at_s <= _MINUTE_S]
        firsts = sorted(
            request.first_ms for request in minute if request.outcome == "ok" and request.first_ms
        )
        return {
            "requests": len(minute),
            "failed": sum(request.outcome not in ("ok", "client_gone") for request in minute),
            "first_ms": firsts[len(firsts) // 2] if firsts else 0.0,
        }
