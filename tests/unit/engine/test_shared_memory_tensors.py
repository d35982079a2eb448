"""Weights in shared memory: whole or not there, the same bytes for everybody, gone at the end."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.engine import shared_memory_tensors
from service.engine.shared_memory_tensors import Tensor, layout_of, map_file, write_file
from service.engine.shared_weight_cache import (
    KEEP_ENDED_S,
    KEEP_EVICTED_S,
    EngineShare,
    SharedWeightCache,
    remove_dead_folders,
)
from service.errors import ExpertFailedError
from service.models.weights_version import version_of

TENSORS = {
    "w": Tensor("float32", (3, 4), 48),
    "none": Tensor("float32", (0, 7), 0),
    "b": Tensor("bfloat16", (5,), 10),
}
_COMMON = """
import sys
from pathlib import Path
from service.engine.shared_memory_tensors import Tensor, map_file, write_file
TENSORS = {"w": Tensor("float32", (3, 4), 48), "none": Tensor("float32", (0, 7), 0),
           "b": Tensor("bfloat16", (5,), 10)}
"""


def fill(name: str, part: memoryview) -> None:
    part[:] = bytes((i + ord(name[0])) % 256 for i in range(len(part)))


def value(name: str, size: int) -> bytes:
    made = bytearray(size)
    fill(name, memoryview(made))
    return bytes(made)


def child(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMON + code, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_write_then_map_in_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "k-0of1.weights"
    mine = write_file(path, TENSORS, fill, "t")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert all(tensor.offset % 64 == 0 for tensor in mine.tensors.values())
    assert min(tensor.offset for tensor in mine.tensors.values()) % 4096 == 0
    reader = child(
        """
mapped = map_file(Path(sys.argv[1]), TENSORS)
for name, one in mapped.tensors.items():
    print(mapped.memory[one.offset:one.offset + one.size_bytes].hex())
one = mapped.tensors["b"]
mapped.memory[one.offset] = 0  # not a copy: the writer sees it
""",
        path,
    )
    out, _ = reader.communicate(timeout=30)
    assert reader.returncode == 0
    assert out.split("\n")[:3] == [
        value(n, tensor.size_bytes).hex() for n, tensor in TENSORS.items()
    ]
    assert mine.memory[mine.tensors["b"].offset] == 0
    # Its memory stays for who has mapped it, when its name has gone.
    path.unlink()
    w = mine.tensors["w"]
    assert mine.memory[w.offset : w.offset + w.size_bytes] == value("w", 48)


def test_write_by_a_killed_process_leaves_no_usable_file(tmp_path: Path) -> None:
    cache = SharedWeightCache(None, root=tmp_path)
    share = EngineShare(cache)
    begin, token = share.acquire("a", str(tmp_path), None, 1.0)
    path = Path(f"{begin}-0of1.weights")
    writer = child(
        """
def fill(name, part):
    part[:] = b"x" * len(part)
    print(name, flush=True)
    sys.stdin.read()
write_file(Path(sys.argv[1]), TENSORS, fill, sys.argv[2])
""",
        path,
        token,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "w\n"
    assert map_file(path, TENSORS) is None
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=30)
    assert map_file(path, TENSORS) is None
    assert len(list(cache.folder.glob("*.new"))) == 1
    # Another engine is not in its way, and its own end takes what it left.
    assert write_file(path, TENSORS, fill, "other").tensors.keys() == TENSORS.keys()
    share.release_all()
    assert [p.name for p in cache.folder.glob("*w*") if p.name != "owner"] == [path.name]
    cache.close()


def test_write_of_an_existing_file_uses_the_first_writer_s(tmp_path: Path) -> None:
    path = tmp_path / "k.weights"

    def slow(name: str, part: memoryview) -> None:
        if name == "w":
            write_file(path, TENSORS, fill, "first")
        part[:] = b"\1" * len(part)

    second = write_file(path, TENSORS, slow, "second")
    w = second.tensors["w"]
    assert second.memory[w.offset : w.offset + w.size_bytes] == value("w", 48)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_write_that_raises_leaves_no_file(tmp_path: Path) -> None:
    def broken(name: str, part: memoryview) -> None:
        raise RuntimeError(f"no {name} of {len(part)}")

    with pytest.raises(RuntimeError, match="no w of 48"):
        write_file(tmp_path / "k.weights", TENSORS, broken, "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "b": Tensor("float16", (5,), 10)},
        {**TENSORS, "w": Tensor("float32", (4, 3), 48)},
        {"w": TENSORS["w"]},
    ],
)
def test_map_with_other_tensors_raises(other: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "k.weights"
    write_file(path, TENSORS, fill, "t")
    with pytest.raises(ValueError, match="other tensors"):
        map_file(path, other)
    assert layout_of(other)[0] != layout_of(TENSORS)[0]


@pytest.mark.parametrize("keep", [0, 10, 4095, 4096, 4100])
def test_map_of_a_truncated_or_foreign_file_raises(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "k.weights"
    write_file(path, TENSORS, fill, "t")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a file of weights|cut short"):
        map_file(path, TENSORS)
    path.write_bytes(b"\xff" * 8192)
    with pytest.raises(ValueError, match="not a file of weights"):
        map_file(path, TENSORS)


def test_write_without_room_raises_enospc_instead_of_a_signal(tmp_path: Path) -> None:
    """Really so: more than this machine's shared memory has."""
    cache = SharedWeightCache(None)
    try:
        huge = {"w": Tensor("float32", (1 << 48,), 1 << 50)}
        with pytest.raises(OSError, match=r"no room for 1\d+\.\d\d GB .* /dev/shm has") as caught:
            write_file(cache.folder / "k.weights", huge, fill, "t")
        assert caught.value.errno == errno.ENOSPC
        assert [p.name for p in cache.folder.iterdir()] == ["owner"]
    finally:
        cache.close()
    writer = child(
        f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * resource.getpagesize()}, ) * 2)
