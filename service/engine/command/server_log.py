"""The log of a server: where it is, and its last lines without keys."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

LOG_BYTES = 4 * 1024**2
_READ_BYTES = 256 * 1024
_LINE_CHARS = 500
_LEAST_SECRET_CHARS = 4


def log_path(folder: Path, expert: str) -> Path:
    """Return the log file of an expert's server."""
    return folder / f"{quote(expert, safe='~')[:200]}.log"


def last_lines(
    path: Path, lines: int, secrets: Collection[str] = (), *, earlier: bool = False
) -> list[str]:
    """Return the last lines of a log, each of at most 500 characters.

    Args:
        path: The log.
        lines: The most lines.
        secrets: Texts that are replaced by `***`.
        earlier: Whether to go on in the files before this one.
    """
    text = _tail(path)
    for more in (".1", ".2") if earlier else ():
        if text.count("\n") < lines:
            text = _tail(path.with_name(path.name + more)) + text
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _LEAST_SECRET_CHARS:
            text = text.replace(secret, "***")
    # A progress bar writes many versions of one line.
    found = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [_plain(line)[:_LINE_CHARS] for line in found if line.strip()][-lines:]


def _tail(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _READ_BYTES))
        return file.read().decode("utf-8", "replace")
    return ""


def _plain(line: str) -> str:
    """Return a line without control characters, so that it can't move a terminal's cursor."""
    return "".join(char if char.isprintable() or char == "\t" else " " for char in line).rstrip()
