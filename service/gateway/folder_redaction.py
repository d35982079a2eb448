"""Removes this machine's folders from reasons of failures, before clients read them."""

from __future__ import annotations

import re

# An absolute path up to its last part. URLs don't match.
_FOLDERS = re.compile(
    r"(?<![\w:/.~])(?:~|/(?!v1/))(?:[^\s'\":;,()\[\]<>/]*/)+(?=[^\s/])"  # /a/b/c.json, ~/a/c.json
    r"|(?<![\w:/.~])/(?=\w)(?!v1/)"  # /c.json; not an endpoint
)


def without_folders(text: str) -> str:
    """Replace each path in a text by the file's name.

    The log, and requests with the admin key, get the full paths.
    """
    return _FOLDERS.sub("", text)
