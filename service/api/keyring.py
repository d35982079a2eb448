"""Who asks: the tenant behind the key that a request shows."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from service.broker.ledger import limits_of
from service.config import Config, KeyConfig, TenantConfig
from service.config.server import LOOPBACK
from service.errors import CoeError, ConfigError, StoreGone, Unauthorized
from service.store.ending import end
from service.store.keys import KeyBook, KeyRecord, KeyTable, digest_of
from service.types import NOBODY, Tenant

log = logging.getLogger("coe.keys")

_LOOK_S = 1.0
_SHORTEST_KEY = 16


def configured(config: Config) -> list[KeyRecord]:
    """The keys that the config names. Raises ConfigError where a variable holds none."""
    return [_record(name, given) for name, given in config.keys.items()]


def _record(name: str, given: KeyConfig) -> KeyRecord:
    digest = given.sha256
    if given.key_env is not None:
        key = os.environ.get(given.key_env, "")
        if len(key) < _SHORTEST_KEY:
            raise ConfigError(
                f"keys.{name}: the environment variable {given.key_env} must hold a key of at "
                f"least {_SHORTEST_KEY} characters"
            )
        digest = digest_of(key)
    assert digest is not None
    return KeyRecord(
        name,
        given.tenant,
        digest,
        experts=given.experts,
        priority=given.priority,
        limits=limits_of(given),
    )


async def any_key(config: Config, book: KeyBook) -> bool:
    """Whether there is or was a key. Raises ConfigError, StoreGone."""
    return bool(configured(config) or await book.load())


class Keyring:
    """The keys of a service, looked at again every second.

    `needed`: whether a key has to be shown. Once there was one, always; and wherever
    others than this machine's users could ask, unless the config says `open`.
    """

    def __init__(self, config: Config, book: KeyBook) -> None:
        self._tenants = config.tenants
        self._own = configured(config)
        self._book = book
        self._table = KeyTable(self._own)
        self._version: bytes | None = None
        self._strict = config.server.host not in LOOPBACK and not config.server.open
        self._looking: asyncio.Task[None] | None = None

    @property
    def needed(self) -> bool:
        """Whether a request needs a key. Raises StoreGone while that is not known."""
        if self._version is None and not self._table.records:
            raise StoreGone("the store of keys can't be reached yet")
        return self._strict or bool(self._table.records)

    async def start(self) -> None:
        """Look at the keys, now and then every second."""
        await self.look()
        self._looking = asyncio.create_task(self._look_on())

    async def stop(self) -> None:
        """Look no more."""
        await end(self._looking)

    async def look(self) -> None:
        """Read the keys again if they changed. While the store is gone, the known ones hold."""
        try:
            version = await self._book.version()
            if version != self._version:
                self._table = KeyTable([*await self._book.load(), *self._own])
                self._version = version
        except StoreGone:
            return
        except CoeError as error:
            log.error("the keys can't be read: %s", error.message)
        except Exception as error:
            # Its own words may quote a record; and whatever it was, they are looked at again.
            log.error("the keys can't be read: %s", type(error).__name__)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """The tenant of a request. Raises Unauthorized; StoreGone while no key is known."""
        if not self.needed:
            return NOBODY if "default" not in self._tenants else self._tenant(None, "default")
        shown = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = shown.partition(" ")
        if scheme.lower() != "bearer" or not key:
            key = headers.get(b"x-api-key", b"").decode("latin-1")
        if not key:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        now_s = time.time()
        record = self._table.find(key.strip(), now_s)
        if record is None or record.revoked_s is not None:
            raise Unauthorized("this API key is not valid here")
        if record.state(now_s) == "expired":
            raise Unauthorized("this API key has expired")
        return self._tenant(record, record.tenant)

    def _tenant(self, record: KeyRecord | None, name: str) -> Tenant:
        given = self._tenants.get(name) or TenantConfig()
        allowed = [
            frozenset(one)
            for one in (given.experts, record.experts if record else None)
            if one is not None
        ]
        if record is None:
            return Tenant(name, "", _all_of(allowed), given.priority, given.weight)
        return Tenant(
            name,
            record.id,
            _all_of(allowed),
            record.priority or given.priority,
            given.weight,
            record.limits,
        )


def _all_of(allowed: list[frozenset[str]]) -> frozenset[str] | None:
    return frozenset.intersection(*allowed) if allowed else None
