"""Logs: one JSON object a line, and never an exception's text, which may quote a prompt."""

from __future__ import annotations

import io
import logging
import sys

import orjson
import pytest

from service.telemetry.logs import JsonLines, set_up_logs

SECRET = "the prompt of a user"


@pytest.fixture
def lines() -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("coe.test")
    logger.addHandler(handler)
    return logger, stream


def test_an_exception_is_its_kind_and_place_only(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines

    def inner() -> None:
        raise ValueError(SECRET)

    try:
        try:
            inner()
        except ValueError as error:
            raise RuntimeError(SECRET) from error
    except RuntimeError:
        logger.exception("a request failed")
    text = stream.getvalue()
    assert SECRET not in text
    line = orjson.loads(text)
    assert line["message"] == "a request failed"
    assert line["error"]["type"] == "RuntimeError"
    assert __file__ in line["error"]["at"]


def test_a_line_is_one_json_object_with_the_request_s_fields(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    logger.warning("two\nlines", extra={"request_id": "r", "status": 200, "prompt": SECRET})
    assert stream.getvalue().count("\n") == 1
    line = orjson.loads(stream.getvalue())
    assert line["level"] == "warning"
    assert (line["request_id"], line["status"]) == ("r", 200)
    assert SECRET not in stream.getvalue()


def test_set_up_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("coe")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    set_up_logs()
    set_up_logs()
    assert len(logger.handlers) == 1
    assert not logger.propagate
