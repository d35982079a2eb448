"""The keys of the cache, and the replies that it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from service.config import Config
from service.engine.engine_interface import Message
from service.gateway.cache.response_cache import RecordingSend, ResponseCache
from service.http.error_formats import Dialect
from service.store.volatile_store import MemoryVolatileStore


def test_cache_key_changes_with_the_content_of_the_steering_profile(tmp_path: Path) -> None:
    profile = tmp_path / "p"
    config = Config.model_validate(
        {
            "experts": {"a": {"model": "m"}, "v": {"base": "a", "profile": str(profile)}},
            "pools": {"p": {"engine": "simulated"}},
        }
    )

    def key() -> str:
        cache = ResponseCache(config, MemoryVolatileStore(1000))
        return cache._hash("tenant", "/v1/completions", {"model": "v"})

    profile.write_text("one")
    first = key()
    assert key() == first
    profile.write_text("another")
    assert key() != first


def streamed(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)


STOP, FAULT = {"type": "message_stop"}, {"type": "error", "error": {"type": "api_error"}}
ENDED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
DONE = {"type": "response.completed", "response": {"status": "completed"}}


@pytest.mark.parametrize(
    ("dialect", "streams", "body", "kept"),
    [
        (Dialect.MESSAGES, False, orjson.dumps({"stop_reason": "end_turn"}), True),
        *[
            (Dialect.MESSAGES, False, orjson.dumps({"stop_reason": odd}), False)
            for odd in ([], {}, None, 3, ["end_turn"])
        ],
        (Dialect.MESSAGES, True, streamed(ENDED, STOP), True),
        (Dialect.MESSAGES, True, streamed(ENDED, FAULT, STOP), False),
        (Dialect.MESSAGES, True, streamed({"type": []}, STOP), False),
        (Dialect.RESPONSES, True, streamed(DONE), True),
        (Dialect.RESPONSES, True, streamed(FAULT, DONE), False),
        *[
            (Dialect.RESPONSES, False, orjson.dumps({"status": odd}), False)
            for odd in ([], {}, None, 3, "queued")
        ],
    ],
)
async def test_replies_that_a_client_may_not_get_twice_are_not_kept(
    dialect: Dialect, streams: bool, body: bytes, kept: bool
) -> None:
    async def out(_: Message) -> None: ...

    kind = b"text/event-stream" if streams else b"application/json"
    recorded = RecordingSend(out, 10_000, dialect)
    await recorded(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
    )
    await recorded({"type": "http.response.body", "body": body})
    assert (recorded.whole(by_own_bound=True) == body) == kept
