"""How long each chunk of a stream took from its writing to its reading. Pure."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from loadtests.lib.load_client import Exchange

_STAMP = re.compile(rb'"content":\s?"(\d{10}\.\d{6})"')


def chunk_delays(exchange: Exchange, chunks: int, from_s: float, to_s: float) -> list[float]:
    """Milliseconds of each chunk that was read in a window, from its writing to its reading.

    Args:
        exchange: A stream of the upstream that stamps its chunks. A chunk that came in several
            pieces counts as read with the piece that holds the end of its stamp.
        chunks: How many it must have.
        from_s: The window's start, of `time.perf_counter`.
        to_s: Its end.

    Raises:
        ValueError: The stream is not whole.
    """
    if (fault := exchange.fault()) is not None:
        raise ValueError(fault)
    body = exchange.body
    ends = list(accumulate(len(part) for part in exchange.parts))
    stamps = list(_STAMP.finditer(body))
    if len(stamps) != chunks:
        raise ValueError(f"{len(stamps)} of {chunks} chunks came")
    delays = []
    for stamp in stamps:
        read_s = exchange.parts_at_s[_part_of(ends, stamp.end(1) - 1)]
        if from_s <= read_s < to_s:
            delays.append((read_s - float(stamp.group(1))) * 1000)
    return delays


def _part_of(ends: Sequence[int], position: int) -> int:
    """The index of the piece that holds a byte, by the pieces' ends."""
    return bisect_right(ends, position)
