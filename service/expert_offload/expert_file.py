"""A file with the packed weights of all routed experts of a model, from which single ones are read.

The file has a first page, one record for each layer and expert, and a table. A record has the parts
of one expert one after another, and starts at a whole page, so that the pages of one record can be
dropped without those of another. The table is JSON: whose weights these are, the sizes, and a
digest of each record. The first page names the table with its digest and is written last, so that
an unfinished file is never taken for a whole one.

Records are read with `preadv` into memory that the caller owns. The kernel's copy of the pages is
dropped after each read and write (`posix_fadvise`), so that the page cache does not hold what the
caller has no memory for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.errors import ArtifactError

PAGE_BYTES = 4096
_MAGIC = b"coe-experts-1\n"
# Behind the magic: the table's offset, its length, and its digest.
_FIRST = struct.Struct(f"<{len(_MAGIC)}sQQ32s")
_MAX_TABLE_BYTES = 100_000_000
# Written pages can be dropped only once they are on the disk.
_FLUSH_BYTES = 64 * 1024**2
_READ_BYTES = 8 * 1024**2
_PARTIAL = ".partial"


class ExpertFileError(ArtifactError):
    """A file of packed experts is damaged, changed or of another model, or can't be written."""

    code = "invalid_expert_file"


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The sizes of all records of a file.

    Attributes:
        layers: The number of layers with routed experts.
        experts: The number of routed experts of each layer.
        parts: The bytes of each part of an expert.
    """

    layers: int
    experts: int
    parts: tuple[int, ...]

    @property
    def expert_bytes(self) -> int:
        """The bytes of one expert of one layer."""
        return sum(self.parts)

    @property
    def record_bytes(self) -> int:
        """The bytes of a record, which is whole pages."""
        return -(-self.expert_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def table_offset(self) -> int:
        """The offset of the table, behind all records."""
        return PAGE_BYTES + self.layers * self.experts * self.record_bytes

    def offset(self, layer: int, expert: int) -> int:
        """Return the offset of a record."""
        return PAGE_BYTES + (layer * self.experts + expert) * self.record_bytes


def expert_file_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Return the path of the file for an identity in a folder of such files."""
    digest = hashlib.blake2b(_canonical(identity), digest_size=16).hexdigest()
    return folder / f"{digest}.experts"


class ExpertFileWriter:
    """Writes a file next to its place, and puts it there when it is whole.

    The experts may come in any order. An exception in the `with` block leaves no file. Unfinished
    files of processes that have died are removed.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], sizes: ExpertSizes) -> None:
        """Reserve the space on the disk.

        Raises:
            ExpertFileError: There is no space, or the folder can't be written.
        """
        self._path = path
        self._identity = dict(identity)
        self._sizes = sizes
        self._digests: dict[int, str] = {}
        self._unflushed: list[tuple[int, int]] = []
        self._partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
        with self._typed():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with self._typed():
                fcntl.flock(self._file, fcntl.LOCK_EX)
                os.posix_fallocate(self._file, 0, sizes.table_offset)
        except BaseException:
            self._abandon()
            raise

    def write(self, layer: int, expert: int, parts: Sequence[memoryview]) -> None:
        """Write one expert.

        Args:
            layer: The place of the layer among those with routed experts.
            expert: The number of the expert.
            parts: Its parts, in order.

        Raises:
            ExpertFileError: The disk is full or fails.
            ValueError: The parts have other sizes.
        """
        views = [part.cast("B") for part in parts]
        if tuple(map(len, views)) != self._sizes.parts:
            raise ValueError(f"parts of {tuple(map(len, views))} bytes, not {self._sizes.parts}")
        digest = hashlib.blake2b(digest_size=16)
        offset = start = self._sizes.offset(layer, expert)
        for view in views:
            digest.update(view)
            while view:
                with self._typed():
                    written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        self._digests[layer * self._sizes.experts + expert] = digest.hexdigest()
        self._unflushed.append((start, self._sizes.record_bytes))
        if len(self._unflushed) * self._sizes.record_bytes >= _FLUSH_BYTES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the file into its place, if it is whole.

        Raises:
            ExpertFileError: The disk is full or fails.
            ValueError: An expert was not written.
        """
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise
        os.close(self._file)

    def _finish(self) -> None:
        count = self._sizes.layers * self._sizes.experts
        if missing := sorted(set(range(count)) - self._digests.keys()):
            layer, expert = divmod(missing[0], self._sizes.experts)
            raise ValueError(
                f"{len(missing)} of {count} experts were not written; the first is expert {expert} "
                f"of layer {layer}"
            )
        table = _canonical(
            {
                "identity": self._identity,
                "layers": self._sizes.layers,
                "experts": self._sizes.experts,
                "parts": list(self._sizes.parts),
                "digests": [self._digests[place] for place in range(count)],
            }
        )
        offset = self._sizes.table_offset
        first = _FIRST.pack(_MAGIC, offset, len(table), _digest(table))
        with self._typed():
            _write_all(self._file, table, offset)
            self._flush()
            _write_all(self._file, first, 0)
            os.fsync(self._file)
            os.replace(self._partial, self._path)

    def _flush(self) -> None:
        with self._typed():
            os.fdatasync(self._file)
        for offset, length in self._unflushed:
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_DONTNEED)
        self._unflushed.clear()

    def _abandon(self) -> None:
        os.close(self._file)
        with contextlib.suppress(OSError):
            self._partial.unlink()

    def _typed(self) -> contextlib.AbstractContextManager[None]:
        return _typed(self._path, self._sizes.table_offset)


