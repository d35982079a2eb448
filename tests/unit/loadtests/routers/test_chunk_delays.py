"""Delays of chunks, however the bytes were cut on their way."""

from __future__ import annotations

import pytest

from loadtests.lib.load_client import Exchange
from loadtests.routers.chunk_delays import chunk_delays

_END = b"data: [DONE]\n\n"


def _event(at_s: float) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%017.6f"}}]}\n\n' % at_s


def _stream(parts: list[tuple[bytes, float]]) -> Exchange:
    return Exchange(
        0.0,
        status=200,
        parts=[part for part, _ in parts],
        parts_at_s=[at_s for _, at_s in parts],
    )


def test_delays_of_whole_chunks_are_reading_less_writing() -> None:
    parts = [(_event(i / 50), i / 50 + 0.001 * (i + 1)) for i in range(4)]
    seen = chunk_delays(_stream([*parts, (_END, 1.0)]), 4, 0.0, 9.0)
    assert seen == pytest.approx([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("size", [1, 7, 40, 61, 500])
def test_delays_of_cut_or_joined_chunks_count_to_the_piece_with_the_stamps_end(size: int) -> None:
    written = [0.0, 0.02, 0.04]
    body = b"".join(map(_event, written)) + _END
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    read = [0.1 + 0.001 * i for i in range(len(pieces))]
    expected = []
    for at_s in written:
        last = body.index(b"%017.6f" % at_s) + 16
        expected.append((read[last // size] - at_s) * 1000)
    seen = chunk_delays(_stream(list(zip(pieces, read, strict=True))), 3, 0.0, 9.0)
    assert seen == pytest.approx(expected)


def test_delays_outside_the_window_are_left_out() -> None:
    parts = [(_event(0.0), 0.5), (_event(0.0), 1.0), (_event(0.0), 2.0), (_END, 2.0)]
    assert chunk_delays(_stream(parts), 3, 1.0, 2.0) == pytest.approx([1000.0])


def test_delays_read_stamps_that_were_encoded_anew_with_a_space() -> None:
    spaced = _event(1.0).replace(b'"content":', b'"content": ')
    assert chunk_delays(_stream([(spaced + _END, 1.5)]), 1, 0.0, 9.0) == pytest.approx([500.0])


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([(_event(0.0), 0.0), (_END, 0.0)], "1 of 2 chunks came"),
        ([(_event(0.0), 0.0)], "no end"),
        ([], "no end"),
    ],
)
def test_delays_of_a_stream_that_is_not_whole_are_refused(
    parts: list[tuple[bytes, float]], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        chunk_delays(_stream(parts), 2, 0.0, 9.0)
