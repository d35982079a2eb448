"""Reading a running service's event streams from the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from service.cli.http import open_reply
from service.errors import CoeError


def api_headers() -> dict[str, str]:
    """The API key of $COE_API_KEY, where there is one."""
    key = os.environ.get("COE_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def open_stream(
    url: str, path: str, headers: dict[str, str], body: dict[str, Any] | None = None
) -> Any:
    """A reply whose body is still to be read, as a context manager. Raises CoeError."""
    text = json.dumps(body) if body is not None else None
    headers = {"content-type": "application/json", **headers}
    return open_reply(url, "GET" if text is None else "POST", path, headers, text)


def events(reply: Any) -> Iterator[tuple[str, str]]:
    """Server-sent events as (name, data), until the stream ends. Raises CoeError if it breaks."""
    name, data = "message", ""
    for raw in _lines(reply):
        line = raw.decode().rstrip("\r\n")
        if not line:
            if data:
                yield name, data
            name, data = "message", ""
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].removeprefix(" ")


def _lines(reply: Any) -> Iterator[bytes]:
    from http.client import HTTPException

    try:
        yield from reply
    except (OSError, HTTPException) as error:
        raise CoeError(f"the stream broke off ({type(error).__name__})") from None
