"""Redis, asked: scripts and values, over connections with a timeout. The only user of `redis`.

It knows nothing of outages: whatever can't be done now raises StoreUnavailableError.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import orjson
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from service.errors import ConfigError, StoreUnavailableError
from service.store import redis_scripts
from service.store.protocol import Account, AccountBalance, Granted, Refused, StoreClaim, UsageNote

log = logging.getLogger("coe.store")

_CONNECTIONS = 64
# Account, start, reserved, used; limit, and length and part of a sliding window.
Lines = Sequence[tuple[str, int, int, int, int, int, int]]


# What a refusal means, by its class and by its first word. Their own words are not told: they may
# hold an address or a user's name.
_REFUSALS: tuple[tuple[type[RedisError], str], ...] = (
    (AuthenticationError, "refused authentication: wrong user or password in its URL, or none"),
    (NoPermissionError, "refused permission: its user lacks commands or keys in the ACL"),
    (OutOfMemoryError, "is full: it refuses to keep more (maxmemory)"),
    (ReadOnlyError, "is read-only: its URL names a replica, not the primary"),
    (BusyLoadingError, "is still loading its data"),
)
_CLUSTER_WORDS = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN")
_CLUSTER = "is a node of a Redis cluster, which is not supported: a single Redis is needed"


def refusal(error: RedisError) -> str | None:
    """What Redis' refusal means, as a predicate; None where it can't be reached at all."""
    for kind, what in _REFUSALS:
        if isinstance(error, kind):
            return what
    if not isinstance(error, ResponseError):
        return None
    # Some of its errors come without their first word, by which the class was chosen.
    name = type(error).__name__.upper().removesuffix("ERROR")
    text = str(error)
    if text.startswith(_CLUSTER_WORDS) or name in _CLUSTER_WORDS or "cluster node" in text:
        return _CLUSTER
    return "refused"


# Tables that were one value for each record before: the name of their version, and the prefix
# of their records' names.
_FORMER_TABLES = {"keys": ("keys-version", "key/")}


async def _scan(redis: Redis, pattern: str) -> list[bytes]:
    return [name async for name in redis.scan_iter(pattern, count=1000)]


def _escape(text: str) -> str:
    """Escape what Redis' patterns give a meaning."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


class RedisConnections:
    """Connections to one Redis. `what` it is, for errors: "the store"."""

    def __init__(self, url: str, *, timeout_s: float, what: str) -> None:
        self._what = what
        try:
            pool = ConnectionPool.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # Twice might count twice: who asks decides what follows from a fault.
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
        except (ValueError, RedisError):
            # Its own text may quote the URL, and with it a password.
            raise ConfigError(f"{what}: the Redis URL can't be understood") from None
        self.redis: Redis = Redis(connection_pool=pool)
        # Not the library's blocking pool, whose waiters hang on an asyncio.Condition: a plain
        # bound, with a time limit of its own.
        self._places = asyncio.Semaphore(_CONNECTIONS)
        self._timeout_s = timeout_s

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    async def ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask when there is a place among the connections. Raises StoreUnavailableError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._places.acquire()
            try:
                return await ask()
            finally:
                self._places.release()
        except (TimeoutError, RedisError, OSError) as error:
            why = refusal(error) if isinstance(error, RedisError) else None
            if why is None:
                # The kind only: the text may hold the address.
                why = f"can't be reached ({type(error).__name__})"
            elif why == "refused":
                # Its words quote no values.
                log.error("%s refused: %s", self._what, str(error)[:200])
            raise StoreUnavailableError(f"{self._what} {why}") from None


