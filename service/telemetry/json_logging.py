"""Logs with one JSON object per line. No line holds a prompt or a key."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

import orjson

# Fields of the present request, for this task and the tasks that it starts.
_FIELDS: ContextVar[Mapping[str, str]] = ContextVar("fields", default={})  # noqa: B039
_EXTRA = (
    "request_id",
    "path",
    "status",
    "tenant",
    "key",
    "expert",
    "category",
    "ms",
    "act",
    "outcome",
    "reason",
    "client",
    "unsaid",
)


def log_fields(**fields: str) -> None:
    """Add fields, such as the request's id, to all later lines of this task."""
    _FIELDS.set({**_FIELDS.get(), **fields})


class JsonLines(logging.Formatter):
    """Formats a record as JSON: time, level, logger, message, and the request's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message_of(record),
        }
        line |= _FIELDS.get()
        line |= {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            # Only the type and place of an error: its text may quote a prompt.
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            line["error"] = {"type": record.exc_info[0].__name__, "at": where}
        return orjson.dumps(line).decode()


class EngineLines(JsonLines):
    """Formats an engine's lines and removes text from error lines that a request may have sent.

    vLLM puts parameters, schemas and exception texts into its errors. This formatter keeps the
    constant words and the numbers of such lines. It keeps an exception's text only while an engine
    starts, because there are no requests then.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.ERROR and not record.exc_info:
            return super().format(record)
        bare = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            bare.args = tuple(
                arg if isinstance(arg, (int, float)) else _Elided() for arg in record.args
            )
        elif record.args:
            bare.args = {name: _Elided() for name in record.args}
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and _was_starting(error):
            bare.msg, bare.args = f"{_message_of(bare)}: {error}", ()
        return super().format(bare)


class _Elided:
    """Replaces a text argument of a log line. It fits every conversion of `%`."""

    def __str__(self) -> str:
        return "…"

    __repr__ = __str__

    def __float__(self) -> float:
        return 0.0

    __int__ = __index__ = lambda self: 0


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return str(record.msg)


def _was_starting(error: BaseException) -> bool:
    """Return whether an engine's constructor raised the error."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "__init__" and "/v1/engine/" in code.co_filename:
            return True
        trace = trace.tb_next
    return False


def engine_handler() -> logging.Handler:
    """Return the handler of vLLM's lines that `engine_logs.json` names, and set their level."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper()
    logging.getLogger("vllm").setLevel(level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EngineLines())
    return handler


ENGINE_LOGS = Path(__file__).with_name("engine_logs.json")


def set_up_logs(level: int = logging.INFO) -> None:
    """Send this package's logs to stderr as JSON lines.

    Afterwards a line that cannot be written, for instance because the disk is full, is dropped
    silently. Under Ray Serve stderr is a logger as well: reporting the failure there would fail
    again, without end, until the request itself failed.
    """
    logging.raiseExceptions = False
    logger = logging.getLogger("coe")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
