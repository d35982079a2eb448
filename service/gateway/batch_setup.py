"""Sets up files and batches for a gateway's process. They outlive its configs."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.batches.batch_pacing import BatchPacer
from service.batches.batch_records import ENDED, Status
from service.batches.batch_runner import BatchRunner, BatchRunnerParts
from service.batches.batch_service import BatchService
from service.batches.batch_state import BatchState
from service.batches.batch_types import (
    BatchLine,
    BatchPlan,
    BatchTerms,
    FinishedLine,
    LineChoice,
)
from service.batches.file_folder import FileFolder
from service.batches.sqlite_state import SqliteState
from service.config import Config
from service.errors import CoeError
from service.gateway.configured_gateway import ConfiguredGateway
from service.gateway.store_setup import store_url
from service.http.asgi_helpers import Receive, Send
from service.rpc.local_paths import admin_key_path
from service.store.store_interface import Store
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry
from service.types import BATCH, Tenant

log = logging.getLogger("coe.batches")


def default_folder() -> Path:
    """The folder where the config names none: `$COE_BATCHES`, or one beside the admin key."""
    if given := os.environ.get("COE_BATCHES"):
        return Path(given)
    return admin_key_path().with_name("batches")


def _open_state(config: Config, path: Path) -> BatchState:
    """Open the state of batches: in Redis where the store is there, else beside the files.

    Raises:
        ConfigError: The environment variable of the store's URL is not set.
    """
    given = config.store
    if given.kind == "memory":
        return SqliteState(path / "state.sqlite3")
    # This import is local, because it is slow, and only a service with Redis needs the client.
    from service.batches.redis_state import RedisState

    return RedisState(store_url(given), prefix=given.prefix, timeout_s=given.timeout_ms / 1000)


class CurrentGateway:
    """The gateway of the present config, as the runner of batches uses it.

    Args:
        current: Returns it.
        max_in_flight: Lines that the runner has under way at once.
    """

    def __init__(self, current: Callable[[], ConfiguredGateway], max_in_flight: int) -> None:
        self._current = current
        # A line that waits for its turn during a reload goes on with the pools and recipes of the
        # config that is in force then, beside the lines that began before.
        self._pacer = BatchPacer(
            lambda: current().dispatcher.views(),
            lambda: current().batch_members,
            max_in_flight,
            knows=lambda expert: expert in current().config.experts,
        )

    async def answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a line's request."""
        await self._current().inference(scope, receive, send)

    def identify(self, tenant: str, key: str) -> Tenant:
        """Return the tenant of a batch. Raises CoeError."""
        found = self._current().authenticator.on_behalf(tenant, key)
        return replace(found, priority=BATCH)

    def check_line(self, line: bytes) -> None:
        """Check a line of an input file before it is parsed. Raises InvalidRequestError."""
        self._current().services.intake.check_shape(line, wrapped=1)

    def model_of(self, named: object, planned: str, tenant: Tenant) -> str:
        """The model that a line is sent to.

        It is that of its plan, unless its expert is gone meanwhile, its key may use it no more, or
        the alias that the line names has been rolled back from it. Then the line is routed anew.
        """
        if not isinstance(named, str):
            return planned
        still = self._current().aliases.still_answers(named, planned, tenant)
        return planned if still else named

    async def plan(
        self, endpoint: str, lines: Sequence[BatchLine], terms: BatchTerms, tenant: Tenant
    ) -> BatchPlan:
        """Plan a batch."""
        return await self._current().batch_planner.plan(endpoint, lines, terms, tenant)

    async def basis(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> object | None:
        """Expect again what a plan goes by."""
        return await self._current().batch_planner.basis(endpoint, lines, tenant)

    async def replan(
        self,
        basis: object,
        terms: BatchTerms,
        left: Sequence[Sequence[LineChoice]],
        finished: Sequence[FinishedLine],
    ) -> BatchPlan | None:
        """Plan the lines of a batch that are left."""
        return await self._current().batch_planner.replan(basis, terms, left, finished)

    async def turn(self, models: Sequence[str]) -> str:
        """Wait until a line for one of these models may start, and return the model."""
        return await self._pacer.turn(models)

    def ended(self, model: str) -> None:
        """Free the place of a line that has ended."""
        self._pacer.ended(model)


class GatewayBatches:
    """Files and batches of one gateway's process.

    Args:
        config: The first config; its section `batches` stays in force.
        gateway_id: The gateway's id, which is new for each process.
        store: Settles the claims of lines.
        current: Returns the gateway of the present config.
        registry: Counts results.

    Attributes:
        service: What the endpoints use.
    """

    def __init__(
        self,
        config: Config,
        gateway_id: str,
        store: Store,
        current: Callable[[], ConfiguredGateway],
        registry: MetricsRegistry,
    ) -> None:
        self._registry = registry
        given = config.batches
        path = default_folder() if given.folder is None else Path(given.folder)
        folder = FileFolder(path / "files")
        self._state = _open_state(config, path)
        gateway = CurrentGateway(current, given.max_in_flight)
        self._runner = BatchRunner(
            gateway_id,
            given,
            BatchRunnerParts(
                self._state,
                folder,
                store,
                gateway.answer,
                gateway.identify,
                gateway,
                gateway,
                lambda result: registry.add(metric_declarations.BATCH_LINES, 1, result),
                gateway.model_of,
            ),
            max_line_bytes=config.server.max_body_bytes,
            check_line=gateway.check_line,
        )
        self.service = BatchService(
            given, self._state, folder, self._runner.wake, self._runner.cancel
        )

    async def start(self) -> None:
        """Go on with the batches that are there, and take new ones."""
        try:
            await self._state.start()
        except CoeError as error:
            # Other requests are answered meanwhile, and each call tries again.
            log.error("batches can't be run yet: %s", error.message)
        self._runner.start()
        self.service.start()

    async def update_metrics(self) -> None:
        """Count the batches that have not ended. The metrics stay while that is unknown."""
        with contextlib.suppress(CoeError):
            counted = await self._state.statistics()
            for status in Status:
                if status not in ENDED:
                    count = counted.by_status.get(status, 0)
                    self._registry.put(metric_declarations.BATCHES, count, status.value)
            age_s = 0.0 if counted.oldest_s is None else max(0.0, time.time() - counted.oldest_s)
            self._registry.put(metric_declarations.BATCH_OLDEST, age_s)

    async def stop(self) -> None:
        """Stop; batches under way go on elsewhere, or after the next start."""
        await self.service.stop()
        await self._runner.stop()
        await self._state.stop()
