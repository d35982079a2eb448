"""What is told to whom: reasons of failures without the folders of this machine."""

from __future__ import annotations

import re

# An absolute path up to its last part; of URLs nothing.
_FOLDERS = re.compile(
    r"(?<![\w:/.~])(?:~|/(?!v1/))(?:[^\s'\":;,()\[\]<>/]*/)+(?=[^\s/])"  # /a/b/c.json, ~/a/c.json
    r"|(?<![\w:/.~])/(?=\w)(?!v1/)"  # /c.json; not an endpoint
)


def without_folders(text: str) -> str:
    """A reason as clients may read it: of each file its name, not where it is.

    The log, and who has the admin key, are told in full.
    """
    return _FOLDERS.sub("", text)
