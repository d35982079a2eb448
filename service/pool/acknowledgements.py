"""The last sequence number that a pool has received from each gateway."""

from __future__ import annotations

from collections import OrderedDict

# Every gateway that is started has another id, and each snapshot tells them all.
_MOST = 256


class Acknowledgements:
    """Of the gateways that were heard of last."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()

    def record(self, gateway: str, seq: int) -> None:
        """A call has come; calls may overtake each other."""
        self._last[gateway] = max(seq, self._last.get(gateway, 0))
        self._last.move_to_end(gateway)
        if len(self._last) > _MOST:
            self._last.popitem(last=False)

    def to_wire(self) -> dict[str, int]:
        """By gateway."""
        return dict(self._last)
