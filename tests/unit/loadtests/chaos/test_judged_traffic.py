"""The judge of chaos runs detects wrong models, duplicate answers and untyped errors."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from loadtests.chaos.judged_traffic import BROKEN, RIGHT, TYPED, UNTYPED, WRONG, Ask, judged
from service.engine.simulated_engine import answer_text

WHOLE = Ask("general", "hello", 3, False, 1.0, frozenset({"general"}))
STREAM = Ask("general", "hello", 3, True, 1.0, frozenset({"general"}))
WORDS = answer_text("general", "hello", 3)


def whole(text: str, model: str = "general") -> bytes:
    return orjson.dumps({"model": model, "choices": [{"message": {"content": text}}]})


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else orjson.dumps(data)) + b"\n\n"


def piece(text: str, model: str = "general") -> bytes:
    return event({"model": model, "choices": [{"delta": {"content": text}}]})


PIECES = b"".join(map(piece, WORDS))
DONE = event(b"[DONE]")
ERROR = event({"error": {"message": "m", "type": "t", "param": None, "code": "engine_dead"}})
TYPED_BODY = orjson.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c"}})


@pytest.mark.parametrize(
    ("ask", "status", "told", "body", "kind"),
    [
        (WHOLE, 200, "general", whole("".join(WORDS)), RIGHT),
        (WHOLE, 200, "general", whole("".join(WORDS) * 2), WRONG),
        (WHOLE, 200, "math", whole("".join(answer_text("math", "hello", 3)), "math"), WRONG),
        (WHOLE, 200, "general", whole("".join(answer_text("math", "hello", 3))), WRONG),
        (WHOLE, 200, "general", whole("".join(WORDS), "math"), WRONG),
        (WHOLE, 200, "general", b"garbage", WRONG),
        (WHOLE, 200, "general", b"{}", WRONG),
        (WHOLE, 503, "", TYPED_BODY, TYPED),
        (WHOLE, 500, "", b"Internal Server Error", UNTYPED),
        (WHOLE, 302, "", TYPED_BODY, UNTYPED),
        (STREAM, 200, "general", PIECES + DONE, RIGHT),
        (STREAM, 200, "general", PIECES, WRONG),
        (STREAM, 200, "general", PIECES + DONE + DONE, WRONG),
        (STREAM, 200, "general", PIECES + DONE + PIECES + DONE, WRONG),
        (STREAM, 200, "general", PIECES + PIECES + DONE, WRONG),
        (STREAM, 200, "general", piece(WORDS[0]) + DONE, WRONG),
        (STREAM, 200, "general", piece(WORDS[0]) + ERROR, BROKEN),
        (STREAM, 200, "general", piece("other") + ERROR, WRONG),
        (STREAM, 200, "general", piece(WORDS[0], "math") + PIECES + DONE, WRONG),
    ],
)
def test_chaos_judge_classifies_every_outcome(
    ask: Ask, status: int, told: str, body: bytes, kind: str
) -> None:
    assert judged(ask, status, told, body)[0] == kind
