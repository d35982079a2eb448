"""Logs as one JSON object a line. Nothing here is ever given a prompt or a key."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

# What is known of the request that is being worked on, in this task and those it starts.
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
    """From here on every line of this task tells these, such as its request's id."""
    _FIELDS.set({**_FIELDS.get(), **fields})


class JsonLines(logging.Formatter):
    """time, level, logger, message, and the request's fields where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _FIELDS.get()
        line |= {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            # The kind and place of a fault, not its text: that may quote a prompt.
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            line["error"] = {"type": record.exc_info[0].__name__, "at": where}
        return orjson.dumps(line).decode()


def set_up_logs(level: int = logging.INFO) -> None:
    """Send this package's logs to stderr as JSON lines.

    From then on a line that can't be written, the disk being full, is lost without a word:
    under Ray Serve stderr is a logger as well, and telling it of the failure would fail again,
    and so on, until the request that the line was about had failed too.
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
