"""API keys: their records, the repositories of records, and the lookup of a presented key.

A record has only a hash of its key. A key is 256 random bits, so its plain SHA-256 can't be
reversed by guessing. Records stay after a revocation: after the first key was made, requests always
need a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import orjson

from service.errors import ConfigError, ConflictError, UnknownModelError
from service.store.locked_file import LockedFile
from service.store.store_interface import Store
from service.types import Limits

_PREFIX = "coe-"
_NO_DIGEST = bytes(32)
# The store's table of key records.
_TABLE = "keys"
# The number of attempts of a compare-and-set while others change the record.
_MAX_ATTEMPTS = 20

# A function from the present record to the new record. The present record is None for a new key.
Change = Callable[["KeyRecord | None"], "KeyRecord"]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The record of a key. Times are seconds since 1970, digests hexadecimal.

    Attributes:
        id: The key's public id.
        tenant: The name of its tenant.
        digest: The SHA-256 of the key.
        created_s: When the key was made.
        label: The administrator's description of the key.
        expires_s: When the key expires, or None.
        revoked_s: When the key was revoked, or None.
        experts: The experts that the key may use. None allows all experts.
        priority: The key's priority in queues. None means the tenant's priority.
        limits: The key's own limits.
        old_digest: The digest of the key before a rotation, valid until `old_until_s`.
        old_until_s: The end of the grace period of a rotation.
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
        """Serialize as JSON."""
        return orjson.dumps(asdict(self))

    def to_public(self, now_s: float) -> dict[str, object]:
        """Return the record as JSON for administrators, without the digests."""
        known = {k: v for k, v in asdict(self).items() if not k.startswith(("digest", "old_"))}
        return {**known, "state": self.state(now_s)}

    def state(self, now_s: float) -> str:
        """Return the key's state: active, revoked or expired."""
        if self.revoked_s is not None:
            return "revoked"
        if self.expires_s is not None and self.expires_s <= now_s:
            return "expired"
        return "active"


def loads(data: bytes) -> KeyRecord:
    """Parse a record that `dumps` wrote.

    Raises:
        ConfigError: The record is damaged.
    """
    try:
        fields = orjson.loads(data)
        fields["limits"] = Limits(**fields["limits"])
        fields["experts"] = tuple(fields["experts"]) if fields["experts"] is not None else None
        record = KeyRecord(**fields)
        for digest in (record.digest, record.old_digest):
            bytes.fromhex(digest)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        # The original error may quote the record.
        raise ConfigError("a record of an API key is damaged, or of another version") from None
    return record


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> tuple[str, str, str]:
    """Make a new key. Return its public id, the key itself, and its digest."""
    key_id = secrets.token_hex(6)
    key = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
    return key_id, key, digest_of(key)


class KeyTable:
    """Looks up a presented key by its digest."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self.records = {record.id: record for record in records}
        self._by_prefix: dict[str, list[tuple[bytes, float, KeyRecord]]] = {}
        for record in self.records.values():
            pairs = [(record.digest, float("inf")), (record.old_digest, record.old_until_s)]
            for digest, until_s in pairs:
                if digest:
                    entry = (bytes.fromhex(digest), until_s, record)
                    self._by_prefix.setdefault(digest[:8], []).append(entry)

    def find(self, key: str, now_s: float) -> KeyRecord | None:
        """Return the record of a key, even if the key has expired or was revoked.

        The timing reveals nothing about other keys. The lookup uses a hash, which clients can't
        choose, and whole digests are compared in constant time.
        """
        shown = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found: KeyRecord | None = None
        for digest, until_s, record in self._by_prefix.get(
            shown[:4].hex(), [(_NO_DIGEST, 0.0, None)]
        ):
            if hmac.compare_digest(shown, digest) and until_s > now_s:
                found = record
        return found


class KeyRepository(Protocol):
    """The storage of key records."""

    async def version(self) -> bytes | None:
        """Return a value that differs after every change, or None before the first key.

        Raises:
            StoreUnavailableError: The records can't be reached.
        """

    async def load(self) -> list[KeyRecord]:
        """Return all records.

        Raises:
            StoreUnavailableError: The records can't be reached.
            ConfigError: A record is damaged.
        """

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        """Replace a record by the result of `change`, atomically.

        `change` may be called more than once, and its errors are raised.

        Raises:
            StoreUnavailableError: The records can't be reached.
        """


class StoreKeyRepository:
    """Key records in the store that gateways share."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def version(self) -> bytes | None:
        return await self._store.version(_TABLE)

    async def load(self) -> list[KeyRecord]:
        return [loads(data) for data in (await self._store.records(_TABLE)).values()]

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        for _ in range(_MAX_ATTEMPTS):
            data = (await self._store.records(_TABLE)).get(key_id)
            record = change(loads(data) if data is not None else None)
            if await self._store.replace(_TABLE, key_id, data, record.dumps()):
                return record
        raise ConflictError(
            f"key {key_id[:64]!r} was changed by others at the same time: try again"
        )


