"""A pool's folder of shared weights. The pool makes and removes it; its engines write the files.

A file's name is made of the expert and the version of its source files, so a stale file is never
found. A file that no engine holds is removed a little later, so that an expert which moves to
another engine, or whose engine restarts, is only mapped again; it is removed at once where its room
is needed. The pool locks its folder; folders without a lock belong to pools that were killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.engine.shared_memory import SUFFIX, UNFINISHED_SUFFIX
from service.errors import ExpertFailedError
from service.models.file_version import version_of

log = logging.getLogger("coe.engine")

SHARED_MEMORY = Path("/dev/shm")
# How long weights stay that no engine holds: after their eviction, and after their engine's end.
KEEP_EVICTED_S, KEEP_ENDED_S = 10.0, 120.0
_LOCK = "owner"
_YOUNG_S = 60.0


class SharedWeightCache:
    """One pool's shared weights. Its methods may be called from any thread.

    Args:
        bound_bytes: The most bytes of all files; None: there is no bound.
        root: Folder of shared memory.
        clock: Returns the time in s.

    Raises:
        ExpertFailedError: The folder can't be made.
    """

    def __init__(
        self,
        bound_bytes: int | None,
        *,
        root: Path = SHARED_MEMORY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bound_bytes = bound_bytes
        self._clock = clock
        self._holders: dict[str, set[str]] = {}
        # Keys that no engine holds, and until when their files stay.
        self._unheld: dict[str, float] = {}
        # Removing gigabytes takes a while, so it runs in other threads than the event loop's.
        self._mutex = threading.RLock()
        remove_dead_folders(root)
        name = f"coe-{os.getuid()}-{secrets.token_hex(8)}"
        fresh = root / f".{name}"
        try:
            fresh.mkdir(mode=0o700)
            self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # It gets its name when it is locked, so that no pool takes it for a dead pool's.
            self.folder = fresh.rename(root / name)
        except OSError as error:
            why = f"no folder for shared weights in {root}: {error.strerror}"
            raise ExpertFailedError(why, retry_after_s=30) from error
        about = os.statvfs(root)
        if (there := about.f_blocks * about.f_frsize) < (bound_bytes or 0):
            log.warning(
                "%s has %.2f GB, less than the %.2f of swap.host_bytes: weights that do not fit "
                "will fail to load",
                root,
                there / 1e9,
                (bound_bytes or 0) / 1e9,
            )

    def key(self, expert: str, version: str) -> str:
        """Prefix of the names of an expert's files."""
        digest = hashlib.blake2b(f"{expert}\0{version}".encode(), digest_size=12)
        return digest.hexdigest()

    def hold(self, engine: str, key: str) -> None:
        """An engine maps an expert's weights, or is about to."""
        with self._mutex:
            self._holders.setdefault(key, set()).add(engine)
            self._unheld.pop(key, None)

    def release(self, engine: str, key: str, stays_s: float = KEEP_EVICTED_S) -> None:
        """An engine has unmapped an expert's weights. Their files stay for `stays_s`, in s."""
        with self._mutex:
            holders = self._holders.get(key)
            if holders is None:
                return
            holders.discard(engine)
            if not holders:
                del self._holders[key]
                self._unheld[key] = self._clock() + stays_s

    def release_all(self, engine: str) -> None:
        """An engine has ended. Its unfinished files are removed."""
        with self._mutex:
            for key in [key for key, holders in self._holders.items() if engine in holders]:
                self.release(engine, key, KEEP_ENDED_S)
            for path in self.folder.glob(f"*.{engine}{UNFINISHED_SUFFIX}"):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove files that no engine has held for long enough. Does nothing in a stopped pool."""
        with self._mutex:
            for key in [key for key, until_s in self._unheld.items() if until_s <= self._clock()]:
                self._remove(key)

    def make_room(self, coming: str, size_bytes: int = 0) -> None:
        """Remove files that no engine holds, longest unheld first, until an expert has room.

        Args:
            coming: Key of the expert.
            size_bytes: Size of its source files. Its tensors may be larger, if they are converted
                to another dtype, so it counts at least as large as the largest expert here.
        """
        with self._mutex:
            sizes = self.sizes()
            if coming in sizes:
                return
            size = max(size_bytes, *sizes.values()) if sizes else size_bytes
            for key in sorted(self._unheld, key=self._unheld.__getitem__):
                about = os.statvfs(self.folder)
                free = about.f_bavail * about.f_frsize
                if self.bound_bytes is not None:
                    free = min(free, self.bound_bytes - sum(self.sizes().values()))
                if size <= free:
                    return
                self._remove(key)

    def sizes(self) -> dict[str, int]:
        """Bytes by key, of all ranks together; unfinished files count."""
        found: dict[str, int] = {}
        for path in self.folder.iterdir():
            if SUFFIX in path.name:
                with suppress(FileNotFoundError):
                    key = path.name.partition("-")[0]
                    found[key] = found.get(key, 0) + path.stat().st_size
        return found

    def _remove(self, key: str) -> None:
        self._unheld.pop(key, None)
        for path in self.folder.glob(f"{key}-*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder. All engines must have stopped."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_dead_folders(root: Path = SHARED_MEMORY) -> None:
    """Remove the folders of this user's pools that were killed."""
    mine = f"coe-{os.getuid()}-"
    with suppress(OSError):
        for folder in (*root.glob(f"{mine}*"), *root.glob(f".{mine}*")):
            if _is_dead(folder):
                log.warning("removing the shared weights of a pool that was killed: %s", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        if folder.name.startswith("."):  # it is being made, or was never finished
            return time.time() - status.st_mtime > _YOUNG_S
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


class EngineShare:
    """The weights of its pool's cache that one engine holds, by expert."""

    def __init__(self, cache: SharedWeightCache) -> None:
        self._cache = cache
        self._token = secrets.token_hex(8)
        self._keys: dict[str, str] = {}

    def acquire(
        self, expert: str, folder: str, adapter: str | None, strength: float
    ) -> tuple[str, str]:
        """Hold an expert's weights, before they are loaded, and make room for them.

        Args:
            expert: Name of the expert.
            folder: Folder of full weights.
            adapter: Folder of a LoRA adapter to merge into them.
            strength: Factor of the adapter.

        Returns:
            Prefix of the paths of its files, and the token of unfinished ones.

        Raises:
            ExpertFailedError: Its folders can't be read.
        """
        cache = self._cache
        try:
            key = cache.key(expert, version_of(folder, adapter, strength))
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        except OSError as error:
            why = f"the files of expert {expert!r} can't be read: {error}"
            raise ExpertFailedError(why, retry_after_s=30) from error
        before = self._keys.get(expert)
        if before is not None and before != key:
            cache.release(self._token, before)
        self._keys[expert] = key
        cache.hold(self._token, key)
        cache.make_room(key, size)
        return str(cache.folder / key), self._token

    def release(self, expert: str) -> float:
        """The engine has unmapped an expert's weights. Returns the s after which to `sweep`."""
        if (key := self._keys.pop(expert, None)) is not None:
            self._cache.release(self._token, key)
        return KEEP_EVICTED_S

    def release_all(self) -> float:
        """The engine has ended. Returns the s after which to `sweep`."""
        self._keys.clear()
        self._cache.release_all(self._token)
        return KEEP_ENDED_S

    def sweep(self) -> None:
        self._cache.sweep()
