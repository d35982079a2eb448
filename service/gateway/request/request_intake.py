"""Takes in a request: reads, checks and parses it, resolves aliases, runs the guard."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from service.config import Config
from service.errors import GuardRefusedError
from service.gateway.guard.guard import Guard, GuardResult
from service.gateway.request.audio_form import read_audio_form
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.large_bodies import apart
from service.gateway.request.media_tokens import MediaPrices
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request.stored_turn import INPUT_TOKENS, RESPONSES, StoredTurns
from service.gateway.request.token_limits import check_extent
from service.gateway.routing.alias_resolution import AliasResolution
from service.http.asgi_helpers import Receive, read_body
from service.http.prompt_endpoints import AUDIO
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry
from service.types import Tenant


class RequestIntake:
    """Takes in the requests of one gateway."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        registry: MetricsRegistry,
        aliases: AliasResolution,
        turns: StoredTurns | None = None,
    ) -> None:
        self._server = config.server
        self._limits = RequestLimitChecker(config)
        self._media = MediaPrices(config)
        self._defaults = RequestDefaults(config)
        self._guard = guard
        self._aliases = aliases
        self._registry = registry
        self._turns = turns

    def headers(self, pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        """Check a request's headers, and return them by name.

        Raises:
            HeadersTooLargeError: There are too many headers, or they have too many bytes.
        """
        pairs = list(pairs)
        self._limits.headers(pairs)
        return dict(pairs)

    async def read(
        self,
        path: str,
        headers: dict[bytes, bytes],
        tenant: Tenant,
        receive: Receive,
        named: str | None = None,
    ) -> GuardResult:
        """Read and parse a body, resolve its alias, run the guard, and add an expert's defaults.

        The items of a stored conversation are put before its input first.

        The guard does not look at the system prompts of the config.

        Args:
            path: The request's path.
            headers: Its headers, by name.
            tenant: Its tenant.
            receive: Gives its body.
            named: The name for which its model was chosen before; None for what a client names.

        Raises:
            InvalidRequestError: The body is not valid.
            UnknownModelError: It goes on from a response that is not kept here.
            ForbiddenError: The key may use nothing that the alias stands for.
            GuardRefusedError: The tenant's guard refuses it.
            ClientDisconnectedError: The client left before its body was complete.
        """
        raw = await self._read_body(path, headers, receive)
        arrived_s = time.monotonic()
        stored = None
        if path in (RESPONSES, INPUT_TOKENS) and self._turns is not None:
            # `parse` checks it again, with the conversation before it.
            await apart(partial(self._limits.shape, raw), len(raw))
            raw, stored = await self._turns.begin(raw, tenant, counts=path == INPUT_TOKENS)
        parse = partial(self.parse, path, raw, headers, tenant, named)
        request = await apart(parse, len(raw))
        if stored is not None:
            request = replace(request, stored=stored)
        result = await self._run_guard(request)
        request = self._defaults.apply(result.request, result.request.model)
        return replace(result, request=request, arrived_s=arrived_s)

    def parse(
        self,
        path: str,
        raw: bytes,
        headers: dict[bytes, bytes],
        tenant: Tenant,
        named: str | None = None,
    ) -> InferenceRequest:
        """Check and parse a body, and resolve its alias; the guard has not seen it.

        Raises:
            InvalidRequestError: The body is not valid.
            ForbiddenError: The key may use nothing that the alias stands for.
        """
        self._limits.shape(raw)
        server = self._server
        most = server.limits.max_messages
        request = parse_request(path, raw, headers, server.deadline_ms, tenant, most)
        request = self._aliases.resolve(request, named)
        if tokens := self._media.tokens(request.model, request.media):
            request = replace(request, media_tokens=tokens)
        check_extent(request, server.limits)
        self._limits.fields(request.data)
        return request

    async def _read_body(self, path: str, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limits = self._server.limits
        if path == AUDIO:
            return await read_audio_form(
                receive,
                headers,
                max_audio_bytes=limits.max_audio_bytes,
                stall_timeout_s=limits.body_timeout_s,
            )
        return await read_body(
            receive,
            self._server.max_body_bytes,
            declared=headers.get(b"content-length", b""),
            timeout_s=limits.body_timeout_s,
        )

    def check_shape(self, raw: bytes, wrapped: int = 0) -> None:
        """Check the depth and the number of values of JSON before it is parsed.

        Args:
            raw: The JSON.
            wrapped: The levels of JSON around a body, as in a line of a batch.

        Raises:
            InvalidRequestError: It is nested too deep, or has too many values.
        """
        self._limits.shape(raw, wrapped)

    async def _run_guard(self, request: InferenceRequest) -> GuardResult:
        try:
            result = await self._guard.check(request)
        except GuardRefusedError as error:
            self._registry.add(metric_declarations.GUARD_CHECKS, 1, error.screen, "refused")
            raise
        for check in result.seen:
            self._registry.add(metric_declarations.GUARD_CHECKS, 1, check.screen, check.done)
        return result
