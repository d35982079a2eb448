"""A pool's folder of shared weights: made by the pool, filled by its engines, removed by the pool.

Files are named by expert and version (what its weights are made of), so a stale one is never
found. A file goes when no engine of the pool holds it: a little later, as an expert that moves to
another engine, or whose engine is started again, is then only mapped there; at once where its room
is wanted. The owner keeps a lock; folders whose lock is free belong to pools that were killed.
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
# How long weights that nobody holds stay: after they were dropped, and after their engine ended.
KEEP_EVICTED_S, KEEP_ENDED_S = 10.0, 120.0
_LOCK = "owner"
_YOUNG_S = 60.0


class SharedWeightCache:
    """One pool's shared weights. Its methods may be called from any thread.

    `bound_bytes`: what all files may take (None: no bound of its own). `clock` tells seconds.
    Raises ExpertFailedError where no folder can be made.
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
        # Keys that nobody holds, and until when they stay.
        self._left: dict[str, float] = {}
        # Giving gigabytes back to the system takes a while: not in the event loop's thread.
        self._one = threading.RLock()
        remove_dead_folders(root)
        name = f"coe-{os.getuid()}-{secrets.token_hex(8)}"
        fresh = root / f".{name}"
        try:
            fresh.mkdir(mode=0o700)
            self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # Under its own name only once it is locked: nobody takes it for a dead pool's.
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
        """What the names of an expert's files begin with."""
        digest = hashlib.blake2b(f"{expert}\0{version}".encode(), digest_size=12)
        return digest.hexdigest()

    def hold(self, engine: str, key: str) -> None:
        """An engine has an expert's weights mapped, or is about to."""
        with self._one:
            self._holders.setdefault(key, set()).add(engine)
            self._left.pop(key, None)

    def release(self, engine: str, key: str, stays_s: float = KEEP_EVICTED_S) -> None:
        """It has them no more."""
        with self._one:
            holders = self._holders.get(key)
            if holders is None:
                return
            holders.discard(engine)
            if not holders:
                del self._holders[key]
                self._left[key] = self._clock() + stays_s

    def ended(self, engine: str) -> None:
        """An engine has ended, of itself or not: what it did not finish goes with it."""
        with self._one:
            for key in [key for key, holders in self._holders.items() if engine in holders]:
                self.release(engine, key, KEEP_ENDED_S)
            for path in self.folder.glob(f"*.{engine}{UNFINISHED_SUFFIX}"):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what nobody has held for long enough. Does nothing once the pool has stopped."""
        with self._one:
            for key in [key for key, until_s in self._left.items() if until_s <= self._clock()]:
                self._remove(key)

    def make_room(self, coming: str, size_bytes: int = 0) -> None:
        """Before an expert is filled: what nobody holds goes, longest unheld first, for its sake.

        `size_bytes`: of the files that it is read from. What it will take here may be more, where
        it is computed with in another dtype: it is taken to be as large as the largest, at least.
        """
        with self._one:
            sizes = self.sizes()
            if coming in sizes:
                return
            size = max(size_bytes, *sizes.values()) if sizes else size_bytes
            for key in sorted(self._left, key=self._left.__getitem__):
                about = os.statvfs(self.folder)
                left = about.f_bavail * about.f_frsize
                if self.bound_bytes is not None:
                    left = min(left, self.bound_bytes - sum(self.sizes().values()))
                if size <= left:
                    return
                self._remove(key)

    def sizes(self) -> dict[str, int]:
        """Bytes by key, of all ranks together, those being written included."""
        found: dict[str, int] = {}
        for path in self.folder.iterdir():
            if SUFFIX in path.name:
                with suppress(FileNotFoundError):
                    key = path.name.partition("-")[0]
                    found[key] = found.get(key, 0) + path.stat().st_size
        return found

    def _remove(self, key: str) -> None:
        self._left.pop(key, None)
        for path in self.folder.glob(f"{key}-*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """The pool has stopped, its engines before it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_dead_folders(root: Path = SHARED_MEMORY) -> None:
    """Remove the folders of pools that were killed: theirs are ours to remove, nobody else's."""
    mine = f"coe-{os.getuid()}-"
    with suppress(OSError):
        for folder in (*root.glob(f"{mine}*"), *root.glob(f".{mine}*")):
            if _is_dead(folder):
                log.warning("removing the shared weights of a pool that was killed: %s", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    try:
        told = folder.lstat()
        if not stat.S_ISDIR(told.st_mode) or told.st_uid != os.getuid():
            return False
        if folder.name.startswith("."):  # being made, or never finished
            return time.time() - told.st_mtime > _YOUNG_S
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
    """What one engine has of its pool's cache, by expert."""

    def __init__(self, cache: SharedWeightCache) -> None:
        self._cache = cache
        self._token = secrets.token_hex(8)
        self._keys: dict[str, str] = {}

    def take(
        self, expert: str, folder: str, adapter: str | None, strength: float
    ) -> tuple[str, str]:
        """Before an expert's weights come: what its files' paths begin with, and whose they are.

        Raises ExpertFailedError where its folders can't be read.
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

    def give_back(self, expert: str) -> float:
        """They are not in the engine any more. Returns the s after which to `sweep`."""
        if (key := self._keys.pop(expert, None)) is not None:
            self._cache.release(self._token, key)
        return KEEP_EVICTED_S

    def end(self) -> float:
        """The engine has ended. Returns the s after which to `sweep`."""
        self._keys.clear()
        self._cache.ended(self._token)
        return KEEP_ENDED_S

    def sweep(self) -> None:
        """See `SharedWeightCache.sweep`."""
        self._cache.sweep()
