"""The console's files: read once, served with a policy that lets a browser run nothing else.

Only the standard library: the page is to be had before anything else of the service is.
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
# Nothing inline, nothing from elsewhere, nobody may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGES = {"/console": "index.html", "/docs": "docs.html"}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it is sent."""

    body: bytes
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        """Changes when the file does."""
        return self.headers["etag"]


def load_assets(folder: Path = STATIC) -> dict[str, Asset]:
    """Every file under `folder` by the path that it is served at, and the pages by theirs."""
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
            # Asked again every time, and answered with 304: an upgrade shows at once.
            "cache-control": "no-cache",
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        },
    )
