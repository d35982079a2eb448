"""Reads headers of safetensors files and writes such files, without torch.

A header gives every tensor's type, shape and offset, so planning needs only a few kilobytes of a
file. The writer takes one tensor at a time, so that a conversion never holds a model twice.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from service.errors import ModelStoreError

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file's header. `begin` is the offset of its data in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data_bytes: int
    begin: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of one safetensors file. An incomplete file is refused."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelStoreError(f"{path}: not a file")
        file_bytes = found.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelStoreError(f"{path}: cut short: not even a safetensors header in it")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > _MAX_HEADER_BYTES:
                raise ModelStoreError(f"{path}: not a safetensors file (header of absurd length)")
            if 8 + header_bytes > file_bytes:
                raise ModelStoreError(f"{path}: cut short within its safetensors header")
            raw = file.read(header_bytes)
    except OSError as error:
        raise ModelStoreError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        # The header is decoded first, because the parser would guess the encoding of bytes.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
        tensors, end = _parse_header(header, 8 + header_bytes)
    except RecursionError:
        raise ModelStoreError(
            f"{path}: corrupt safetensors header: it is nested too deeply"
        ) from None
    except (ValueError, TypeError) as error:
        raise ModelStoreError(f"{path}: corrupt safetensors header: {str(error)[:200]}") from error
    expected = 8 + header_bytes + end
    if file_bytes < expected:
        raise ModelStoreError(
            f"{path}: cut short: {file_bytes} bytes on disk, its header asks for {expected}"
        )
    if file_bytes > expected:
        raise ModelStoreError(
            f"{path}: corrupt: {file_bytes} bytes on disk, its header allows only {expected}"
        )
    return tensors


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Duplicate keys are refused, because readers treat them differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _parse_header(header: object, data: int) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors of a header and the end of the last tensor.

    Raises:
        ValueError, TypeError: The header is invalid.
    """
    if not isinstance(header, dict):
        raise TypeError("it is not an object")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise TypeError(f"entry {name!r} is not an object")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
        shape = _counts(entry.get("shape"), f"tensor {name!r}: shape")
        offsets = _counts(entry.get("data_offsets"), f"tensor {name!r}: data_offsets")
        if len(offsets) != 2:
            raise ValueError(f"tensor {name!r}: data_offsets are not two numbers")
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
            raise ValueError(f"tensor {name!r}: shape and byte range disagree")
        tensors[name] = TensorInfo(name, dtype, shape, end - begin, data + begin)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("tensors overlap or leave a hole")
        position = end
    return tensors, position


def _counts(value: object, what: str) -> tuple[int, ...]:
    """Parse a list of at most 64 integers from 0 to 2⁶³ - 1.

    Raises:
        ValueError: The value is not such a list.
    """
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError(f"{what} is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    for item in value:
        if type(item) is not int or not 0 <= item <= _MAX_COUNT:
            raise ValueError(f"{what} holds something else than a whole number from 0 to 2^63 - 1")
    return tuple(value)


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the name of the dtype of most elements."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += tensor.elements
    most = elements.most_common(1)[0][0]
    return _DTYPE_NAMES.get(most, most.lower())


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the file's first bytes, for tensors name -> (dtype, shape) in the given order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format needs aligned data
    return struct.pack("<Q", len(raw)) + raw


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> Iterator[int]:
    """Write chunks to `path`, and yield the size of each chunk after it was written."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            yield len(chunk)
