"""The ASGI application behind a pool's port.

It accepts only requests that carry the cluster's secret. Protocols describe the pool, so that this
module does not depend on pools.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Literal, Protocol

import orjson

from service.config.effective_config import AddedExperts
from service.errors import (
    CoeError,
    ConfigError,
    InvalidRequestError,
    UnauthorizedError,
    UnknownEndpointError,
)
from service.http.asgi_helpers import (
    ClientDisconnectedError,
    Message,
    Receive,
    Send,
    body_message,
    read_body,
    send_response,
    start_response,
    until_gone,
)
from service.http.error_formats import error_response, sse_event
from service.rpc import cluster_secret as secrets
from service.rpc.call_headers import Call, parse_call

log = logging.getLogger("coe.link")


class PoolCalls(Protocol):
    """A pool, as its gateways call it."""

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        """Answer a call.

        Raises:
            CoeError: The call failed, before or after the first byte.
        """

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Prompt and answer tokens of a cancelled call; None if they are unknown."""

    def snapshots(self) -> AsyncIterator[bytes]:
        """Lines of the snapshot stream."""

    def demand(self, wanted: dict[str, float]) -> None:
        """Record a gateway's unmet demand, by expert."""

    async def operate(self, operation: str, expert: str) -> None:
        """Load, evict, unload, pin or unpin an expert.

        Args:
            operation: `load`, `evict`, `unload`, `pin` or `unpin`.
            expert: The expert.

        Raises:
            CoeError: The operation is not possible.
        """

    async def release(self, keep: Literal["host", "disk"] | None) -> dict[str, Any]:
        """Give the accelerator back, as far as no request needs it, and return who did, as JSON."""


class PoolReports(Protocol):
    """What a pool's process reports of its pool."""

    async def metrics(self) -> str:
        """Prometheus text."""

    def experts(self) -> dict[str, Any]:
        """Details of each expert's residency, as JSON."""

    def model_server_load(self) -> dict[str, Any]:
        """The load by which an endpoint picker of Kubernetes chooses, as JSON."""

    async def gpus(self) -> list[dict[str, Any]]:
        """Memory of the replica's GPUs, as JSON: total, used, free and reserved bytes."""

    async def moe_statistics(self, expert: str) -> dict[str, Any]:
        """Return the statistics of the gates of a mixture of experts.

        Raises:
            CoeError: There are no statistics.
        """

    async def server_log(self, expert: str) -> dict[str, Any]:
        """Return the last lines of the server that a command started for an expert.

        Raises:
            CoeError: No command starts it.
        """

    async def check_added(self, added: AddedExperts, name: str) -> None:
        """Check that the pool can take an added expert in without touching another one.

        Raises:
            CoeError: It can't; the message says why.
        """

    async def set_added(self, added: AddedExperts) -> None:
        """Serve these added experts and no others. Those of an earlier revision are left out.

        Raises:
            CoeError: They can't be served; the pool goes on as before.
        """


