"""The last calls that a pool got from each gateway. Its snapshots acknowledge their numbers."""

from __future__ import annotations

from collections import OrderedDict

# A gateway gets a new id at each start, and every snapshot carries all ids. Hence the bound.
_MOST_GATEWAYS = 256


class Acknowledgements:
    """The last sequence numbers of the gateways that called most recently."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()

    def record(self, gateway: str, seq: int) -> None:
        """Record a call's number. A lower number is ignored, because calls may overtake."""
        self._last[gateway] = max(seq, self._last.get(gateway, 0))
        self._last.move_to_end(gateway)
        if len(self._last) > _MOST_GATEWAYS:
            self._last.popitem(last=False)

    def to_wire(self) -> dict[str, int]:
        """Return the last sequence number of each gateway, by gateway id."""
        return dict(self._last)
