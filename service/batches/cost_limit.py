"""What the lines of a batch may still cost of its `max_cost`. No I/O.

Each line under way has a part of what is left, and may cost no more than its part. All parts
together are within what is left. So the batch never costs more, whatever the lengths of its
answers.
"""

from __future__ import annotations

import math

# A line may cost this many times what is expected of it, or this part of what is left, whichever
# is more: few answers are cut, and those only near the end of the budget.
_OF_EXPECTED = 4.0
_OF_LEFT = 64.0


class CostLimit:
    """Divides what is left of a batch's `max_cost` among the lines under way.

    Another gateway may have run the batch before, and its last results may come late. So what the
    state has counted is looked at again and again.

    Args:
        most: The most that all lines may cost together, in units of cost; None for no bound.
        spent: What the state has counted so far, in units of cost.
    """

    def __init__(self, most: float | None, spent: float = 0.0) -> None:
        self._most = math.inf if most is None else most
        self._before = spent
        # By line. They are added up anew each time: a running sum would not come back to 0.
        self._parts: dict[int, float] = {}
        self._storing: dict[int, float] = {}
        # What this gateway's results have cost, and others' since it began.
        self._own = 0.0
        self._others = 0.0

    @property
    def spent(self) -> float:
        """What all results so far have cost."""
        return self._before + self._own + self._others

    @property
    def under_way(self) -> float:
        """The most that the lines under way may cost together."""
        return sum(self._parts.values())

    @property
    def is_final(self) -> bool:
        """Whether no line under way can give anything back."""
        return not self._parts

    def reserve(self, line: int, expected: float) -> float | None:
        """Reserve a line's part.

        Args:
            line: The line's number.
            expected: What is expected of it.

        Returns:
            The most that the line may cost, infinite without a bound; None where too little is left
            now.
        """
        if math.isinf(self._most):
            return math.inf
        left = self._most - self.spent - self.under_way
        needed = _OF_EXPECTED * expected if self._parts else expected
        if left <= 0 or needed > left * (1 + 1e-9):
            return None
        part = min(left, max(_OF_EXPECTED * expected, left / _OF_LEFT))
        self._parts[line] = part
        return part

    def give_back(self, line: int) -> None:
        """Free the part of a line that has ended."""
        self._parts.pop(line, None)

    def begin_to_store(self, line: int, cost: float) -> None:
        """Note that the state may count a line's result from now on."""
        self._storing[line] = cost

    def end_to_store(self, line: int, *, counts: bool) -> None:
        """Note whether the state has counted that result."""
        cost = self._storing.pop(line, 0.0)
        if counts:
            self._own += cost

    def observe(self, total: float) -> None:
        """Learn what the state has counted of all results."""
        others = total - self._before - self._own - sum(self._storing.values())
        self._others = max(self._others, others)
