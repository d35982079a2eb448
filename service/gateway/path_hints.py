"""The path that was meant by a request to one that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_SLASHES = re.compile(r"/{2,}")


def hint_for(path: str, known: Sequence[str]) -> str:
    """A clause for the error's message, or nothing where no path is near.

    Base URLs are often written without `/v1`, with it twice, with a slash too many, or with the
    endpoint in them.
    """
    meant = _meant(path, known)
    return f"; did you mean {meant}? The base URL of clients ends in /v1" if meant else ""


def _meant(path: str, known: Sequence[str]) -> str | None:
    plain = _SLASHES.sub("/", path).rstrip("/")
    for prefix in ("/v1", ""):
        bare = plain
        while bare.startswith("/v1/"):
            bare = bare[3:]
        if prefix + bare in known:
            return prefix + bare
    # The endpoint twice: once in the base URL, once by the client.
    for one in sorted(known, key=len, reverse=True):
        if one not in ("", "/") and plain.startswith(one + "/"):
            rest = plain[len(one) :]
            if one.endswith(rest) or f"/v1{rest}" == one:
                return one
    near = difflib.get_close_matches(plain[:128], known, n=1, cutoff=0.85)
    return near[0] if near else None