class PoolApp:
    """The application of one pool.

    A request's method and the first part of its path select its endpoint in a table. Any other
    POST is a call of an expert.

    Args:
        pool: Answers calls.
        reports: Reports metrics and figures of the pool.
        secret: The cluster's secret.
        max_body_bytes: The bound on a request's body.
    """

    def __init__(
        self, pool: PoolCalls, reports: PoolReports, secret: str, max_body_bytes: int
    ) -> None:
        self._pool = pool
        self._reports = reports
        self._secret = secret.encode()
        self._max_body_bytes = max_body_bytes
        self._endpoints: dict[tuple[str, str], _Endpoint] = {
            ("GET", "snapshots"): self._stream_snapshots,
            ("GET", "metrics"): self._send_metrics,
            ("GET", "experts"): self._send_experts,
            ("GET", "gpus"): self._send_gpus,
            ("GET", "model-server-load"): self._send_model_server_load,
            ("GET", "used"): self._send_used,
            ("GET", "moe-statistics"): self._send_moe_statistics,
            ("GET", "server-log"): self._send_server_log,
            ("POST", "demand"): self._record_demand,
            ("POST", "operate"): self._operate,
            ("POST", "release"): self._release,
            ("POST", "added-experts"): self._set_added,
            ("POST", "added-experts-check"): self._check_added,
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        reply = _Reply(send)
        try:
            given = headers.get(secrets.HEADER.encode(), b"")
            if not secrets.same(given, self._secret):
                raise UnauthorizedError("a pool's port takes only its own cluster's requests")
            method, path = scope["method"], scope["path"]
            name, _, argument = path.removeprefix("/").partition("/")
            endpoint = self._endpoints.get((method, name))
            if endpoint is not None:
                await endpoint(argument, receive, reply)
            elif method == "POST":
                await self._run(scope, headers, receive, reply)
            else:
                raise UnknownEndpointError(f"a pool has no {path}")
        except ClientDisconnectedError:
            return
        except CoeError as error:
            await reply.fail(error)
        except Exception:
            # The HTTP server would log the error's text, which may quote a prompt.
            log.exception("unhandled exception in a pool's endpoint")
            await reply.fail(
                CoeError("internal error in a pool; its log holds the type and traceback")
            )

    async def _run(
        self,
        scope: MutableMapping[str, Any],
        headers: dict[bytes, bytes],
        receive: Receive,
        reply: _Reply,
    ) -> None:
        call = parse_call(scope["path"], headers)
        body = await read_body(receive, self._max_body_bytes)
        await until_gone(self._pool.run(call, body, reply), receive, scope)

    async def _stream_snapshots(self, _: str, receive: Receive, reply: _Reply) -> None:
        async def stream() -> None:
            await reply(start_response(200, [(b"content-type", b"application/x-ndjson")]))
            async for line in self._pool.snapshots():
                await reply(body_message(line, more=True))
            await reply(body_message())

        await until_gone(stream(), receive)

    async def _send_metrics(self, _: str, _receive: Receive, reply: _Reply) -> None:
        text = await self._reports.metrics()
        await reply.whole(b"text/plain; version=0.0.4", text.encode())

    async def _send_experts(self, _: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(self._reports.experts())

    async def _send_model_server_load(self, _: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(self._reports.model_server_load())

    async def _send_gpus(self, _: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(await self._reports.gpus())

    async def _send_used(self, request_id: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(await self._pool.used(request_id))

    async def _send_moe_statistics(self, expert: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(await self._reports.moe_statistics(expert))

    async def _send_server_log(self, expert: str, _receive: Receive, reply: _Reply) -> None:
        await reply.json(await self._reports.server_log(expert))

    async def _record_demand(self, _: str, receive: Receive, reply: _Reply) -> None:
        self._pool.demand(_amounts(await read_body(receive, self._max_body_bytes)))
        await reply.json({})

    async def _operate(self, argument: str, _receive: Receive, reply: _Reply) -> None:
        operation, _, expert = argument.partition("/")
        await self._pool.operate(operation, expert)
        await reply.json({})

    async def _release(self, keep: str, _receive: Receive, reply: _Reply) -> None:
        if keep not in ("", "host", "disk"):
            raise InvalidRequestError(
                f"`keep` must be host or disk, not {keep[:32]!r}", param="keep"
            )
        place: Literal["host", "disk"] | None = (
            None if not keep else "host" if keep == "host" else "disk"
        )
        await reply.json(await self._pool.release(place))

    async def _check_added(self, name: str, receive: Receive, reply: _Reply) -> None:
        await self._reports.check_added(await self._added(receive), name)
        await reply.json({})

    async def _set_added(self, _: str, receive: Receive, reply: _Reply) -> None:
        await self._reports.set_added(await self._added(receive))
        await reply.json({})

    async def _added(self, receive: Receive) -> AddedExperts:
        body = await read_body(receive, self._max_body_bytes)
        try:
            return AddedExperts.from_json(orjson.loads(body))
        except (ConfigError, orjson.JSONDecodeError):
            raise InvalidRequestError("these are no added experts of this version") from None


class _Reply:
    """An ASGI send that knows whether the response has been started."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
        elif not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def json(self, value: object) -> None:
        await self.whole(b"application/json", orjson.dumps(value))

    async def whole(self, content_type: bytes, body: bytes) -> None:
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await send_response(self, 200, headers, body)

    async def fail(self, error: CoeError) -> None:
        if self._ended:
            return
        if self._started:
            await self(body_message(sse_event(error)))
            return
        fault = error_response(error)
        await send_response(self, fault.status, fault.headers, fault.body)


_Endpoint = Callable[[str, Receive, _Reply], Awaitable[None]]


def _amounts(body: bytes) -> dict[str, float]:
    try:
        return {str(name): float(amount) for name, amount in orjson.loads(body).items()}
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        raise InvalidRequestError("demand is an object of numbers by expert") from None
