"""Names of what is kept in a store."""

from __future__ import annotations

from urllib.parse import quote


def place(*parts: str) -> str:
    """One name of several parts, which may hold any character, `/` included.

    Two lists of parts have the same name only if they are equal: a tenant `a/b` has no place in
    common with a tenant `a`.
    """
    return "/".join(quote(part, safe=":@+=,") for part in parts)
