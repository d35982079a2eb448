"""Refuses replies of other servers that are nested deeper than the service can write again."""

from __future__ import annotations

import orjson

from service.errors import UpstreamError

MOST_LEVELS = 254
"""Levels that orjson writes. It reads 1024, so that a reply may be read and never sent on."""


def check_reply(body: bytes, expert: str) -> None:
    """Check a whole reply, or one value of JSON; a body that is no JSON passes.

    Args:
        body: The reply.
        expert: The name of the expert whose server sent it, for the error.

    Raises:
        UpstreamError: It is nested too deep.
    """
    # Most replies have fewer brackets than levels are allowed, and need no second look.
    if body.count(b"[") + body.count(b"{") <= MOST_LEVELS:
        return
    try:
        orjson.dumps(orjson.loads(body))
    except orjson.JSONDecodeError:
        return
    except orjson.JSONEncodeError:
        raise _too_deep(expert) from None


def check_events(lines: bytes, expert: str) -> None:
    """Check whole lines of a stream of events.

    Args:
        lines: The lines.
        expert: The name of the expert whose server sent them, for the error.

    Raises:
        UpstreamError: An event is nested too deep.
    """
    if lines.count(b"[") + lines.count(b"{") <= MOST_LEVELS:
        return
    for line in lines.splitlines():
        if line.startswith(b"data:"):
            check_reply(line[5:], expert)


def _too_deep(expert: str) -> UpstreamError:
    return UpstreamError(
        f"expert {expert!r}: its endpoint's reply is nested more than {MOST_LEVELS} levels deep"
    )
