"""Who did what: one log line for each act of the admin, and for each key that was refused.

They are lines of the logger `coe.audit`, JSON like the rest of the log. They name keys by their
public ids, and never hold a key, a prompt or an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("coe.audit")

# Of each reason so many lines at once, and one more each second: who floods us fills no disk.
_BURST = 20.0
_PER_S = 1.0
_LONGEST = 64


class RefusalLog:
    """Writes down refused keys. `clock`: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By reason: lines that may be written now, when that was, and how many were not.
        self._allowance: dict[str, tuple[float, float, int]] = {}

    def refused(
        self, reason: str, headers: Mapping[bytes, bytes], *, key: str = "", tenant: str = ""
    ) -> None:
        """A request showed no key, or one that is not good. `key`: its id, where it is known."""
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
    """The admin did something, or tried to. `act`: method and path."""
    log.info("the admin acted", extra={"act": act, "outcome": outcome, **details})


def _text(value: bytes) -> str:
    """A header's value as it may stand in a log: short and printable, else nothing."""
    text = value[:_LONGEST].decode("latin-1")
    return text if text.isascii() and text.isprintable() else ""
