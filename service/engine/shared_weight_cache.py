"""A pool's folder of shared weights. The pool owns it, and the pool's engines write the files.

A file's name has the expert and the version of its source files, so that a stale file is never
used. A file that no engine holds stays for a while. An expert that moves to another engine, or
whose engine restarts, is then only mapped again. An unheld file is removed at once where its room
is needed. The pool locks its folder. A folder without a lock belongs to a killed pool.
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

from service.engine.shared_memory_tensors import SUFFIX, UNFINISHED_SUFFIX
from service.errors import ExpertFailedError
from service.models.weights_version import version_of

log = logging.getLogger("coe.engine")

SHARED_MEMORY = Path("/dev/shm")
# Seconds that unheld weights stay after an eviction, and after the end of their engine.
KEEP_EVICTED_S, KEEP_ENDED_S = 10.0, 120.0
_LOCK = "owner"
_YOUNG_S = 60.0


class SharedWeightCache:
    """One pool's shared weights. Its methods may be called from any thread.

    Args:
        bound_bytes: The largest total size of all files in bytes. None means no bound.
        root: The folder of shared memory.
        clock: A function that returns the time in seconds.

    Raises:
        ExpertFailedError: The folder can't be created.
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
        # The keys that no engine holds, with the times until which their files stay.
        self._unheld: dict[str, float] = {}
        # The removal of gigabytes takes a while, so it does not run in the event loop's thread.
        self._mutex = threading.RLock()
        remove_dead_folders(root)
        name = f"coe-{os.getuid()}-{secrets.token_hex(8)}"
        fresh = root / f".{name}"
        try:
            fresh.mkdir(mode=0o700)
            self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # The folder is locked before it gets its name, so that no other pool removes it.
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
        """Return the prefix of the names of an expert's files."""
        digest = hashlib.blake2b(f"{expert}\0{version}".encode(), digest_size=12)
        return digest.hexdigest()

    def hold(self, engine: str, key: str) -> None:
        """Record that an engine maps an expert's weights, or is about to map them."""
        with self._mutex:
            self._holders.setdefault(key, set()).add(engine)
            self._unheld.pop(key, None)

    def release(self, engine: str, key: str, stays_s: float = KEEP_EVICTED_S) -> None:
        """Record that an engine has unmapped weights. Their files stay for `stays_s` seconds."""
        with self._mutex:
            holders = self._holders.get(key)
            if holders is None:
                return
            holders.discard(engine)
            if not holders:
                del self._holders[key]
                self._unheld[key] = self._clock() + stays_s

    def release_all(self, engine: str) -> None:
        """Release all weights of an engine that has ended, and remove its incomplete files."""
        with self._mutex:
            for key in [key for key, holders in self._holders.items() if engine in holders]:
                self.release(engine, key, KEEP_ENDED_S)
            for path in self.folder.glob(f"*.{engine}{UNFINISHED_SUFFIX}"):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the files whose time has expired. In a stopped pool this does nothing."""
        with self._mutex:
            for key in [key for key, until_s in self._unheld.items() if until_s <= self._clock()]:
                self._remove(key)

    def make_room(self, coming: str, size_bytes: int = 0) -> None:
        """Remove unheld files until an expert has room. The longest unheld files go first.

        Args:
            coming: The key of the expert.
            size_bytes: The size of its source files in bytes. Its tensors may be larger after a
                conversion to another dtype, so the expert counts at least as much as the largest
                expert here.
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
        """Return the bytes by key, over all ranks and including incomplete files."""
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
        if folder.name.startswith("."):  # the folder is being made, or was never completed
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
        """Hold an expert's weights before they are loaded, and make room for them.

        Args:
            expert: The name of the expert.
            folder: The folder of full weights.
            adapter: The folder of a LoRA adapter to merge into the weights.
            strength: The factor of the adapter.

        Returns:
            The path prefix of the expert's files, and the token for incomplete files.

        Raises:
            ExpertFailedError: The expert's folders can't be read.
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
        """Release weights that the engine has unmapped. Return the seconds until a `sweep`."""
        if (key := self._keys.pop(expert, None)) is not None:
            self._cache.release(self._token, key)
        return KEEP_EVICTED_S

    def release_all(self) -> float:
        """Release all weights of an ended engine. Return the seconds until a `sweep`."""
        self._keys.clear()
        self._cache.release_all(self._token)
        return KEEP_ENDED_S

    def sweep(self) -> None:
        self._cache.sweep()
