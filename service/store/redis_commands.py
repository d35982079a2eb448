"""Client for Redis, which runs the scripts. Only this module imports `redis`.

The client does not handle outages: a call that fails or times out raises StoreUnavailableError.
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
from service.store.redis_scripts import load_scripts
from service.store.store_interface import (
    MOST_WINDOWS_OWED,
    Account,
    AccountBalance,
    Granted,
    Refused,
    StoreClaim,
    UsageNote,
    WorkItem,
)

log = logging.getLogger("coe.store")

_CONNECTIONS = 64
# Account, start, reserved, used; limit; length and part of a sliding window.
Lines = Sequence[tuple[str, int, int, int, int, int, int]]


# The meanings of errors by class and by first word. The text from Redis is never shown, because it
# may contain an address or a user name.
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
    """Return the meaning of an error as a predicate, or None where Redis can't be reached."""
    for kind, what in _REFUSALS:
        if isinstance(error, kind):
            return what
    if not isinstance(error, ResponseError):
        return None
    # The library chooses the class of some errors by their first word, and strips this word.
    name = type(error).__name__.upper().removesuffix("ERROR")
    text = str(error)
    if text.startswith(_CLUSTER_WORDS) or name in _CLUSTER_WORDS or "cluster node" in text:
        return _CLUSTER
    return "refused"


# Tables that used to have a separate value for each record, with the name of their version and the
# prefix of their records' names.
_FORMER_TABLES = {"keys": ("keys-version", "key/")}


async def _scan(redis: Redis, pattern: str) -> list[bytes]:
    return [name async for name in redis.scan_iter(pattern, count=1000)]