class RedisClient:
    """One owner's connection to Redis.

    `clock`, in seconds since 1970, stands in for the server's own: for tests.
    """

    def __init__(
        self,
        url: str,
        owner: str,
        *,
        prefix: str,
        timeout_s: float,
        lease_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.owner = owner
        self._clock = clock
        self._prefix = f"{{{prefix}}}"
        self._lease_ms = int(lease_s * 1000)
        self._connections = RedisConnections(url, timeout_s=timeout_s, what="the store")
        self._redis = self._connections.redis
        self._ask = self._connections.ask
        scripts = {
            "reserve": redis_scripts.RESERVE,
            "settle": redis_scripts.SETTLE,
            "undo": redis_scripts.UNDO,
            "beat": redis_scripts.BEAT,
            "leave": redis_scripts.LEAVE,
            "restore": redis_scripts.RESTORE,
            "balances": redis_scripts.BALANCES,
            "replace": redis_scripts.REPLACE,
        }
        self._scripts = {name: self._redis.register_script(text) for name, text in scripts.items()}

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """See `Store`. Raises StoreUnavailableError also for a claim that was undone already."""
        told = await self._run(
            "reserve",
            id=claim.id,
            tokens=claim.tokens,
            least=claim.least,
            lines=[
                {
                    "account": self._account(line.account),
                    "base": line.base,
                    "per_token": line.per_token,
                }
                for line in claim.lines
            ],
        )
        if "gone" in told:
            raise StoreUnavailableError("the store answered too late")
        if (refused := told.get("refused")) is not None:
            wait = refused["wait"]
            return Refused(
                refused["account"], wait / 1000 if wait >= 0 else None, bool(refused["busy"])
            )
        return Granted(
            claim,
            int(told["tokens"]),
            tuple(map(int, told["amounts"])),
            tuple(map(int, told["starts"])),
        )

    async def settle(
        self, claim_id: str, lines: Lines, note: UsageNote | None, *, offline: bool = False
    ) -> None:
        """Put `used` in the place of what was reserved."""
        await self._run(
            "settle",
            id=claim_id,
            lines=[[name, *map(str, numbers)] for name, *numbers in lines],
            note=_note(note),
            offline=offline,
        )

    async def undo(self, claim_id: str) -> None:
        """A claim of which nobody knows whether it was granted: it is not, now or later."""
        await self._run("undo", id=claim_id)

    async def beat(
        self,
        number: int,
        share: float,
        slices: Sequence[tuple[Account, int, int]],
        batch: int,
        notes: Sequence[UsageNote],
    ) -> dict[str, Any]:
        """This owner is there. `slices`: account, what it has of it, how much more it wants."""
        return cast(
            dict[str, Any],
            await self._run(
                "beat",
                beat=number,
                share=share,
                slices=[
                    {"account": self._account(account), "have": have, "more": more}
                    for account, have, more in slices
                ],
                batch=batch,
                notes=[_note(one) for one in notes],
            ),
        )

    async def leave(self) -> None:
        """Give back all that this owner holds."""
        await self._run("leave")

    async def restore(self, claims: Sequence[tuple[str, Lines]]) -> None:
        """Claims that hold, for a store that has lost them."""
        await self._run(
            "restore",
            claims=[
                {"id": claim_id, "lines": [[n, str(start), str(r)] for n, start, r, *_ in lines]}
                for claim_id, lines in claims
            ],
        )

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        """See `Store`."""
        told = await self._run("balances", accounts=[self._account(one) for one in accounts])
        return [AccountBalance(*map(int, one)) for one in told]

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        """See `Store`."""
        found = []
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self._key("n", name))
            found = await self._ask(pipe.execute)
        return [{key.decode(): int(value) for key, value in one.items()} for one in found]

    async def records(self, table: str) -> dict[str, bytes]:
        """See `Store`."""
        found = await self._ask(lambda: self._redis.hgetall(self._key("t", table)))
        if not found and await self._take_over(table):
            found = await self._ask(lambda: self._redis.hgetall(self._key("t", table)))
        return {name.decode(): value for name, value in found.items()}

    async def version(self, table: str) -> bytes | None:
        """See `Store`."""
        found = await self._ask(lambda: self._redis.get(self._key("tv", table)))
        if found is None and await self._take_over(table):
            found = await self._ask(lambda: self._redis.get(self._key("tv", table)))
        return cast("bytes | None", found)

    async def _take_over(self, table: str) -> bool:
        """Copy a table that was written before tables existed, one value for each record.

        The old values stay, so that the version before can be started again. Several gateways may
        do this at once: a record that is already there is not written again.

        Returns:
            Whether there was anything to copy.
        """
        if table not in _FORMER_TABLES:
            return False
        marker, prefix = (self._key("v", name) for name in _FORMER_TABLES[table])
        if await self._ask(lambda: self._redis.get(marker)) is None:
            return False
        names = await self._ask(lambda: _scan(self._redis, f"{_escape(prefix)}*"))
        values = await self._ask(lambda: self._redis.mget(names)) if names else []
        async with self._redis.pipeline(transaction=True) as pipe:
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    pipe.hsetnx(self._key("t", table), name.decode().removeprefix(prefix), value)
            pipe.setnx(self._key("tv", table), secrets.token_hex(8))
            await self._ask(pipe.execute)
        log.info("copied %d records of the table %r from their former places", len(names), table)
        return True

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        """See `Store`."""
        told = await self._run(
            "replace",
            expected or b"",
            value,
            table=table,
            id=record_id,
            absent=True if expected is None else None,
            version=secrets.token_hex(8),
        )
        return bool(told)

    async def _run(self, script: str, *values: bytes, **arguments: Any) -> Any:
        # Lua's JSON has a null that counts as true.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        arguments |= {"owner": self.owner, "lease": self._lease_ms}
        if self._clock is not None:
            arguments["now"] = int(self._clock() * 1000)
        made = self._scripts[script]
        given: list[bytes | str] = [self._prefix, orjson.dumps(arguments), *values]
        told = await self._ask(lambda: made(args=given))
        return orjson.loads(told) if isinstance(told, bytes) else told

    def _key(self, kind: str, name: str) -> str:
        return f"{self._prefix}:{kind}:{name}"

    def _account(self, account: Account) -> dict[str, Any]:
        window = account.window
        told: dict[str, Any] = {
            "name": account.name,
            "limit": account.limit,
            "kind": window.kind,
            "length": window.length_ms,
        }
        if window.kind == "sliding":
            told["part"] = window.part_ms
        elif window.kind != "now":
            told["spans"] = window.spans(int((self._clock or time.time)() * 1000))
        return told


def _note(note: UsageNote | None) -> dict[str, Any] | None:
    if note is None:
        return None
    counts = [[name, str(count)] for name, count in note.counts.items()]
    return {"name": note.name, "counts": counts, "keep": note.keep_s}
