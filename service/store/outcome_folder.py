"""The folder of outcomes from traffic: a file for each tenant and day, readable by its owner only.

Gateways on one machine share the folder, by a lock. A tenant's outcomes can be forgotten while
gateways run: the mark that stays keeps them from adding requests that were answered before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

Row = dict[str, Any]

_EVERYBODY = ".forgotten"
_MARK = ".forgotten-"
_HASH_KEY = ".hash-key"


def default_folder() -> Path:
    """The folder where the config names none: beside the admin key."""
    home = os.environ.get("COE_HOME")
    return (Path(home) if home else Path.home() / ".config" / "coe") / "shadow-outcomes"


class OutcomeFolder:
    """Outcomes by tenant and day.

    Args:
        path: The folder. It is made, for its owner only, when the first outcome is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def hash_of(self, prompt: str) -> str:
        """A keyed hash of a prompt: equal for equal prompts, and useless without the folder's key.

        Raises:
            OSError: The key can't be read or written.
        """
        with self._locked():
            where = self.path / _HASH_KEY
            if not where.exists():
                _write(where, secrets.token_bytes(32), os.O_TRUNC)
            key = where.read_bytes()
        return hashlib.blake2b(
            prompt.encode("utf-8", "replace"), key=key, digest_size=16
        ).hexdigest()

    def add(self, tenant: str, row: Mapping[str, Any], answered_s: float) -> bool:
        """Add an outcome.

        Args:
            tenant: The tenant whose request it is.
            row: The outcome, as JSON.
            answered_s: When the request was answered, in seconds since 1970.

        Returns:
            False where the tenant's outcomes were forgotten since, and nothing is written.

        Raises:
            OSError: It can't be written.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        with self._locked():
            for mark in (_EVERYBODY, _MARK + _quoted(tenant)):
                with contextlib.suppress(FileNotFoundError):
                    if float((self.path / mark).read_text()) >= answered_s:
                        return False
            folder = self.path / _quoted(tenant)
            folder.mkdir(mode=0o700, exist_ok=True)
            _write(folder / f"{_day(answered_s)}.jsonl", line + b"\n", os.O_APPEND)
        return True

    def rows(self, tenant: str | None = None) -> Iterator[tuple[str, Row]]:
        """Yield the outcomes with their tenants, oldest days first.

        Args:
            tenant: Only this tenant's.

        Raises:
            OSError: A file can't be read.
        """
        for folder in self._folders(tenant):
            for file in sorted(folder.glob("*.jsonl")):
                # A file may be deleted meanwhile, and its last line may be in the writing.
                with contextlib.suppress(FileNotFoundError):
                    for line in file.read_bytes().split(b"\n")[:-1]:
                        yield unquote(folder.name), json.loads(line)

    def forget(self, now_s: float, tenant: str | None = None) -> int:
        """Delete the outcomes of a tenant, or of everybody, and keep running gateways from more.

        Args:
            now_s: Requests that were answered until then are not added any more.
            tenant: Only this tenant's.

        Returns:
            How many outcomes were deleted.

        Raises:
            OSError: A file can't be deleted.
        """
        count = 0
        with self._locked():
            mark = _EVERYBODY if tenant is None else _MARK + _quoted(tenant)
            _write(self.path / mark, repr(now_s).encode(), os.O_TRUNC)
            for folder in self._folders(tenant):
                for file in folder.glob("*.jsonl"):
                    count += file.read_bytes().count(b"\n")
                    file.unlink()
                folder.rmdir()
        return count

    def expire(self, now_s: float, keep_days: int) -> int:
        """Delete the files of days that are more than `keep_days` ago, and return how many.

        Raises:
            OSError: A file can't be deleted.
        """
        if not self.path.is_dir():
            return 0
        oldest = (datetime.fromtimestamp(now_s, UTC) - timedelta(days=keep_days)).date()
        count = 0
        with self._locked():
            for folder in self._folders(None):
                for file in folder.glob("*.jsonl"):
                    if file.stem < oldest.isoformat():
                        file.unlink()
                        count += 1
        return count

    def _folders(self, tenant: str | None) -> list[Path]:
        if tenant is not None:
            folder = self.path / _quoted(tenant)
            return [folder] if folder.is_dir() else []
        if not self.path.is_dir():
            return []
        return sorted(one for one in self.path.iterdir() if one.is_dir())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _write(path: Path, data: bytes, how: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
    finally:
        os.close(handle)


def _quoted(tenant: str) -> str:
    # A name of dots only would be a folder above.
    return quote(tenant, safe="").replace(".", "%2E")


def _day(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d")
