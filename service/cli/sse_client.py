"""Server-sent events of a running service."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from service.cli.http_client import open_reply
from service.errors import CoeError


def api_headers() -> dict[str, str]:
    """Return the header with the API key of $COE_API_KEY, if it is set."""
    key = os.environ.get("COE_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def open_stream(
    url: str, path: str, headers: dict[str, str], body: dict[str, Any] | None = None
) -> Any:
    """Open a reply for reading, as a context manager.

    Raises:
        CoeError: The call failed.
    """
    text = json.dumps(body) if body is not None else None
    headers = {"content-type": "application/json", **headers}
    return open_reply(url, "GET" if text is None else "POST", path, headers, text)


def events(reply: Any) -> Iterator[tuple[str, str]]:
    """Yield server-sent events as (name, data) until the stream ends.

    Raises:
        CoeError: The stream broke off.
    """
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
