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

    Args:
        most: The most that all lines may cost together, in units of cost; None for no bound.
        spent: What the lines with a result have cost, in units of cost.
    """

    def __init__(self, most: float | None, spent: float = 0.0) -> None:
        self._most = math.inf if most is None else most
        self.spent = spent
        # By line. They are added up anew each time: a running sum would not come back to 0.
        self._parts: dict[int, float] = {}

    @property
    def under_way(self) -> float:
        """The most that the lines under way may cost together."""
        return sum(self._parts.values())

    @property
    def is_final(self) -> bool:
        """Whether no line under way can give anything back."""
        return not self._parts

    def reserve(self, line: int, expected: float, least: float = 0.0) -> float | None:
        """Reserve a line's part.

        Args:
            line: The line's number.
            expected: What is expected of it.
            least: With less it would be refused, whatever it costs in the end.

        Returns:
            The most that the line may cost, infinite without a bound; None where too little is left
            now.
        """
        if math.isinf(self._most):
            return math.inf
        left = self._most - self.spent - self.under_way
        enough = least + _OF_EXPECTED * expected
        needed = enough if self._parts else max(least, expected)
        if left <= 0 or needed > left * (1 + 1e-9):
            return None
        part = min(left, max(enough, left / _OF_LEFT))
        self._parts[line] = part
        return part

    def give_back(self, line: int) -> None:
        """Free the part of a line that has ended."""
        self._parts.pop(line, None)
