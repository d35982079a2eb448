"""Sets up stored responses for a gateway's process. They outlive its configs."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from service.config import Config
from service.errors import CoeError
from service.gateway.store_setup import store_url
from service.rpc.local_paths import admin_key_path
from service.stored_responses.conversation_service import ConversationService
from service.stored_responses.response_service import ResponseService
from service.stored_responses.response_state import ResponseState
from service.stored_responses.sqlite_responses import SqliteResponses
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

log = logging.getLogger("coe.responses")


def default_folder() -> Path:
    """The folder where the config names none: `$COE_RESPONSES`, or one beside the admin key."""
    if given := os.environ.get("COE_RESPONSES"):
        return Path(given)
    return admin_key_path().with_name("responses")


def _open_state(config: Config) -> ResponseState:
    """Open the state: in Redis where the store is there, else in a file.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
    """
    given, folder = config.store, config.responses.folder
    if given.kind == "memory":
        path = default_folder() if folder is None else Path(folder)
        return SqliteResponses(path / "responses.sqlite3")
    # This import is local, because it is slow, and only a service with Redis needs the client.
    from service.stored_responses.redis_responses import RedisResponses

    return RedisResponses(store_url(given), prefix=given.prefix, timeout_s=given.timeout_ms / 1000)


class GatewayResponses:
    """Stored responses of one gateway's process.

    Args:
        config: The first config; its section `responses` stays in force.
        registry: Counts what is stored.

    Attributes:
        service: What the endpoints of responses use.
        conversations: What the endpoints of conversations use.
    """

    def __init__(self, config: Config, registry: MetricsRegistry) -> None:
        self._registry = registry
        self._state = _open_state(config)
        self.service = ResponseService(
            config.responses,
            self._state,
            max_bytes=config.server.max_body_bytes,
            evicted=lambda count: registry.add(metric_declarations.RESPONSES_EVICTED, count),
        )
        self.conversations = ConversationService(self.service, self._state)

    async def start(self) -> None:
        """Open what is there, and begin to delete what expires."""
        try:
            await self._state.start()
        except CoeError as error:
            # Other requests are answered meanwhile, and each call tries again.
            log.error("responses can't be stored yet: %s", error.message)
        self.service.start()

    async def update_metrics(self) -> None:
        """Count what is stored. The metrics stay while that is unknown."""
        with contextlib.suppress(CoeError):
            amount = await self._state.amount()
            self._registry.put(metric_declarations.RESPONSES_ENTRIES, amount.entries)
            self._registry.put(metric_declarations.RESPONSES_BYTES, amount.size)

    async def stop(self) -> None:
        """Stop, once all gateways of this process have stored their last responses."""
        await self.service.stop()
        await self._state.stop()
