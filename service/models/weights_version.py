"""The version of an expert's weights, computed from their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from service.models.model_files import is_module

# The suffix of folders with chat templates.
_TEMPLATES = "chat_templates"


def version_of(folder: str, adapter: str | None, strength: float) -> str:
    """Return the version of an expert's weights, which changes when any of their files changes.

    It covers names, sizes, modification times and inodes, because reading tens of gigabytes would
    take longer than loading them.

    Args:
        folder: The folder of the full weights.
        adapter: The folder of a LoRA adapter, if any.
        strength: The factor of the adapter.

    Returns:
        A hexadecimal digest.

    Raises:
        OSError: A folder or file can't be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((folder, adapter, strength if adapter else 1.0)).encode())
    for root in (folder, adapter):
        for path in files_in(Path(root)) if root else ():
            status = path.stat()
            what = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
            digest.update(repr(what).encode())
    return digest.hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files that a model or adapter is loaded from, without hidden files."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and (path.name.endswith(_TEMPLATES) or is_module(path.name)):
            yield from sorted(item for item in path.rglob("*") if item.is_file())
        elif not path.is_dir():
            yield path
