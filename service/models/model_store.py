"""The model store on disk: its root, manifests, locks, and publication of models.

A model is a folder `<root>/<name>/` with a manifest `coe-model.json`. It is assembled in
`<root>/.partial/<name>/` and published by one rename, so that a named folder is always complete.
Downloads stay in `<root>/.downloads/<name>/` until then, so that the next try resumes them.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.pull_progress import Progress

MANIFEST = "coe-model.json"
_MANIFEST_FORMAT = 1
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `coe-model.json`. Paths of files are relative to the model's folder."""

    name: str
    source: str
    licence: str | None
    created: str
    files: tuple[StoredFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model of the store. `problem` is the reason why it is incomplete, in one line."""

    name: str
    path: Path
    bytes: int
    source: str
    licence: str | None
    complete: bool
    problem: str | None = None


def model_root() -> Path:
    """`$COE_MODELS`, or `~/.cache/coe/models`."""
    configured = os.environ.get("COE_MODELS")
    return Path(configured).expanduser() if configured else Path.home() / ".cache/coe/models"


def list_models(root: Path | None = None) -> tuple[StoredModel, ...]:
    """List the models of the store by name. This checks sizes; `verify` checks checksums."""
    root = root if root is not None else model_root()
    if not root.is_dir():
        return ()
    found = []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            manifest = read_manifest(folder)
        except ModelStoreError as error:
            found.append(StoredModel(folder.name, folder, 0, "", None, False, error.message))
            continue
        problem = find_damage(folder, manifest, checksums=False)
        found.append(
            StoredModel(
                name=folder.name,
                path=folder,
                bytes=manifest.bytes,
                source=manifest.source,
                licence=manifest.licence,
                complete=problem is None,
                problem=problem,
            )
        )
    return tuple(found)


def verify(folder: Path) -> Manifest:
    """Check every file of a stored model against its checksum."""
    manifest = read_manifest(folder)
    problem = find_damage(folder, manifest, checksums=True)
    if problem is not None:
        raise ModelStoreError(f"{folder}: {problem}; pull it again")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != _MANIFEST_FORMAT:
            raise ModelStoreError(
                f"{path}: manifest format {raw['format']!r}; this version reads {_MANIFEST_FORMAT}"
            )
        return Manifest(
            name=str(raw["name"]),
            source=str(raw["source"]),
            licence=None if raw["licence"] is None else str(raw["licence"]),
            created=str(raw["created"]),
            files=tuple(
                StoredFile(str(file["path"]), str(file["sha256"]), int(file["bytes"]))
                for file in raw["files"]
            ),
        )
    except FileNotFoundError as error:
        raise ModelStoreError(f"{folder}: no {MANIFEST} in it; pull the model again") from error
    except OSError as error:
        raise ModelStoreError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelStoreError(f"{path}: damaged manifest; pull the model again") from error


def find_damage(folder: Path, manifest: Manifest, *, checksums: bool) -> str | None:
    """Return a description of the first fault of the folder's files, or None."""
    for file in manifest.files:
        path = folder / file.path
        try:
            size = path.stat().st_size
        except OSError:
            return f"{file.path} is missing"
        if size != file.bytes:
            return f"{file.path} has {size} bytes, should have {file.bytes}"
        if checksums and sha256_of(path) != file.sha256:
            return f"{file.path} has a wrong checksum"
    return None


def write_manifest(folder: Path, *, name: str, source: str, licence: str | None) -> Manifest:
    """Record every file of `folder` with its checksum."""
    files = tuple(
        StoredFile(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = Manifest(name, source, licence, now, files)
    raw = {
        "format": _MANIFEST_FORMAT,
        "name": name,
        "source": source,
        "licence": licence,
        "created": now,
        "files": [
            {"path": file.path, "sha256": file.sha256, "bytes": file.bytes} for file in files
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return manifest


def publish(partial: Path, final: Path) -> None:
    """Publish a complete folder atomically under its name. It replaces a damaged older folder."""
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    if final.exists():
        grave = partial.with_name(partial.name + ".old")
        shutil.rmtree(grave, ignore_errors=True)
        final.rename(grave)
        partial.rename(final)
        shutil.rmtree(grave, ignore_errors=True)
    else:
        partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Flush a folder's data to disk, because a rename may reach the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(root: Path, name: str, progress: Progress) -> Iterator[None]:
    """Lock a name for a pull. The lock ends with the process that holds it."""
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"{name}: another pull of it is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def one_line_errors(doing: str, root: Path) -> Iterator[None]:
    """Turn errors of the file system into a single clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelStoreError(
                f"{doing}: the disk of {root} is full ({free_bytes(root) / 1e6:.0f} MB free); "
                "make room or set COE_MODELS to another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ModelStoreError(
                f"{doing}: may not write to {error.filename or root}; "
                "set COE_MODELS to a folder of yours"
            ) from error
        raise ModelStoreError(f"{doing}: {error}") from error


def require_free(root: Path, needed_bytes: int, doing: str) -> None:
    free = free_bytes(root)
    if free < needed_bytes:
        raise ModelStoreError(
            f"{doing}: needs {needed_bytes / 1e6:.0f} MB in {root}, only {free / 1e6:.0f} MB are "
            "free; make room or set COE_MODELS to another folder"
        )


def free_bytes(root: Path) -> int:
    existing = root
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
