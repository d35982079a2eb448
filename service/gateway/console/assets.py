"""Loads the console's files once, with headers that let a browser run no other code.

The module imports only the standard library, because the start page is served before the rest of
the service has been loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# The policy forbids inline code, content of other origins, and frames around the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGES = {"/console": "index.html", "/docs": "docs.html"}


@dataclass(frozen=True, slots=True)
class Asset:
    """The body and headers of one file."""

    body: bytes
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        """The file's ETag, a hash of its body."""
        return self.headers["etag"]


def load_assets(folder: Path = STATIC) -> dict[str, Asset]:
    """Load every file under `folder`, by the URL path under which it is served."""
    files = {
        f"/console/{path.relative_to(folder).as_posix()}": _read(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES
    }
    return files | {page: files[f"/console/{name}"] for page, name in _PAGES.items()}


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(
        body,
        {
            "content-type": _TYPES[path.suffix],
            "etag": f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"',
            # Browsers revalidate the file every time, so that they show an upgrade at once. The
            # reply is a 304 if the file has not changed.
            "cache-control": "no-cache",
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        },
    )
