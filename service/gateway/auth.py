"""Authentication: finds the tenant behind a request's API key."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from functools import lru_cache
from pathlib import Path

from service.broker.limit_and_budget_ledger import limits_of
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
from service.store.api_keys import KeyRecord, KeyRepository, KeyTable, digest_of
from service.task_cancellation import cancel_and_wait
from service.types import NOBODY, Tenant

log = logging.getLogger("coe.keys")

_LOOK_S = 1.0
_MIN_KEY_LENGTH = 16


def configured(config: Config) -> list[KeyRecord]:
    """The keys that the config names.

    Raises:
        ConfigError: An environment variable holds no key, or too short a key.
    """
    return [_record(name, given) for name, given in config.keys.items()]


def _record(name: str, given: KeyConfig) -> KeyRecord:
    digest = given.sha256
    if given.key_env is not None:
        key = os.environ.get(given.key_env, "")
        if len(key) < _MIN_KEY_LENGTH:
            raise ConfigError(
                f"keys.{name}: the environment variable {given.key_env} must hold a key of at "
                f"least {_MIN_KEY_LENGTH} characters"
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
    """Whether requests need a key.

    Args:
        config: The config.
        book: The stored keys.
        marker: The file that exists once there were keys in the book.

    Raises:
        ConfigError: A key of the config can't be read.
        StoreUnavailableError: The store of keys can't be reached.
    """
    if config.server.require_keys or configured(config):
        return True
    if await book.load():
        return True
    return marker is not None and await asyncio.to_thread(marker.exists)


class Authenticator:
    """Identifies tenants by their API keys, which it reads again every second.

    Requests need a key (`needed`) where others than this machine's users can reach the service,
    unless `server.allow_unauthenticated` is set. Once there was a key, requests always need one,
    so that a store that lost its keys lets nobody in.

    Args:
        config: The config, with its own keys and tenants.
        book: The stored keys.
        secret: The cluster's secret, from which tenants' cache salts are made.
        marker: The file that remembers for the next start that there were keys.
        after: The authenticator of the config before.
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
        """Whether requests need a key. Raises StoreUnavailableError while that is unknown."""
        if not self._looked and not self._table.records:
            raise StoreUnavailableError("the store of keys can't be reached yet")
        return self._strict or self._had_keys or bool(self._table.records)

    async def start(self) -> None:
        """Read the keys, and start to read them every second."""
        await self.look()
        self._looking = asyncio.create_task(self._look_periodically())

    async def stop(self) -> None:
        """Stop the background task."""
        await cancel_and_wait(self._looking)

    async def look(self) -> None:
        """Read the keys again if they changed. While the store is away, the known ones stay."""
        try:
            version = await self._book.version()
            if version == self._version and self._looked:
                return
            kept = await self._book.load()
        except StoreUnavailableError:
            return
        except CoeError as error:
            log.error("cannot read API keys: %s", error.message)
            return
        except Exception as error:
            # The error's text may quote a record. The next look tries again.
            log.error("cannot read API keys: %s", type(error).__name__)
            return
        self._table = KeyTable([*kept, *self._own])
        self._version, self._looked = version, True
        self._remember(any_kept=bool(kept))

    def _remember(self, *, any_kept: bool) -> None:
        """Remember in the marker file that there are keys; warn where all of them are gone."""
        if any_kept and self._marker is not None and not self._marker.exists():
            try:
                self._marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._marker.touch(mode=0o600)
            except OSError as error:
                # Where the config needs keys anyway, the marker makes no difference.
                log.log(
                    logging.DEBUG if self._strict else logging.WARNING,
                    "cannot write the marker that keys are needed (%s: %s); "
                    "set server.require_keys",
                    self._marker,
                    error.strerror,
                )
        had = self._had_keys or (self._marker is not None and self._marker.exists())
        if had and not self._table.records:
            log.error(
                "the store has lost all API keys: every request is refused until there is a new "
                "key. To go on without keys, remove %s and start again",
                self._marker or "the keys' file",
            )
        self._had_keys = had or bool(self._table.records)

    async def _look_periodically(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    def identify(self, headers: dict[bytes, bytes]) -> Tenant:
        """The tenant of a request.

        Raises:
            UnauthorizedError: The key is missing, unknown, expired or revoked.
            ForbiddenError: The key's tenant is no longer in the config.
            StoreUnavailableError: It is not known yet whether keys are needed.
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

    def on_behalf(self, tenant: str, key: str) -> Tenant:
        """The tenant of work that the gateway does later, for the key that asked for it.

        Args:
            tenant: The tenant's name.
            key: The key's public id; empty where none was needed.

        Raises:
            UnauthorizedError: The key has expired, was revoked, or is not known any more.
            ForbiddenError: The tenant is no longer in the config.
            StoreUnavailableError: It is not known yet which keys there are.
        """
        if not key and not self.needed:
            return self._tenant(None, tenant) if tenant in self._tenants else NOBODY
        record = self._table.records.get(key)
        if record is None and not self._looked:
            raise StoreUnavailableError("the store of keys can't be reached yet")
        if record is None or record.tenant != tenant or record.state(time.time()) != "active":
            raise UnauthorizedError("the API key of this batch is no longer valid")
        if not known_tenant(record.tenant, self._tenants):
            raise ForbiddenError("the tenant of this API key is not in the config")
        return self._tenant(record, record.tenant)

    def _tenant(self, record: KeyRecord | None, name: str) -> Tenant:
        given = self._tenants.get(name) or TenantConfig()
        allowed = [
            frozenset(experts)
            for experts in (given.experts, record.experts if record else None)
            if experts is not None
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
    """A salt that keeps a tenant's prompts apart in prefix caches; only the cluster can make it."""
    return hmac.digest(secret.encode(), b"prefix\0" + tenant.encode(), "sha256").hex()[:32]


def _all_of(allowed: list[frozenset[str]]) -> frozenset[str] | None:
    return frozenset.intersection(*allowed) if allowed else None
