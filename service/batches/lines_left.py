"""The lines of a batch that have not started yet, by model. No I/O.

A new plan of them is made while others start. It is taken over whole, and the lines that have
started meanwhile are left out as they come up. So the event loop does the same little work for a
large batch as for a small one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from service.batches.batch_types import LineChoice


class LinesLeft:
    """Hands out the lines of a plan in its order.

    Args:
        choices: The plan, in the order in which to run its lines.
        done: Lines that have a result.
    """

    def __init__(self, choices: Iterable[LineChoice], done: Collection[int] = ()) -> None:
        self._by_model = by_model(choice for choice in choices if choice.line not in done)
        self._started: set[int] = set()
        self._under_way = 0.0

    @property
    def under_way_cost(self) -> float:
        """What is expected of the lines that have started and not ended, in units of cost."""
        return self._under_way

    @property
    def models(self) -> list[str]:
        """The models with lines that are left, in the order of the plan."""
        for model in list(self._by_model):
            self._drop_started(model)
        return list(self._by_model)

    def snapshot(self) -> list[list[LineChoice]]:
        """The lines that are left, by model in the order of the plan.

        Lines that started while a plan was made stand anywhere in it. What they cost is under way
        or spent already.
        """
        left = (
            [choice for choice in lines if choice.line not in self._started]
            for lines in self._by_model.values()
        )
        return [lines for lines in left if lines]

    def take(self, model: str) -> LineChoice | None:
        """Start the next line of a model; None where it has none any more."""
        self._drop_started(model)
        if model not in self._by_model:
            return None
        choice = self._by_model[model].popleft()
        self._started.add(choice.line)
        self._under_way += choice.cost
        self._drop_started(model)
        return choice

    def ended(self, choice: LineChoice) -> None:
        """Count a line as no longer under way."""
        self._under_way = max(0.0, self._under_way - choice.cost)

    def exchange(self, planned: dict[str, deque[LineChoice]]) -> set[int]:
        """Take over a new plan, of the lines of a snapshot.

        Returns:
            The lines that have started before, and keep their choices.
        """
        self._by_model = planned
        return set(self._started)

    def _drop_started(self, model: str) -> None:
        lines = self._by_model.get(model)
        while lines and lines[0].line in self._started:
            lines.popleft()
        if lines is not None and not lines:
            del self._by_model[model]


def by_model(choices: Iterable[LineChoice]) -> dict[str, deque[LineChoice]]:
    """Group lines by model. Models and the lines of each keep their order."""
    found: dict[str, deque[LineChoice]] = {}
    for choice in choices:
        found.setdefault(choice.model, deque()).append(choice)
    return found