try:
    write_file(Path(sys.argv[1]), {{"w": Tensor("float32", (1 << 20,), 1 << 22)}}, None, "t")
except OSError as error:
    print(error.strerror)
""",
        tmp_path / "k.weights",
    )
    out, _ = writer.communicate(timeout=30)
    assert "swap.host_bytes smaller" in out
    assert list(tmp_path.iterdir()) == []


def test_write_other_os_errors_are_raised_unchanged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(shared_memory_tensors.os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="broken"):
        write_file(tmp_path / "k.weights", TENSORS, fill, "t")
    assert list(tmp_path.iterdir()) == []


# --- the folder


def a_model(folder: Path) -> str:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"abc")
    return str(folder)


def test_version_of_changes_with_any_file_of_the_folder(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m")
    adapter = a_model(tmp_path / "a")
    before = version_of(folder, None, 1.0)
    assert version_of(folder, None, 0.5) == before  # nothing that a strength could be of
    versions = {before, version_of(folder, adapter, 1.0), version_of(folder, adapter, 0.5)}
    weights = tmp_path / "m/model.safetensors"
    status = weights.stat()
    weights.write_bytes(b"abd")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    versions.add(version_of(folder, None, 1.0))
    (tmp_path / "new").write_bytes(b"abd")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (tmp_path / "new").rename(weights)
    versions.add(version_of(folder, None, 1.0))
    assert len(versions) == 5


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def hold(cache: SharedWeightCache, share: EngineShare, expert: str, folder: str) -> Path:
    begin, token = share.acquire(expert, folder, None, 1.0)
    path = Path(f"{begin}-0of1.weights")
    if map_file(path, TENSORS) is None:
        write_file(path, TENSORS, fill, token)
    return path


def test_shared_cache_keeps_a_file_while_held_and_for_a_grace_time(tmp_path: Path) -> None:
    clock = Clock()
    cache = SharedWeightCache(None, root=tmp_path, clock=clock)
    folder = a_model(tmp_path / "m")
    one, other = EngineShare(cache), EngineShare(cache)
    path = hold(cache, one, "a", folder)
    assert hold(cache, other, "a", folder) == path
    assert hold(cache, one, "b", folder) != path
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert one.release("a") == KEEP_EVICTED_S
    clock.now_s += 1000
    cache.sweep()
    assert path.exists()
    other.release("a")
    clock.now_s += KEEP_EVICTED_S - 1
    cache.sweep()
    assert path.exists()
    assert hold(cache, other, "a", folder) == path  # it was but mapped again
    clock.now_s += 2
    cache.sweep()
    assert path.exists()
    # Of an engine that ended it stays for the next one's start.
    assert other.release_all() == KEEP_ENDED_S
    clock.now_s += KEEP_EVICTED_S + 1
    cache.sweep()
    assert path.exists()
    clock.now_s += KEEP_ENDED_S
    cache.sweep()
    assert not path.exists()
    assert len(cache.sizes()) == 1
    cache.close()
    assert not cache.folder.exists()
    cache.sweep()  # a timer that comes too late
    one.release_all()


def test_shared_cache_makes_room_from_files_that_nobody_holds(tmp_path: Path) -> None:
    clock = Clock()
    cache = SharedWeightCache(None, root=tmp_path, clock=clock)
    folder = a_model(tmp_path / "m")
    share = EngineShare(cache)
    paths = {name: hold(cache, share, name, folder) for name in "abc"}
    size = paths["a"].stat().st_size
    cache.bound_bytes = 3 * size
    share.release("b")
    clock.now_s += 1
    share.release("a")
    share.acquire("b", folder, None, 1.0)  # is there: nothing has to go
    assert all(path.exists() for path in paths.values())
    share.release("b")
    share.acquire("d", folder, None, 1.0)
    assert [name for name, path in paths.items() if path.exists()] == ["b", "c"]
    share.acquire("e", folder, None, 1.0)
    assert [name for name, path in paths.items() if path.exists()] == ["b", "c"]
    hold(cache, share, "d", folder)
    share.acquire("f", folder, None, 1.0)
    assert [name for name, path in paths.items() if path.exists()] == ["c"]
    cache.close()


def test_make_room_for_a_larger_expert_removes_enough_files(tmp_path: Path) -> None:
    cache = SharedWeightCache(None, root=tmp_path, clock=(clock := Clock()))
    folder = a_model(tmp_path / "m")
    share = EngineShare(cache)
    paths = {name: hold(cache, share, name, folder) for name in "abc"}
    size = paths["a"].stat().st_size
    cache.bound_bytes = 4 * size
    for name in "abc":
        share.release(name)
        clock.now_s += 1
    large = tmp_path / "large"
    large.mkdir()
    (large / "model-00001-of-00002.safetensors").write_bytes(bytes(size))
    (large / "model-00002-of-00002.safetensors").write_bytes(bytes(2 * size))
    share.acquire("large", str(large), None, 1.0)
    assert [name for name, path in paths.items() if path.exists()] == ["c"]
    cache.close()


def test_shared_cache_changed_model_files_get_a_new_file(tmp_path: Path) -> None:
    cache = SharedWeightCache(None, root=tmp_path, clock=(clock := Clock()))
    folder = a_model(tmp_path / "m")
    share = EngineShare(cache)
    old = hold(cache, share, "a", folder)
    (tmp_path / "m/model.safetensors").write_bytes(b"longer")
    new = hold(cache, share, "a", folder)
    assert new != old
    clock.now_s += KEEP_EVICTED_S
    cache.sweep()
    assert (old.exists(), new.exists()) == (False, True)
    cache.close()
    with pytest.raises(ExpertFailedError, match="'a' can't be read"):
        share.acquire("a", str(tmp_path / "none"), None, 1.0)


def test_shared_cache_removes_folders_of_dead_pools_only(tmp_path: Path) -> None:
    living = SharedWeightCache(None, root=tmp_path)
    pool = child(
        """
