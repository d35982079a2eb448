"""API keys: what is kept of each (a hash, never the key), where, and finding the one shown.

A key is 256 random bits, so a plain SHA-256 of it can't be guessed back. Records
outlive revocation: once there was a key, keys are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import orjson

from service.errors import ConfigError, ConflictError, UnknownModelError
from service.store.protocol import Store
from service.types import Limits

_PREFIX = "coe-"
_NONE = bytes(32)
# The table of the store that holds them.
_TABLE = "keys"
# How often a record is read and changed anew because somebody else changed it meanwhile.
_TRIES = 20

# What becomes of a record; None where there is no such key yet.
Change = Callable[["KeyRecord | None"], "KeyRecord"]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key. Times in seconds since 1970; digests in hexadecimal.

    `old_digest` is good until `old_until_s`: the key before a rotation.
    """

    id: str
    tenant: str
    digest: str
    created_s: float = 0.0
    label: str = ""
    expires_s: float | None = None
    revoked_s: float | None = None
    experts: tuple[str, ...] | None = None
    priority: str | None = None
    limits: Limits = field(default_factory=Limits)
    old_digest: str = ""
    old_until_s: float = 0.0

    def dumps(self) -> bytes:
        """As JSON."""
        return orjson.dumps(asdict(self))

    def to_public(self, now_s: float) -> dict[str, object]:
        """For people: everything but the hashes."""
        known = {k: v for k, v in asdict(self).items() if not k.startswith(("digest", "old_"))}
        return {**known, "state": self.state(now_s)}

    def state(self, now_s: float) -> str:
        """active, revoked or expired."""
        if self.revoked_s is not None:
            return "revoked"
        if self.expires_s is not None and self.expires_s <= now_s:
            return "expired"
        return "active"


def loads(data: bytes) -> KeyRecord:
    """The reverse of `dumps`. Raises ConfigError where it is none, of this version."""
    try:
        told = orjson.loads(data)
        told["limits"] = Limits(**told["limits"])
        told["experts"] = tuple(told["experts"]) if told["experts"] is not None else None
        record = KeyRecord(**told)
        for digest in (record.digest, record.old_digest):
            bytes.fromhex(digest)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        # Its own words may quote the record.
        raise ConfigError("a record of an API key is damaged, or of another version") from None
    return record


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> tuple[str, str, str]:
    """A new key: its public id, the key itself, and its digest."""
    key_id = secrets.token_hex(6)
    key = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
    return key_id, key, digest_of(key)


class KeyTable:
    """The keys, and which of them was shown."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self.records = {record.id: record for record in records}
        self._by_start: dict[str, list[tuple[bytes, float, KeyRecord]]] = {}
        for record in self.records.values():
            pairs = [(record.digest, float("inf")), (record.old_digest, record.old_until_s)]
            for digest, until_s in pairs:
                if digest:
                    entry = (bytes.fromhex(digest), until_s, record)
                    self._by_start.setdefault(digest[:8], []).append(entry)

    def find(self, key: str, now_s: float) -> KeyRecord | None:
        """The record of a key, expired and revoked ones included.

        The time it takes tells nothing of any key: looked up is the hash of what was
        shown, which nobody can steer, and whole hashes are compared in constant time.
        """
        shown = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found: KeyRecord | None = None
        for digest, until_s, record in self._by_start.get(shown[:4].hex(), [(_NONE, 0.0, None)]):
            if hmac.compare_digest(shown, digest) and until_s > now_s:
                found = record
        return found


class KeyBook(Protocol):
    """Where keys made by people are kept."""

    async def version(self) -> bytes | None:
        """Another one whenever a record has changed; None: no key was ever kept here.

        May raise StoreGone.
        """

    async def load(self) -> list[KeyRecord]:
        """All records. May raise StoreGone, ConfigError."""

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        """Put what `change` makes of a record in its place, with nobody coming between.

        `change` may be called more than once. May raise StoreGone, and what `change` raises.
        """


class StoreBook:
    """Keys in the store that gateways share."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def version(self) -> bytes | None:
        """See `KeyBook`."""
        return await self._store.version(_TABLE)

    async def load(self) -> list[KeyRecord]:
        """See `KeyBook`."""
        return [loads(data) for data in (await self._store.records(_TABLE)).values()]

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        """See `KeyBook`."""
        for _ in range(_TRIES):
            data = (await self._store.records(_TABLE)).get(key_id)
            record = change(loads(data) if data is not None else None)
            if await self._store.replace(_TABLE, key_id, data, record.dumps()):
                return record
        raise ConflictError(
            f"key {key_id[:64]!r} is being changed by others all the time: try again"
        )


class FileBook:
    """Keys in a file of their own, its owner's alone; for a store that forgets.

    The file is read and written in threads: a lock on it may be held by another process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def version(self) -> bytes | None:
        """See `KeyBook`."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return f"{found.st_mtime_ns}.{found.st_ino}.{found.st_size}".encode()

    async def load(self) -> list[KeyRecord]:
        """See `KeyBook`."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[KeyRecord]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        try:
            return [loads(line) for line in lines if line.strip()]
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error.message}") from None

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        """See `KeyBook`."""
        return await asyncio.to_thread(self._change, key_id, change)

    def _change(self, key_id: str, change: Change) -> KeyRecord:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            records = {one.id: one for one in self._read()}
            record = records[key_id] = change(records.get(key_id))
            partial = self._path.with_suffix(f".{os.getpid()}")
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(b"".join(one.dumps() + b"\n" for one in records.values()))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        return record

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """While this runs, nobody else changes the file, in this process or another."""
        lock = os.open(self._path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


class Keys:
    """Making, listing, rotating and revoking keys in a book."""

    def __init__(self, book: KeyBook) -> None:
        self._book = book

    async def create(self, wanted: KeyRecord, now_s: float) -> tuple[KeyRecord, str]:
        """A new key with what `wanted` says of it. Only here is the key itself told."""
        key_id, key, digest = new_key()
        record = replace(wanted, id=key_id, digest=digest, created_s=now_s)
        return await self._book.change(key_id, lambda _: record), key

    async def records(self) -> Sequence[KeyRecord]:
        """All of them, oldest first."""
        return sorted(await self._book.load(), key=lambda one: (one.created_s, one.id))

    async def rotate(self, key_id: str, now_s: float, grace_s: float) -> tuple[KeyRecord, str]:
        """Another key in its place; the old one is good for `grace_s` more.

        Raises UnknownModelError (404), ConflictError.
        """
        _, key, digest = new_key()

        def rotated(record: KeyRecord | None) -> KeyRecord:
            record = _known(record, key_id)
            if record.state(now_s) != "active":
                raise ConflictError(f"key {key_id!r} is {record.state(now_s)}: make a new one")
            return replace(
                record, digest=digest, old_digest=record.digest, old_until_s=now_s + grace_s
            )

        return await self._book.change(key_id, rotated), key

    async def revoke(self, key_id: str, now_s: float) -> KeyRecord:
        """From now on it is worth nothing, whatever else is done to it.

        Raises UnknownModelError.
        """

        def revoked(record: KeyRecord | None) -> KeyRecord:
            record = _known(record, key_id)
            return record if record.revoked_s is not None else replace(record, revoked_s=now_s)

        return await self._book.change(key_id, revoked)


def _known(record: KeyRecord | None, key_id: str) -> KeyRecord:
    """Raises UnknownModelError (404)."""
    if record is None:
        raise UnknownModelError(f"no key {key_id[:64]!r} is kept here", code="key_not_found")
    return record
