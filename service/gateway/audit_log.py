"""The audit log: one line for each change by the admin, and for each refused key.

Its logger is `coe.audit`. Its lines name keys by their public ids, and never hold a key, a prompt
or an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("coe.audit")

# Each reason may log this many lines at once and one more each second, so that a flood of
# requests can't fill the disk.
_BURST = 20.0
_PER_S = 1.0
_LONGEST = 64


class RefusalLog:
    """Logs refused keys, at a bounded rate. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By reason: the lines allowed, the time of that count, and the lines that were dropped.
        self._allowance: dict[str, tuple[float, float, int]] = {}

    def refused(
        self, reason: str, headers: Mapping[bytes, bytes], *, key: str = "", tenant: str = ""
    ) -> None:
        """Log a request without a valid key. `key` is its id, where it is known."""
        now_s = self._clock()
        left, before_s, unsaid = self._allowance.get(reason, (_BURST, now_s, 0))
        left = min(_BURST, left + (now_s - before_s) * _PER_S)
        if left < 1:
            self._allowance[reason] = (left, now_s, unsaid + 1)
            return
        self._allowance[reason] = (left - 1, now_s, 0)
        fields: dict[str, object] = {"reason": reason}
        fields |= {"key": key, "tenant": tenant} if key else {}
        if given := _text(headers.get(b"x-request-id", b"")):
            fields["request_id"] = given
        if given := _text(headers.get(b"x-forwarded-for", b"")):
            fields["client"] = given
        if unsaid:
            fields["unsaid"] = unsaid
        log.warning("a key was refused", extra=fields)


REFUSALS = RefusalLog()


def acted(act: str, outcome: str, details: Mapping[str, object]) -> None:
    """Log an act of the admin, successful or not. `act` is its method and path."""
    log.info("the admin acted", extra={"act": act, "outcome": outcome, **details})


def _text(value: bytes) -> str:
    """A header's value shortened for the log; empty where it is not printable ASCII."""
    text = value[:_LONGEST].decode("latin-1")
    return text if text.isascii() and text.isprintable() else ""