class FileKeyRepository:
    """Key records in a file with mode 0600, for a store in memory.

    The file is read and written in threads, because another process may hold its lock.
    """

    def __init__(self, path: Path) -> None:
        self._file = LockedFile(path)

    async def version(self) -> bytes | None:
        return self._file.version()

    async def load(self) -> list[KeyRecord]:
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[KeyRecord]:
        lines = (self._file.read() or b"").splitlines()
        try:
            return [loads(line) for line in lines if line.strip()]
        except ConfigError as error:
            raise ConfigError(f"{self._file.path}: {error.message}") from None

    async def change(self, key_id: str, change: Change) -> KeyRecord:
        return await asyncio.to_thread(self._change, key_id, change)

    def _change(self, key_id: str, change: Change) -> KeyRecord:
        with self._file.locked():
            records = {record.id: record for record in self._read()}
            record = records[key_id] = change(records.get(key_id))
            self._file.replace(b"".join(each.dumps() + b"\n" for each in records.values()))
        return record


class KeyService:
    """Creates, lists, rotates and revokes keys."""

    def __init__(self, repository: KeyRepository) -> None:
        self._repository = repository

    async def create(self, wanted: KeyRecord, now_s: float) -> tuple[KeyRecord, str]:
        """Make a key with the attributes of `wanted`. Only this method returns the key itself."""
        key_id, key, digest = new_key()
        record = replace(wanted, id=key_id, digest=digest, created_s=now_s)
        return await self._repository.change(key_id, lambda _: record), key

    async def records(self) -> Sequence[KeyRecord]:
        """Return all records from old to new."""
        return sorted(
            await self._repository.load(), key=lambda record: (record.created_s, record.id)
        )

    async def rotate(self, key_id: str, now_s: float, grace_s: float) -> tuple[KeyRecord, str]:
        """Replace a key. The old key stays valid for `grace_s` seconds.

        Raises:
            UnknownModelError: There is no such key.
            ConflictError: The key is not active.
        """
        _, key, digest = new_key()

        def rotated(record: KeyRecord | None) -> KeyRecord:
            record = _existing(record, key_id)
            if record.state(now_s) != "active":
                raise ConflictError(f"key {key_id!r} is {record.state(now_s)}: make a new one")
            return replace(
                record, digest=digest, old_digest=record.digest, old_until_s=now_s + grace_s
            )

        return await self._repository.change(key_id, rotated), key

    async def revoke(self, key_id: str, now_s: float) -> KeyRecord:
        """Revoke a key for good.

        Raises:
            UnknownModelError: There is no such key.
        """

        def revoked(record: KeyRecord | None) -> KeyRecord:
            record = _existing(record, key_id)
            return record if record.revoked_s is not None else replace(record, revoked_s=now_s)

        return await self._repository.change(key_id, revoked)


def _existing(record: KeyRecord | None, key_id: str) -> KeyRecord:
    """Return the record.

    Raises:
        UnknownModelError: There is no record.
    """
    if record is None:
        raise UnknownModelError(f"no key {key_id[:64]!r} is kept here", code="key_not_found")
    return record