from service.engine.shared_weight_cache import SharedWeightCache
cache = SharedWeightCache(None, root=Path(sys.argv[1]))
(cache.folder / "x.weights").write_bytes(b"x")
print(cache.folder, flush=True)
sys.stdin.read()
""",
        tmp_path,
    )
    assert pool.stdout is not None
    left = Path(pool.stdout.readline().strip())
    remove_dead_folders(tmp_path)
    assert left.exists()
    pool.send_signal(signal.SIGKILL)
    pool.communicate(timeout=30)
    (tmp_path / f"coe-{os.getuid() + 1}-00").mkdir()
    (tmp_path / f".coe-{os.getuid()}-young").mkdir()
    old = tmp_path / f".coe-{os.getuid()}-old"
    old.mkdir()
    os.utime(old, (0, 0))
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / f"coe-{os.getuid()}-link").symlink_to(target)
    again = SharedWeightCache(None, root=tmp_path)
    assert not left.exists()
    assert not old.exists()
    assert target.exists()
    assert living.folder.exists()
    assert (tmp_path / f".coe-{os.getuid()}-young").exists()
    assert (tmp_path / f"coe-{os.getuid() + 1}-00").exists()
    living.close()
    again.close()


def test_shared_cache_warns_when_shared_memory_is_below_host_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SharedWeightCache(1 << 20, root=tmp_path).close()
    assert caplog.text == ""
    SharedWeightCache(1 << 60, root=tmp_path).close()
    assert "less than the 1152921504.61 of swap.host_bytes" in caplog.text


def test_shared_cache_without_shared_memory_raises(tmp_path: Path) -> None:
    with pytest.raises(ExpertFailedError, match="no folder for shared weights in"):
        SharedWeightCache(None, root=tmp_path / "none")
