"""Taking a request in: whose it is, within every bound, understood, and past its tenant's guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from service.api.body import read_asked
from service.api.extent import check_extent
from service.api.guard.guard import Guard, Verdict
from service.api.limits import Limits
from service.config import Config
from service.errors import GuardRefused
from service.link.asgi import Receive, read_body
from service.telemetry import table
from service.telemetry.logs import log_fields
from service.telemetry.meter import Meter
from service.types import Tenant


class Intake:
    """The way in of one gateway. `identify`: whose request it is, by its headers."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        identify: Callable[[dict[bytes, bytes]], Tenant],
        meter: Meter,
    ) -> None:
        self._server = config.server
        self._limits = Limits(config)
        self._guard = guard
        self._identify = identify
        self._meter = meter

    async def read(
        self, path: str, pairs: Iterable[tuple[bytes, bytes]], receive: Receive
    ) -> Verdict:
        """Raises InvalidRequest, Unauthorized, StoreGone, ClientGone.

        Nothing of a body is read before its key is known.
        """
        pairs = list(pairs)
        self._limits.headers(pairs)
        headers = dict(pairs)
        tenant = self._identify(headers)
        log_fields(tenant=tenant.name, key=tenant.key)
        raw = await read_body(
            receive,
            self._server.max_body_bytes,
            declared=headers.get(b"content-length", b""),
            timeout_s=self._server.limits.body_timeout_s,
        )
        self._limits.shape(raw)
        asked = read_asked(path, raw, headers, self._server.deadline_ms, tenant)
        check_extent(asked, self._server.limits)
        self._limits.fields(asked.data)
        try:
            verdict = await self._guard.check(asked)
        except GuardRefused as error:
            self._meter.add(table.GUARD, 1, error.screen, "refused")
            raise
        for one in verdict.seen:
            self._meter.add(table.GUARD, 1, one.screen, one.done)
        return verdict
