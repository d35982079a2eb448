"""One expert's tensors in one file of shared memory, which several engines map. No torch here.

The file is a header (JSON: each tensor's dtype, shape and place) and the tensors, aligned,
as a GPU's engine wants them: made so that mapping it is all there is to loading it. It is
written under another name and renamed when it is whole, so whoever finds it can use it; its memory
is asked for first, so that there being none is an error, and not a signal later.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX, UNFINISHED_SUFFIX = ".weights", ".new"
_MAGIC = b"coeW1\0\0\0"
_LENGTH = struct.Struct("<Q")
# Of every tensor: a cache line. Of the first: a page, so that copies begin on one.
_ALIGN_BYTES, _PAGE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's dtype by name, shape and bytes; `offset` in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    offset: int = 0


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor], int]:
    """The header, each tensor's place after it, and the bytes of the whole file."""
    places: dict[str, Tensor] = {}
    at = 0
    for name, one in tensors.items():
        places[name] = Tensor(one.dtype, one.shape, one.size_bytes, at)
        at = _up(at + one.size_bytes, _ALIGN_BYTES)
    told = {n: [one.dtype, one.shape, one.size_bytes, one.offset] for n, one in places.items()}
    text = json.dumps(told, separators=(",", ":")).encode()
    header = _MAGIC + _LENGTH.pack(len(text)) + text
    begin = _up(len(header), _PAGE_BYTES)
    moved = {
        name: Tensor(one.dtype, one.shape, one.size_bytes, begin + one.offset)
        for name, one in places.items()
    }
    return header, moved, begin + at


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(frozen=True, slots=True)
class MappedTensors:
    """A whole file in this process's memory, shared with whoever else has mapped it.

    Its memory stays as long as something refers to it, whatever becomes of the file's name.
    """

    tensors: Mapping[str, Tensor]
    memory: mmap.mmap


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    fill: Callable[[str, memoryview], None],
    token: str,
) -> MappedTensors:
    """Make a file of tensors, `fill` each with its bytes, and keep it mapped.

    `token` tells whose it is until it is whole. Raises OSError (ENOSPC, where memory is short) and
    what `fill` does; then nothing is left. Where somebody else was first, theirs is taken.
    """
    header, places, size = layout_of(tensors)
    partial = path.with_name(f"{path.name}.{token}{UNFINISHED_SUFFIX}")
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            _reserve(handle, size, partial)
            memory = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        memory[: len(header)] = header
        with memoryview(memory) as view:
            for name, one in places.items():
                with view[one.offset : one.offset + one.size_bytes] as part:
                    fill(name, part)
        try:
            os.link(partial, path)  # as rename, but never in another's place
        except FileExistsError:
            if (found := map_file(path, tensors)) is None:
                raise
            return found
        return MappedTensors(places, memory)
    finally:
        partial.unlink(missing_ok=True)


def _reserve(handle: int, size: int, path: Path) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM, errno.EDQUOT):
            raise
        about = os.fstatvfs(handle)
        free = about.f_bavail * about.f_frsize
        raise OSError(
            errno.ENOSPC,
            f"no room for {size / 1e9:.2f} GB of weights in shared memory: {path.parent.parent} "
            f"has {free / 1e9:.2f} GB left; make it larger, or swap.host_bytes smaller",
        ) from None


def map_file(path: Path, tensors: Mapping[str, Tensor]) -> MappedTensors | None:
    """Map a file, if there is one that holds these tensors, by name, dtype and shape.

    Raises ValueError where it holds others, or is no such file: its name says what is in it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(handle).st_size
        if size < _PAGE_BYTES:
            raise ValueError(f"{path.name}: not a file of weights")
        memory = mmap.mmap(handle, size)
    finally:
        os.close(handle)
    held = _read(memory)
    if _described(held) != _described(tensors):
        raise ValueError(f"{path.name}: it holds other tensors than are asked for")
    return MappedTensors(held, memory)


def _read(memory: mmap.mmap) -> dict[str, Tensor]:
    size = len(memory)
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(memory[len(_MAGIC) : start])
    if memory[: len(_MAGIC)] != _MAGIC or start + length > size:
        raise ValueError("not a file of weights")
    told: dict[str, Any] = json.loads(memory[start : start + length])
    begin = _up(start + length, _PAGE_BYTES)
    held = {
        name: Tensor(dtype, tuple(shape), size_bytes, begin + offset)
        for name, (dtype, shape, size_bytes, offset) in told.items()
    }
    for name, one in held.items():
        if one.offset + one.size_bytes > size:
            raise ValueError(f"{name} is cut short")
    return held


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {name: (one.dtype, one.shape, one.size_bytes) for name, one in tensors.items()}
