"""Reads, checks and writes the artifacts of routers.

An artifact is a folder `<name>@<version>` with `manifest.json` (metadata), `weights.safetensors`
(tensors) and `README.md` (the model card). It uses only JSON and safetensors, and no pickle, so
that loading it executes no code. The manifest has the SHA-256 of the weights, and the shape and
dtype of every tensor. An artifact that does not match its manifest is refused with an
`ArtifactError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from service.errors import ArtifactError

SCHEMA_VERSION = 2
"""Version 2 adds heads on the static table and on an encoder. Version 1 is read, too."""
_READABLE = (1, 2)
KIND = "coe-router"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
CARD = "README.md"

# These bounds are far above the size of any artifact. They keep a wrong path from filling memory.
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_WEIGHTS_BYTES = 1 << 30
_MAX_VALUE = 1e15
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A loaded and checked artifact.

    Attributes:
        path: Its folder.
        manifest: Its manifest.
        tensors: Its tensors by name.
    """

    path: Path
    manifest: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]

    @property
    def name(self) -> str:
        """`<name>@<version>` from the manifest. The folder may have another name."""
        return str(self.manifest["name"])

    def section(self, name: str) -> Mapping[str, Any]:
        """Return an object of the manifest.

        Raises:
            ArtifactError: The object is missing, or has another type.
        """
        found = self.manifest.get(name)
        if not isinstance(found, dict):
            raise ArtifactError(f"{self.path / MANIFEST}: {name!r} is missing or not an object")
        return found

    def part(self, section: str, name: str) -> Mapping[str, Any] | None:
        """Return an object in a section of the manifest; None where the section has none.

        Raises:
            ArtifactError: The section is missing, or one of the two has another type.
        """
        found = self.section(section).get(name, {})
        if not isinstance(found, dict):
            raise ArtifactError(f"{self.path / MANIFEST}: {section}.{name} is not an object")
        return found or None

    def tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a tensor, and check its shape.

        Raises:
            ArtifactError: The tensor is missing, has another shape, or contains NaN, infinity or
                numbers that are too large.
        """
        if name not in self.tensors:
            raise ArtifactError(f"{self.path / WEIGHTS}: no tensor {name!r}")
        found = self.tensors[name]
        if found.shape != shape:
            raise ArtifactError(
                f"{self.path / WEIGHTS}: tensor {name!r} has shape {list(found.shape)}, "
                f"the manifest asks for {list(shape)}"
            )
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise ArtifactError(f"{self.path / WEIGHTS}: tensor {name!r} holds NaN or infinity")
        # In float32, products of larger numbers are infinite, and quality would be NaN.
        if found.dtype.kind == "f" and float(np.abs(found).max(initial=0)) > _MAX_VALUE:
            raise ArtifactError(
                f"{self.path / WEIGHTS}: tensor {name!r} holds numbers beyond ±{_MAX_VALUE:g}"
            )
        return found


def load_artifact(path: Path | str) -> Artifact:
    """Read and check the artifact folder at `path`.

    Raises:
        ArtifactError: A file is missing or invalid, or the artifact has another kind or schema
            version. The same holds for weights whose SHA-256, tensor names, shapes or dtypes differ
            from the manifest. The error names the file and the reason.
    """
    folder = Path(path)
    where = folder / MANIFEST
    try:
        manifest = _parse(_read(where, _MAX_MANIFEST_BYTES))
    except ValueError as error:
        raise ArtifactError(f"{where}: not JSON: {error}") from error
    except RecursionError:
        raise ArtifactError(f"{where}: nested too deep") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ArtifactError(f'{where}: not a router artifact ("kind" must be {KIND!r})')
    if manifest.get("schema_version") not in _READABLE:
        raise ArtifactError(
            f"{where}: schema version {manifest.get('schema_version')!r}, "
            f"this version reads {' and '.join(map(str, _READABLE))}"
        )
    weights = manifest.get("weights")
    if not isinstance(manifest.get("name"), str) or not isinstance(weights, dict):
        raise ArtifactError(f"{where}: 'name' or 'weights' is missing")
    raw = _read(folder / WEIGHTS, _MAX_WEIGHTS_BYTES)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != weights.get("sha256"):
        raise ArtifactError(
            f"{folder / WEIGHTS}: SHA-256 is {digest}, the manifest has {weights.get('sha256')}"
        )
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / WEIGHTS}: not safetensors: {error}") from error
    found = _describe(tensors)
    if found != weights.get("tensors"):
        raise ArtifactError(f"{folder / WEIGHTS}: tensors differ from those of the manifest")
    return Artifact(folder, manifest, tensors)


def save_artifact(
    path: Path | str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    card: str,
) -> Artifact:
    """Write an artifact folder, and read it back. It replaces an earlier folder at `path`.

    The function adds `kind`, `schema_version`, `name` and `weights` to the manifest. The name is
    that of the folder.

    Raises:
        ArtifactError: The name of the folder does not have the form `<name>@<version>`.
    """
    folder = Path(path)
    if not _NAME.fullmatch(folder.name):
        raise ArtifactError(f"{folder}: the folder must be called <name>@<version>")
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ArtifactError(f"{folder}: exists and is not an artifact; not overwritten")
    raw = dump_tensors({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    full = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "name": folder.name,
        **manifest,
        "weights": {
            "file": WEIGHTS,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "tensors": _describe(tensors),
        },
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        (fresh / WEIGHTS).write_bytes(raw)
        (fresh / MANIFEST).write_text(json.dumps(full, indent=1, allow_nan=False) + "\n")
        (fresh / CARD).write_text(card)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load_artifact(folder)


def _describe(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {
        name: {"dtype": str(value.dtype), "shape": list(value.shape)}
        for name, value in sorted(tensors.items())
    }


def _parse(text: bytes) -> Any:
    """Parse JSON. Python's parser alone takes numbers that no float or index can hold.

    Raises:
        ValueError: It is no JSON, or a number is too large or none.
    """

    def finite(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            raise ValueError(f"{digits[:32]} is no finite number")
        return number

    def bounded(digits: str) -> int:
        # The longest 64-bit integer has 19 digits.
        if len(digits) > 18:
            raise ValueError(f"{digits[:32]} is too large")
        return int(digits)

    return json.loads(text, parse_float=finite, parse_constant=finite, parse_int=bounded)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > max_bytes:
            raise ArtifactError(f"{path}: {size_bytes} bytes, at most {max_bytes} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
