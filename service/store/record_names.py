"""Names of records in a store."""

from __future__ import annotations

from urllib.parse import quote


def join_name(*parts: str) -> str:
    """Join parts with any characters into one name.

    Different lists of parts always have different names, because the parts are quoted. A tenant
    `a/b` therefore shares no name with a tenant `a`.
    """
    return "/".join(quote(part, safe=":@+=,") for part in parts)
