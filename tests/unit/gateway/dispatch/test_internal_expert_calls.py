"""Replies that are kept in memory."""

from __future__ import annotations

import time

from service.gateway.dispatch.internal_expert_calls import BufferedSend
from service.http.asgi_helpers import body_message, start_response


async def test_buffered_send_keeps_all_pieces_in_time_in_proportion_to_them() -> None:
    piece = b"x" * 65_536

    async def cpu_s(pieces: int) -> float:
        buffer = BufferedSend()
        began_s = time.process_time()
        await buffer(start_response(200, []))
        for _ in range(pieces):
            await buffer(body_message(piece, more=True))
        await buffer(body_message(b"end"))
        assert len(buffer.body) == pieces * len(piece) + 3
        assert buffer.body[-4:] == b"xend"
        return time.process_time() - began_s

    # Copied with each piece, this would be 8 GB.
    assert min([await cpu_s(512) for _ in range(3)]) < 0.3
    assert BufferedSend().body == b""
