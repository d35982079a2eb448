"""One expert's tensors in one file of shared memory, which several engines map. No torch here.

The file consists of a JSON header with each tensor's dtype, shape and offset, and of the tensors.
The tensors have the layout of a GPU engine, so that an engine only maps the file. A file gets its
final name when it is complete, so that every file with a final name is usable. Its memory is
reserved first, so that a lack of memory is an error instead of a later signal.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SUFFIX, UNFINISHED_SUFFIX = ".weights", ".new"
_MAGIC = b"coeW2\0\0\0"
_LENGTH = struct.Struct("<Q")
# Alignment of every tensor (a cache line) and of the first one (a page, for fast copies).
_ALIGN_BYTES, _PAGE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        dtype: The name of the dtype.
        shape: The shape.
        size_bytes: The size in bytes.
        strides: The strides, in elements, of values that lie in another order. It is empty where
            the values are in the order of the dimensions.
        offset: The place in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    strides: tuple[int, ...] = ()
    offset: int = 0


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor], int]:
    """Compute the header, the tensors with their offsets, and the size of the file in bytes."""
    places: dict[str, Tensor] = {}
    at = 0
    for name, tensor in tensors.items():
        places[name] = replace(tensor, offset=at)
        at = _up(at + tensor.size_bytes, _ALIGN_BYTES)
    header_data = {
        n: [tensor.dtype, tensor.shape, tensor.size_bytes, tensor.strides, tensor.offset]
        for n, tensor in places.items()
    }
    text = json.dumps(header_data, separators=(",", ":")).encode()
    header = _MAGIC + _LENGTH.pack(len(text)) + text
    begin = _up(len(header), _PAGE_BYTES)
    moved = {name: replace(tensor, offset=begin + tensor.offset) for name, tensor in places.items()}
    return header, moved, begin + at


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(frozen=True, slots=True)
class MappedTensors:
    """A complete file that is mapped into this process and shared with other processes.

    The memory stays as long as an object refers to it, even after the file was unlinked.
    """

    tensors: Mapping[str, Tensor]
    memory: mmap.mmap


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    fill: Callable[[str, memoryview], None],
    token: str,
) -> MappedTensors:
    """Write a file of tensors and keep it mapped. If it exists already, map the existing file.

    Args:
        path: The final path of the file.
        tensors: The tensors, in the order of the file.
        fill: A function that writes the bytes of a tensor, given by name, to memory.
        token: A part of the name of the incomplete file. It identifies the writer.

    Raises:
        OSError: There is not enough memory (ENOSPC), or the file can't be written. No file is left.
        Exception: Any error of `fill`. No file is left.
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
            for name, tensor in places.items():
                with view[tensor.offset : tensor.offset + tensor.size_bytes] as part:
                    fill(name, part)
        try:
            os.link(partial, path)  # unlike a rename, a link never replaces a file
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
    """Map a file of tensors, if it exists.

    Args:
        path: The path of the file.
        tensors: The tensors that the file must hold, by name, dtype, shape and strides.

    Raises:
        ValueError: The file holds other tensors, or it is not a file of tensors.
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
        raise ValueError(f"{path.name}: it holds other tensors than the model has")
    return MappedTensors(held, memory)


def _read(memory: mmap.mmap) -> dict[str, Tensor]:
    size = len(memory)
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack(memory[len(_MAGIC) : start])
    if memory[: len(_MAGIC)] != _MAGIC or start + length > size:
        raise ValueError("not a file of weights")
    header_data: dict[str, Any] = json.loads(memory[start : start + length])
    begin = _up(start + length, _PAGE_BYTES)
    held = {
        name: Tensor(dtype, tuple(shape), size_bytes, tuple(strides), begin + offset)
        for name, (dtype, shape, size_bytes, strides, offset) in header_data.items()
    }
    for name, tensor in held.items():
        if tensor.offset + tensor.size_bytes > size:
            raise ValueError(f"{name} is cut short")
    return held


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: replace(tensor, offset=0) for name, tensor in tensors.items()}
