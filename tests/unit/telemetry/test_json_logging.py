"""Logs: one JSON object a line, and no exception text, which may quote a prompt."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import logging.config
import sys

import orjson
import pytest

from service.telemetry.json_logging import (
    ENGINE_LOGS,
    EngineLines,
    JsonLines,
    log_fields,
    set_up_logs,
)

SECRET = "the prompt of a user"


@pytest.fixture
def lines() -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("coe.test")
    logger.addHandler(handler)
    return logger, stream


def test_json_lines_exception_has_type_and_place_but_no_text(
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


def test_json_lines_record_is_one_json_object_with_allowed_fields_only(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    logger.warning("two\nlines", extra={"request_id": "r", "status": 200, "prompt": SECRET})
    assert stream.getvalue().count("\n") == 1
    line = orjson.loads(stream.getvalue())
    assert line["level"] == "warning"
    assert (line["request_id"], line["status"]) == ("r", 200)
    assert SECRET not in stream.getvalue()


async def test_log_fields_of_a_request_reach_its_tasks_and_no_other_request(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines

    async def request(number: int) -> None:
        log_fields(request_id=f"r{number}")
        log_fields(trace_id=f"t{number}")
        await asyncio.sleep(0)
        # What a request starts belongs to it.
        await asyncio.create_task(inner(number))

    async def inner(number: int) -> None:
        await asyncio.sleep(0)
        logger.warning("at %d", number)

    await asyncio.gather(*(request(number) for number in range(3)))
    logger.warning("nobody's")
    data = [orjson.loads(line) for line in stream.getvalue().splitlines()]
    assert {(t["message"], t.get("request_id"), t.get("trace_id")) for t in data} == {
        ("at 0", "r0", "t0"),
        ("at 1", "r1", "t1"),
        ("at 2", "r2", "t2"),
        ("nobody's", None, None),
    }


def _fresh(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Our logger as it is before it is set up; it is what it was again afterwards."""
    logger = logging.getLogger("coe")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    return logger


def test_set_up_logs_twice_adds_one_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = _fresh(monkeypatch)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    set_up_logs()
    set_up_logs()
    assert len(logger.handlers) == 1
    assert not logger.propagate


class _Full:
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.write("")


class _LoggerStream:
    """Standard error as Ray Serve has it: a logger."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, text: str) -> int:
        self._logger.error("%s", text)
        return len(text)

    def flush(self) -> None:
        pass


def test_set_up_logs_on_a_full_disk_logging_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    _fresh(monkeypatch)
    logger = logging.getLogger("full")
    logger.propagate = False
    handler = logging.StreamHandler(_Full())
    logger.addHandler(handler)
    monkeypatch.setattr(sys, "stderr", _LoggerStream(logger))
    try:
        with pytest.raises(RecursionError):
            logger.error("nobody reads this")
        set_up_logs()
        logger.error("nor this")
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Error in create_messages: %s", (SECRET,)),
        ("Dumping scheduler output for model execution: %s", ({"schema": SECRET},)),
        ("%s of %d at %f took %5.2f s", (SECRET, 3, 1.5, SECRET)),
        ("Failed to compile grammar for %(what)s", ({"what": SECRET},)),
        ("%d and nothing that fits", (SECRET, SECRET)),
    ],
)
def test_engine_lines_error_has_no_text_of_a_request(
    message: str, arguments: tuple[object, ...]
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(EngineLines())
    logger = logging.Logger("vllm.test")
    logger.addHandler(handler)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception(message, *arguments)
    logger.error(message, *arguments)
    logger.warning("of %s: a level below is not about requests", "the start")
    text = stream.getvalue()
    assert SECRET not in text
    first, _, last = map(orjson.loads, text.splitlines())
    assert first["message"].startswith(message.partition("%")[0])
    assert first["error"]["type"] == "ValueError"
    assert last["message"] == "of the start: a level below is not about requests"


def test_engine_lines_failed_start_keeps_its_reason() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(EngineLines())
    logger = logging.Logger("vllm.test")
    logger.addHandler(handler)
    made = compile(
        "class Core:\n def __init__(self): raise ValueError('no such weights')",
        "site-packages/vllm/v1/engine/core.py",
        "exec",
    )
    namespace: dict[str, type] = {}
    exec(made, namespace)
    try:
        namespace["Core"]()
    except ValueError:
        logger.exception("EngineCore failed to start.")
    line = orjson.loads(stream.getvalue())
    assert line["message"] == "EngineCore failed to start.: no such weights"


def test_engine_logs_config_is_accepted_by_dictconfig(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM reads it: the file is a valid logging config, and names our handler."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    config = json.loads(ENGINE_LOGS.read_text())
    logger = logging.getLogger("vllm")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        logging.config.dictConfig(config)
        (handler,) = logger.handlers
        assert isinstance(handler.formatter, EngineLines)
        assert logger.getEffectiveLevel() == logging.WARNING
    finally:
        logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