def _escape(text: str) -> str:
    """Escape the special characters of Redis patterns."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


class RedisConnections:
    """A bounded set of connections to one Redis.

    Args:
        url: The URL of the Redis.
        timeout_s: The timeout in seconds for a connect, for an answer, and for a free connection.
        what: The name of this Redis in errors, such as "the store".
    """

    def __init__(self, url: str, *, timeout_s: float, what: str) -> None:
        self._what = what
        try:
            pool = ConnectionPool.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # A retry might count twice, so the caller decides about retries.
                retry=Retry(NoBackoff(), 0),
                decode_responses=False,
            )
        except (ValueError, RedisError):
            # The error's own text may quote the URL with its password.
            raise ConfigError(f"{what}: the Redis URL can't be understood") from None
        self.redis: Redis = Redis(connection_pool=pool)
        # The semaphore replaces the library's blocking pool, whose waiters hang on an
        # asyncio.Condition.
        self._places = asyncio.Semaphore(_CONNECTIONS)
        self._timeout_s = timeout_s

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    async def run(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Run a command when a connection is free.

        Raises:
            StoreUnavailableError: The command failed or timed out.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._places.acquire()
            try:
                return await command()
            finally:
                self._places.release()
        except (TimeoutError, RedisError, OSError) as error:
            why = refusal(error) if isinstance(error, RedisError) else None
            if why is None:
                # Only the class is shown, because the text may contain the address.
                why = f"can't be reached ({type(error).__name__})"
            elif why == "refused":
                # This text quotes no values.
                log.error("%s refused: %s", self._what, str(error)[:200])
            raise StoreUnavailableError(f"{self._what} {why}") from None


class RedisClient:
    """One owner's client of Redis.

    `clock`, in seconds since 1970, replaces the server's own in tests.
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
        self._execute = self._connections.run
        self._scripts = {
            name: self._redis.register_script(text) for name, text in load_scripts().items()
        }

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    async def reserve(self, claim: StoreClaim) -> Granted | Refused:
        """Reserve a claim.

        Raises:
            StoreUnavailableError: Redis did not answer, or the claim was already undone.
        """
        reply = await self._run(
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
        if "gone" in reply:
            raise StoreUnavailableError("the store answered too late")
        if (refused := reply.get("refused")) is not None:
            wait = refused["wait"]
            return Refused(
                refused["account"], wait / 1000 if wait >= 0 else None, bool(refused["busy"])
            )
        return Granted(
            claim,
            int(reply["tokens"]),
            tuple(map(int, reply["amounts"])),
            tuple(map(int, reply["starts"])),
        )

    async def settle(
        self,
        claim_id: str,
        lines: Lines,
        note: UsageNote | None,
        *,
        offline: bool = False,
        item: WorkItem | None = None,
    ) -> None:
        """Charge the use of a claim, and release its reservation.

        With an item of work, it is charged once for all claims of that item.
        """
        await self._run(
            "settle",
            id=claim_id,
            lines=[[name, *map(str, numbers)] for name, *numbers in lines],
            note=_note(note),
            offline=offline,
            most_windows_owed=MOST_WINDOWS_OWED,
            item=[item.group, item.name] if item is not None else None,
        )

    async def close_group(self, group: str) -> None:
        """End a group of work items."""
        await self._run("close_group", group=group)

    async def undo(self, claim_id: str) -> None:
        """Release a claim of unknown outcome, even if it reaches Redis later."""
        await self._run("undo", id=claim_id)

    async def send_heartbeat(
        self,
        number: int,
        share: float,
        quotas: Sequence[tuple[Account, int, int]],
        batch: int,
        notes: Sequence[UsageNote],
    ) -> dict[str, Any]:
        """Extend this owner's lease, add its notes, and resize its offline quotas.

        Args:
            number: The number of this heartbeat. Redis ignores a heartbeat that arrives after a
                later one.
            share: The part of an account's room that this owner may hold as a quota.
            quotas: For each account, the amount that this owner holds and the further amount that
                it wants.
            batch: The number of this batch of `notes`. Each batch is added only once.
            notes: Usage that belongs to no limit.

        Returns:
            Either `stale`, or `known` and `lapsed` (the earlier state of the lease) and `quotas`:
            account, amount held now, and room left for all owners.
        """
        return cast(
            dict[str, Any],
            await self._run(
                "heartbeat",
                number=number,
                share=share,
                quotas=[
                    {"account": self._account(account), "held": held, "more": more}
                    for account, held, more in quotas
                ],
                batch=batch,
                notes=[_note(note) for note in notes],
            ),
        )

    async def leave(self) -> None:
        """Release all reservations and quotas of this owner."""
        await self._run("leave")

    async def restore(self, claims: Sequence[tuple[str, Lines]]) -> None:
        """Reserve open claims again, in a Redis that has lost its data."""
        await self._run(
            "restore",
            claims=[
                {"id": claim_id, "lines": [[n, str(start), str(r)] for n, start, r, *_ in lines]}
                for claim_id, lines in claims
            ],
        )

    async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
        balances = await self._run("balances", accounts=[self._account(a) for a in accounts])
        return [AccountBalance(*map(int, balance)) for balance in balances]

    async def counts(self, names: Sequence[str]) -> list[dict[str, int]]:
        found = []
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self._key("n", name))
            found = await self._execute(pipe.execute)
        return [{key.decode(): int(value) for key, value in counts.items()} for counts in found]

    async def records(self, table: str) -> dict[str, bytes]:
        found = await self._execute(lambda: self._redis.hgetall(self._key("t", table)))
        if not found and await self._take_over(table):
            found = await self._execute(lambda: self._redis.hgetall(self._key("t", table)))
        return {name.decode(): value for name, value in found.items()}

    async def version(self, table: str) -> bytes | None:
        found = await self._execute(lambda: self._redis.get(self._key("tv", table)))
        if found is None and await self._take_over(table):
            found = await self._execute(lambda: self._redis.get(self._key("tv", table)))
        return cast("bytes | None", found)

    async def _take_over(self, table: str) -> bool:
        """Copy a table from the old format, which had a separate value for each record.

        The old values stay, so that the earlier version can be started again. Several gateways may
        copy at once, because an existing record is not overwritten.

        Returns:
            Whether there were old records.
        """
        if table not in _FORMER_TABLES:
            return False
        marker, prefix = (self._key("v", name) for name in _FORMER_TABLES[table])
        if await self._execute(lambda: self._redis.get(marker)) is None:
            return False
        names = await self._execute(lambda: _scan(self._redis, f"{_escape(prefix)}*"))
        values = await self._execute(lambda: self._redis.mget(names)) if names else []
        async with self._redis.pipeline(transaction=True) as pipe:
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    pipe.hsetnx(self._key("t", table), name.decode().removeprefix(prefix), value)
            pipe.setnx(self._key("tv", table), secrets.token_hex(8))
            await self._execute(pipe.execute)
        log.info("copied %d records of the table %r from their former places", len(names), table)
        return True

    async def replace(
        self, table: str, record_id: str, expected: bytes | None, value: bytes
    ) -> bool:
        replaced = await self._run(
            "replace",
            expected or b"",
            value,
            table=table,
            id=record_id,
            absent=True if expected is None else None,
            version=secrets.token_hex(8),
        )
        return bool(replaced)

    async def _run(self, script: str, *values: bytes, **arguments: Any) -> Any:
        # In Lua's JSON a null counts as true.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        arguments |= {"owner": self.owner, "lease": self._lease_ms}
        if self._clock is not None:
            arguments["now"] = int(self._clock() * 1000)
        run = self._scripts[script]
        argv: list[bytes | str] = [self._prefix, orjson.dumps(arguments), *values]
        reply = await self._execute(lambda: run(args=argv))
        return orjson.loads(reply) if isinstance(reply, bytes) else reply

    def _key(self, kind: str, name: str) -> str:
        return f"{self._prefix}:{kind}:{name}"

    def _account(self, account: Account) -> dict[str, Any]:
        window = account.window
        payload: dict[str, Any] = {
            "name": account.name,
            "limit": account.limit,
            "kind": window.kind,
            "length": window.length_ms,
        }
        if window.kind == "sliding":
            payload["part"] = window.part_ms
        elif window.kind != "now":
            payload["spans"] = window.spans(int((self._clock or time.time)() * 1000))
        return payload


def _note(note: UsageNote | None) -> dict[str, Any] | None:
    if note is None:
        return None
    counts = [[name, str(count)] for name, count in note.counts.items()]
    return {"name": note.name, "counts": counts, "keep": note.keep_s}
