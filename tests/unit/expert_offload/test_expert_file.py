"""The file of packed experts gives back what was written, or a typed error, never other weights."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.expert_offload.expert_file import (
    PAGE_BYTES,
    ExpertFile,
    ExpertFileError,
    ExpertFileWriter,
    ExpertSizes,
    expert_file_path,
)

IDENTITY = {"weights": "abc", "dtype": "float32"}
SIZES = ExpertSizes(2, 3, (5000, 700))


def _expert(layer: int, expert: int, sizes: ExpertSizes = SIZES) -> list[bytes]:
    chance = random.Random(layer * 100 + expert)
    return [chance.randbytes(size) for size in sizes.parts]


def _write(folder: Path, sizes: ExpertSizes = SIZES, seed: int = 0) -> Path:
    path = expert_file_path(folder, IDENTITY)
    places = [(i, j) for i in range(sizes.layers) for j in range(sizes.experts)]
    random.Random(seed).shuffle(places)
    with ExpertFileWriter(path, IDENTITY, sizes) as writer:
        for place in places:
            writer.write(*place, [memoryview(part) for part in _expert(*place, sizes)])
    return path


def _read(file: ExpertFile, layer: int, expert: int) -> list[bytes]:
    memory = [bytearray(size) for size in file.sizes.parts]
    file.read(layer, expert, [memoryview(part) for part in memory])
    return [bytes(part) for part in memory]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    layers=st.integers(1, 2),
    experts=st.integers(1, 3),
    parts=st.lists(st.sampled_from([1, 4095, 4096, 9000]), min_size=1, max_size=3),
    seed=st.integers(0, 5),
)
def test_experts_are_read_as_they_were_written(
    tmp_path: Path, layers: int, experts: int, parts: list[int], seed: int
) -> None:
    sizes = ExpertSizes(layers, experts, tuple(parts))
    file = ExpertFile(_write(tmp_path, sizes, seed), IDENTITY, sizes, verify=True)
    for layer in range(layers):
        for expert in range(experts):
            assert _read(file, layer, expert) == _expert(layer, expert, sizes)
    file.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _write(tmp_path_factory.mktemp("whole")).read_bytes()


def _weights_at(place: int) -> bool:
    """Whether a byte of the file is one of a weight or of the table, and no padding."""
    if place < PAGE_BYTES:
        return place < 62
    if place >= SIZES.table_offset:
        return True
    return (place - PAGE_BYTES) % SIZES.record_bytes < SIZES.expert_bytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_file_with_a_changed_byte_is_refused(
    tmp_path: Path, whole: bytes, data: st.DataObject
) -> None:
    place = data.draw(
        st.one_of(
            st.integers(0, 61),
            st.integers(PAGE_BYTES, SIZES.table_offset - 1).filter(_weights_at),
            st.integers(SIZES.table_offset, len(whole) - 1),
        )
    )
    damaged = bytearray(whole)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "a.experts"
    path.write_bytes(damaged)
    with pytest.raises(ExpertFileError, match="delete the file"):
        ExpertFile(path, IDENTITY, SIZES, verify=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_truncated_or_longer_file_is_refused(
    tmp_path: Path, whole: bytes, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(whole) + 5000).filter(lambda n: n != len(whole)))
    path = tmp_path / "a.experts"
    path.write_bytes((whole + bytes(5000))[:length])
    for verify in (True, False):
        with pytest.raises(ExpertFileError, match="delete the file"):
            ExpertFile(path, IDENTITY, SIZES, verify=verify)


@pytest.mark.parametrize(
    ("identity", "sizes", "message"),
    [
        (IDENTITY | {"dtype": "bfloat16"}, SIZES, "of other weights"),
        (IDENTITY, ExpertSizes(3, 2, (5000, 700)), "not ExpertSizes"),
        (IDENTITY, ExpertSizes(2, 3, (700, 5000)), "not ExpertSizes"),
    ],
)
def test_file_of_other_weights_is_refused(
    tmp_path: Path, whole: bytes, identity: dict[str, str], sizes: ExpertSizes, message: str
) -> None:
    path = tmp_path / "a.experts"
    path.write_bytes(whole)
    with pytest.raises(ExpertFileError, match=message):
        ExpertFile(path, identity, sizes, verify=True)


@pytest.mark.parametrize("change", ["truncate", "write", "append"])
def test_change_in_use_is_an_error(tmp_path: Path, change: str) -> None:
    path = _write(tmp_path)
    os.utime(path, ns=(0, 0))
    file = ExpertFile(path, IDENTITY, SIZES, verify=True)
    assert _read(file, 1, 2) == _expert(1, 2)
    with path.open("r+b") as other:
        if change == "truncate":
            other.truncate(PAGE_BYTES * 3)
        else:
            other.seek(
                *((SIZES.offset(1, 2), os.SEEK_SET) if change == "write" else (0, os.SEEK_END))
            )
            other.write(b"x")
    with pytest.raises(ExpertFileError, match=r"has changed|ends too early"):
        _read(file, 1, 2)
    file.close()


def test_unwritten_expert_leaves_no_file(tmp_path: Path) -> None:
    path = expert_file_path(tmp_path, IDENTITY)
    with (
        pytest.raises(ValueError, match="5 of 6 experts were not written; the first is expert 0"),
        ExpertFileWriter(path, IDENTITY, SIZES) as writer,
    ):
        writer.write(1, 2, [memoryview(part) for part in _expert(1, 2)])
    assert list(tmp_path.iterdir()) == []


def test_error_while_packing_leaves_no_file(tmp_path: Path) -> None:
    path = expert_file_path(tmp_path, IDENTITY)
    with pytest.raises(RuntimeError, match="stop"), ExpertFileWriter(path, IDENTITY, SIZES):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_typed_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExpertFileError, match=r"No space left on device: 0\.00 GB are needed"):
        ExpertFileWriter(expert_file_path(tmp_path, IDENTITY), IDENTITY, SIZES)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(ExpertFileError, match="No space left"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_read_error_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ExpertFile(_write(tmp_path), IDENTITY, SIZES, verify=False)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ExpertFileError, match="Input/output error"):
        _read(file, 0, 0)
    file.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ExpertFile(_write(tmp_path), IDENTITY, SIZES, verify=False)
    whole_read = os.preadv

    def short(number: int, views: Sequence[memoryview], offset: int) -> int:
        return whole_read(number, [views[0][:777]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert _read(file, 1, 1) == _expert(1, 1)
    file.close()


def test_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".x.experts.1.partial"
    dead.write_bytes(b"x")
    path = expert_file_path(tmp_path, IDENTITY)
    with contextlib.suppress(RuntimeError), ExpertFileWriter(path, IDENTITY, SIZES):
        assert not dead.exists()
        # The file that is being written is not taken for one of a dead process.
        second = ExpertFileWriter(path.with_name("second.experts"), IDENTITY, SIZES)
        assert len(list(tmp_path.glob(".*.partial"))) == 2
        with contextlib.suppress(RuntimeError), second:
            raise RuntimeError
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        ExpertFile(path, IDENTITY, SIZES, verify=True)


@pytest.mark.parametrize("parts", [(5000,), (700, 5000), (5000, 701)])
def test_parts_of_other_sizes_are_refused(tmp_path: Path, parts: tuple[int, ...]) -> None:
    memory = [memoryview(bytearray(size)) for size in parts]
    file = ExpertFile(_write(tmp_path), IDENTITY, SIZES, verify=False)
    with pytest.raises(ValueError, match=r"not \(5000, 700\)"):
        file.read(0, 0, memory)
    file.close()
    with (
        pytest.raises(ValueError, match=r"not \(5000, 700\)"),
        ExpertFileWriter(tmp_path / "b.experts", IDENTITY, SIZES) as writer,
    ):
        writer.write(0, 0, memory)
