"""Who asks: the tenant behind the key that a request shows."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from functools import lru_cache
from pathlib import Path

from service.broker.ledger import limits_of
from service.config import Config, KeyConfig, TenantConfig
from service.config.server import LOOPBACK
from service.config.tenants import known_tenant
from service.errors import (
    CoeError,
    ConfigError,
    ForbiddenError,
    StoreUnavailableError,
    UnauthorizedError,
)
from service.gateway.audit_log import REFUSALS
from service.store.keys import KeyRecord, KeyRepository, KeyTable, digest_of
from service.tasks import cancel_and_wait
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


async def any_key(config: Config, book: KeyRepository, marker: Path | None = None) -> bool:
    """Whether a key has to be shown. Raises ConfigError, StoreUnavailableError.

    `marker`: the file that says that there were keys in the book.
    """
    if config.server.require_keys or configured(config):
        return True
    if await book.load():
        return True
    return marker is not None and await asyncio.to_thread(marker.exists)


class Authenticator:
    """The keys of a service, looked at again every second.

    `needed`: whether a key has to be shown. Wherever others than this machine's users could ask,
    unless `server.allow_unauthenticated` is set; and once there was one, always: a store that
    lost its keys lets nobody in. For the next start that is remembered by the file `marker`.
    `after`: the one of the config before. `secret`: the cluster's, of which tenants' cache salts
    are made.
    """

    def __init__(
        self,
        config: Config,
        book: KeyRepository,
        *,
        secret: str = "",
        marker: Path | None = None,
        after: Authenticator | None = None,
    ) -> None:
        self._secret = secret
        self._tenants = config.tenants
        self._own = configured(config)
        self._book = book
        self._table = KeyTable(self._own)
        self._version: bytes | None = None
        self._looked = False
        server = config.server
        self._strict = server.require_keys or (
            server.host not in LOOPBACK and not server.allow_unauthenticated
        )
        self._marker = marker
        self._had_keys: bool = after is not None and after._had_keys
        self._looking: asyncio.Task[None] | None = None

    @property
    def needed(self) -> bool:
        """Whether a request needs a key. Raises StoreUnavailableError while that is not known."""
        if not self._looked and not self._table.records:
            raise StoreUnavailableError("the store of keys can't be reached yet")
        return self._strict or self._had_keys or bool(self._table.records)

    async def start(self) -> None:
        """Look at the keys, now and then every second."""
        await self.look()
        self._looking = asyncio.create_task(self._look_on())

    async def stop(self) -> None:
        """Look no more."""
        await cancel_and_wait(self._looking)

    async def look(self) -> None:
        """Read the keys again if they changed. While the store is gone, the known ones hold."""
        try:
            version = await self._book.version()
            if version == self._version and self._looked:
                return
            kept = await self._book.load()
        except StoreUnavailableError:
            return
        except CoeError as error:
            log.error("the keys can't be read: %s", error.message)
            return
        except Exception as error:
            # Its own words may quote a record; and whatever it was, they are looked at again.
            log.error("the keys can't be read: %s", type(error).__name__)
            return
        self._table = KeyTable([*kept, *self._own])
        self._version, self._looked = version, True
        self._remember(any_kept=bool(kept))

    def _remember(self, *, any_kept: bool) -> None:
        """That there are keys; or, where there are none any more, that there were."""
        if any_kept and self._marker is not None and not self._marker.exists():
            try:
                self._marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._marker.touch(mode=0o600)
            except OSError as error:
                # Where they are needed in any case, it makes no difference.
                log.log(
                    logging.DEBUG if self._strict else logging.WARNING,
                    "that keys are needed here can't be remembered for the next start (%s: %s); "
                    "set server.require_keys",
                    self._marker,
                    error.strerror,
                )
        had = self._had_keys or (self._marker is not None and self._marker.exists())
        if had and not self._table.records:
            log.error(
                "there were API keys, and none is kept any more: nobody is let in until there is "
                "one. To go on without keys, remove %s and start again",
                self._marker or "the keys' file",
            )
        self._had_keys = had or bool(self._table.records)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """The tenant of a request.

        Raises UnauthorizedError; ForbiddenError where the key's tenant is not in the config any
        more; StoreUnavailableError while no key is known.
        """
        if not self.needed:
            return NOBODY if NOBODY.name not in self._tenants else self._tenant(None, NOBODY.name)
        shown = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = shown.partition(" ")
        if scheme.lower() != "bearer" or not key:
            key = headers.get(b"x-api-key", b"").decode("latin-1")
        if not key:
            REFUSALS.refused("none", headers)
            raise UnauthorizedError("an API key is needed: Authorization: Bearer KEY")
        now_s = time.time()
        record = self._table.find(key.strip(), now_s)
        if record is None:
            REFUSALS.refused("unknown", headers)
            raise UnauthorizedError("this API key is not valid here")
        if (state := record.state(now_s)) != "active":
            REFUSALS.refused(state, headers, key=record.id, tenant=record.tenant)
            if state == "expired":
                raise UnauthorizedError("this API key has expired")
            raise UnauthorizedError("this API key is not valid here")
        if not known_tenant(record.tenant, self._tenants):
            REFUSALS.refused("tenant", headers, key=record.id, tenant=record.tenant)
            raise ForbiddenError("the tenant of this API key is not in the config")
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
            "" if given.share_prefix else cache_salt(self._secret, name),
        )


@lru_cache(maxsize=4096)
def cache_salt(secret: str, tenant: str) -> str:
    """What keeps a tenant's prompts apart in prefix caches: nobody else can make it."""
    return hmac.digest(secret.encode(), b"prefix\0" + tenant.encode(), "sha256").hex()[:32]


def _all_of(allowed: list[frozenset[str]]) -> frozenset[str] | None:
    return frozenset.intersection(*allowed) if allowed else None