class ExpertFile:
    """A whole file of packed experts, open for reading. Threads may read at the same time."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], sizes: ExpertSizes, *, verify: bool
    ) -> None:
        """Open a file and check it.

        Args:
            path: The file.
            identity: Whose weights the file must have.
            sizes: The sizes that it must have.
            verify: Whether all records are read and compared with their digests. Only the process
                that has just written the file can do without.

        Raises:
            ExpertFileError: The file is truncated, changed, or of other weights.
            FileNotFoundError: There is no such file.
        """
        self._path = path
        self._sizes = sizes
        self._file = os.open(path, os.O_RDONLY)
        try:
            # Taken before anything is read, so that no change after it goes unseen.
            self._status = self._read_status()
            self._digests = self._read_table(identity)
            if verify:
                self._verify()
            self._check_unchanged()
        except OSError as error:
            os.close(self._file)
            raise self._damaged(str(error)) from error
        except BaseException:
            os.close(self._file)
            raise

    @property
    def sizes(self) -> ExpertSizes:
        """The sizes of the records."""
        return self._sizes

    def read(self, layer: int, expert: int, parts: Sequence[memoryview]) -> None:
        """Read an expert's parts into the caller's memory.

        Raises:
            ExpertFileError: The file has changed since it was opened, or the disk fails. The
                memory then has arbitrary content.
            ValueError: The memory has other sizes.
        """
        views = [part.cast("B") for part in parts]
        if tuple(map(len, views)) != self._sizes.parts:
            raise ValueError(f"memory of {tuple(map(len, views))} bytes, not {self._sizes.parts}")
        start = self._sizes.offset(layer, expert)
        offset = start
        try:
            while views:
                count = os.preadv(self._file, views, offset)
                if count == 0:
                    raise self._damaged("it ends too early")
                offset += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
            os.posix_fadvise(self._file, start, self._sizes.record_bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._damaged(str(error)) from error
        # A change during the read is seen, too.
        self._check_unchanged()

    def close(self) -> None:
        """Close the file. No thread may be reading."""
        os.close(self._file)

    def _read_status(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._read_status() != self._status:
            raise self._damaged("it has changed while it was in use")

    def _read_table(self, identity: Mapping[str, Any]) -> list[str]:
        first = os.pread(self._file, _FIRST.size, 0)
        if len(first) < _FIRST.size:
            raise self._damaged("it ends too early")
        magic, offset, length, digest = _FIRST.unpack(first)
        if magic != _MAGIC:
            raise self._damaged("it does not begin like such a file")
        if length > _MAX_TABLE_BYTES or offset + length != self._status[0]:
            raise self._damaged(f"it has {self._status[0]} bytes, not {offset + length}")
        table = os.pread(self._file, length, offset)
        if _digest(table) != digest:
            raise self._damaged("its table does not match its digest")
        found = json.loads(table)
        if found["identity"] != json.loads(_canonical(identity)):
            raise self._damaged("it is of other weights")
        sizes = ExpertSizes(found["layers"], found["experts"], tuple(found["parts"]))
        if sizes != self._sizes or offset != sizes.table_offset:
            raise self._damaged(f"it has {sizes}, not {self._sizes}")
        digests: list[str] = found["digests"]
        return digests

    def _verify(self) -> None:
        buffer = memoryview(bytearray(min(_READ_BYTES, self._sizes.record_bytes)))
        for place, expected in enumerate(self._digests):
            layer, expert = divmod(place, self._sizes.experts)
            start = offset = self._sizes.offset(layer, expert)
            left = self._sizes.expert_bytes
            digest = hashlib.blake2b(digest_size=16)
            while left:
                count = os.preadv(self._file, [buffer[:left]], offset)
                if count == 0:
                    raise self._damaged("it ends too early")
                digest.update(buffer[:count])
                offset, left = offset + count, left - count
            os.posix_fadvise(self._file, start, self._sizes.record_bytes, os.POSIX_FADV_DONTNEED)
            if digest.hexdigest() != expected:
                raise self._damaged(f"expert {expert} of layer {layer} does not match its digest")

    def _damaged(self, why: str) -> ExpertFileError:
        return ExpertFileError(
            f"{self._path}: {why}; delete the file, and the next start packs the experts again"
        )


def _remove_abandoned(folder: Path) -> None:
    """Remove unfinished files that no process is writing."""
    for path in folder.glob(f".*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)


class _typed(contextlib.AbstractContextManager[None]):  # noqa: N801  # reads as a function
    """Turns errors of the system into an `ExpertFileError` that names the file."""

    def __init__(self, path: Path, needed_bytes: int) -> None:
        self._path = path
        self._needed_bytes = needed_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, OSError):
            return
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"{why}: {self._needed_bytes / 1e9:.2f} GB are needed"
        raise ExpertFileError(f"{self._path}: the experts can't be packed: {why}") from error


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
