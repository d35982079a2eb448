"""The time windows of limits. Pure. Times are in ms since 1970 (UTC)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Window:
    """The window that a limit counts over.

    Attributes:
        kind: A `sliding` window covers the last `length_ms` in `parts` equal parts, and its oldest
            part counts as a whole. `fixed` windows follow each other since 1970. `day` and `month`
            follow the calendar in UTC. `now` counts only open claims.
        length_ms: The length of a sliding or fixed window.
        parts: The number of parts of a sliding window.
    """

    kind: str
    length_ms: int = 0
    parts: int = 1

    @property
    def part_ms(self) -> int:
        """The length of one part of a sliding window in ms."""
        return self.length_ms // self.parts

    def span(self, now_ms: int) -> tuple[int, int]:
        """Return start and end of the window with `now_ms`, or of its part in a sliding window."""
        if self.kind == "day":
            start = now_ms - now_ms % _DAY_MS
            return start, start + _DAY_MS
        if self.kind == "month":
            first = datetime.fromtimestamp(now_ms / 1000, UTC).replace(
                day=1, hour=0, minute=0, second=0, microsecond=0
            )
            following = (first + timedelta(days=32)).replace(day=1)
            return int(first.timestamp()) * 1000, int(following.timestamp()) * 1000
        if self.kind == "now":
            return 0, 0
        length_ms = self.part_ms if self.kind == "sliding" else self.length_ms
        start = now_ms - now_ms % length_ms
        return start, start + length_ms

    def spans(self, now_ms: int) -> tuple[tuple[int, int], ...]:
        """Return the windows before, at and after `now_ms`, because clocks may differ a little."""
        start, end = self.span(now_ms)
        return self.span(start - 1), (start, end), self.span(end)


MINUTE = Window("sliding", 60_000, 60)
DAY = Window("day")
MONTH = Window("month")
NOW = Window("now")


def fixed(window_s: int) -> Window:
    """Return consecutive windows of this length since 1970."""
    return Window("fixed", window_s * 1000)
