"""Names of records in a store."""

from __future__ import annotations

from urllib.parse import quote


def join_name(*parts: str) -> str:
    """Join parts, which may hold any character, into one name.

    Two lists of parts have the same name only if they are equal: the parts are quoted, so that a
    tenant `a/b` shares no name with a tenant `a`.
    """
    return "/".join(quote(part, safe=":@+=,") for part in parts)
