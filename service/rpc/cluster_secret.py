"""The cluster's secret, which requests to a pool must carry. Its file has the mode 0600."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

HEADER = "x-coe-secret"


def make_secret(path: Path) -> str:
    """Write a new secret to `path`, readable by its owner only, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = secrets.token_urlsafe(32)
    # The file is written atomically, so that a full disk leaves no empty secret.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return secret


def read_secret(path: Path) -> str:
    """Read a secret from a file.

    Raises:
        OSError: The file can't be read, or is empty.
    """
    secret = path.read_text().strip()
    if not secret:
        raise OSError(f"{path} is empty")
    return secret


def same(given: bytes, secret: bytes) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(given, secret)
