"""Suggests the right path to a request for one that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_SLASHES = re.compile(r"/{2,}")


def hint_for(path: str, known: Sequence[str]) -> str:
    """A clause for the error's message; empty where no known path is similar.

    Base URLs are often written without `/v1`, with it twice, with a slash too many, or with the
    endpoint in them.
    """
    similar = _similar_path(path, known)
    if similar is None:
        return ""
    return f"; did you mean {similar}? The base URL of clients ends in /v1"


def _similar_path(path: str, known: Sequence[str]) -> str | None:
    plain = _SLASHES.sub("/", path).rstrip("/")
    for prefix in ("/v1", ""):
        bare = plain
        while bare.startswith("/v1/"):
            bare = bare[3:]
        if prefix + bare in known:
            return prefix + bare
    # The endpoint may be there twice: in the base URL, and added by the client.
    for endpoint in sorted(known, key=len, reverse=True):
        if endpoint not in ("", "/") and plain.startswith(endpoint + "/"):
            rest = plain[len(endpoint) :]
            if endpoint.endswith(rest) or f"/v1{rest}" == endpoint:
                return endpoint
    near = difflib.get_close_matches(plain[:128], known, n=1, cutoff=0.85)
    return near[0] if near else None
