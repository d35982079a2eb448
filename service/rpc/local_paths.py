"""Paths on this machine: its admin key, its API keys, and the metrics sockets of a cluster."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def admin_key_path() -> Path:
    """Path of this machine's admin key: `$COE_HOME/admin-key`, or `~/.config/coe/admin-key`."""
    home = os.environ.get("COE_HOME")
    return (Path(home) if home else Path.home() / ".config" / "coe") / "admin-key"


def keys_path() -> Path:
    """Default path of this machine's hashed API keys."""
    return admin_key_path().with_name("keys.jsonl")


def added_experts_path(port: int) -> Path:
    """Default path of the experts that an admin has added to this machine's service on a port."""
    return admin_key_path().with_name(f"experts-{port}.json")


def node_folder(secret: str) -> Path:
    """Folder of the metrics sockets of a cluster's processes on this node."""
    digest = hashlib.blake2b(secret.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"coe-{os.getuid()}-{digest}"
