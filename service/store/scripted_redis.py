"""A Redis whose every change is one Lua script of a package, which it runs atomically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from service.store.redis_commands import RedisConnections
from service.store.redis_scripts import read_scripts


class ScriptedRedis:
    """The client of one package's scripts.

    A script gets the prefix of all names, its arguments as JSON, and values as bytes.

    Args:
        url: The URL of the Redis.
        folder: The folder of the scripts. `prelude.lua` in it is put before each of them.
        names: The scripts.
        prefix: The prefix of its keys.
        timeout_s: The longest wait for a reply, in s.
        clock: Returns seconds since 1970 in place of the server, in tests.

    Attributes:
        redis: The client, for commands without a script.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        names: tuple[str, ...],
        *,
        prefix: str,
        timeout_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.prefix = f"{{{prefix}}}"
        self._clock = clock
        self._connections = RedisConnections(url, timeout_s=timeout_s, what="the store")
        self.redis = self._connections.redis
        self._scripts = {
            name: self.redis.register_script(text)
            for name, text in read_scripts(folder, names).items()
        }

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    async def call(self, command: Callable[[], Any]) -> Any:
        """Run a command. Raises StoreUnavailableError."""
        return await self._connections.run(command)

    async def run(self, script: str, *values: bytes, **arguments: Any) -> Any:
        """Run a script. Raises StoreUnavailableError."""
        # In Lua's JSON a null counts as true.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if self._clock is not None:
            arguments["now"] = self._clock()
        run = self._scripts[script]
        argv: list[bytes | str] = [self.prefix, orjson.dumps(arguments), *values]
        return await self._connections.run(lambda: run(args=argv))
