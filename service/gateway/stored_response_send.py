"""The ASGI send of a response that is to be stored: it gives it an id of ours, and stores it.

A response is stored when it ends, before the client gets its end: the next turn may follow at once.
The answer goes out even where it can't be stored, and then says `"store": false`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import orjson

from service.errors import CoeError, StorageFullError
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.stored_turn import StoredTurn
from service.http.asgi_helpers import ClientDisconnectedError, LineBuffer, Message, Send
from service.stored_responses.response_service import CONTINUED, ResponseService
from service.stored_responses.stored_records import StoredResponse, stored_items
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

log = logging.getLogger("coe.responses")

_DATA = b"data:"
# Only lines of a stream with one of these are parsed.
_MARKERS = (b'"response"', b'"response.output_item.done"')
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
# Most bytes of finished items that are remembered for a stream whose client leaves.
_MAX_PARTIAL_BYTES = 4 * 1024**2


class ResponseKeeper:
    """Stores the responses of one gateway.

    Args:
        service: The stored responses; None where the service has none.
        registry: Counts them.
        clock: Returns seconds since 1970.
    """

    def __init__(
        self,
        service: ResponseService | None,
        registry: MetricsRegistry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._registry = registry
        self._clock = clock
        self._storing: set[asyncio.Task[bool]] = set()

    @asynccontextmanager
    async def keeping(self, request: InferenceRequest, send: Send) -> AsyncIterator[Send]:
        """Store the response to a request, where it is to be stored.

        A stream whose client leaves is stored as cancelled, with the items that were complete.

        Yields:
            The send for its reply.
        """
        turn = request.stored
        if self._service is None or turn is None:
            yield send
            return
        keeping = StoringSend(self, request, turn, send)
        try:
            yield keeping
        except (ClientDisconnectedError, asyncio.CancelledError):
            self._store_rest(keeping, "cancelled")
            raise
        except BaseException:
            self._store_rest(keeping, "failed")
            raise
        self._store_rest(keeping, "failed")

    def _store_rest(self, keeping: StoringSend, status: str) -> None:
        """Store a response without an end, in the background: a cancelled task can't wait."""
        if (unfinished := keeping.unfinished(status)) is not None:
            self.begin_store(unfinished)

    def begin_store(self, response: StoredResponse) -> asyncio.Task[bool]:
        """Begin to store a response; the task returns whether it is stored."""
        task = asyncio.create_task(self._store(response))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
        return task

    async def stop(self) -> None:
        """Wait until the last responses are stored."""
        await asyncio.gather(*self._storing, return_exceptions=True)

    def response(
        self, request: InferenceRequest, turn: StoredTurn, given: dict[str, Any]
    ) -> StoredResponse:
        """Make the record of a response.

        Args:
            request: What was asked, as experts got it.
            turn: Its turn.
            given: OpenAI's object `response`, as the client gets it.
        """
        output = given.get("output")
        made = (
            [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []
        )
        own = turn.own_items(request.data)
        items = stored_items([*made, *own], turn.known)
        return StoredResponse(
            turn.response_id,
            request.tenant.name,
            int(self._clock()),
            orjson.dumps({name: value for name, value in given.items() if name != "output"}),
            tuple(items[len(made) :]),
            tuple(items[: len(made)]),
            turn.previous,
            turn.conversation,
            turn.seen,
        )

    async def _store(self, response: StoredResponse) -> bool:
        """Store a response. Return whether it is stored; failures are counted and logged."""
        assert self._service is not None
        try:
            result = "stored" if await self._service.keep(response) else "too_large"
        except StorageFullError:
            result = "storage_full"
        except CoeError:
            result = "unavailable"
        if result != "stored":
            log.error("a response can't be stored: %s", result)
        self._registry.add(metric_declarations.RESPONSES_STORED, 1, result)
        return result == "stored"


class StoringSend:
    """An ASGI send that forwards a reply of Responses with an id of ours, and stores it.

    Args:
        keeper: Stores it.
        request: The request, as experts got it.
        turn: Its turn.
        send: Receives the reply.
    """

    def __init__(
        self, keeper: ResponseKeeper, request: InferenceRequest, turn: StoredTurn, send: Send
    ) -> None:
        self._keeper = keeper
        self._request = request
        self._turn = turn
        self._send = send
        self._answers = False
        self._streams = False
        self._start: Message | None = None
        self._body = bytearray()
        self._lines = LineBuffer()
        # The response object that a stream began with, until it ends.
        self._begun: dict[str, Any] | None = None
        self._ended = False
        self._partial: list[Any] = []
        self._partial_bytes = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answers = message["status"] == 200
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            if self._answers and not self._streams:
                self._start = message
                return
            if self._answers:
                # A cached stream has a length, which ids of ours change.
                message = {**message, "headers": _without_length(message["headers"])}
        elif self._answers and self._streams:
            message = await self._stream(message)
        elif self._answers:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole()
            return
        await self._send(message)

    def unfinished(self, status: str) -> StoredResponse | None:
        """The record of a stream that began and has no end; None where there is nothing to store.

        Args:
            status: The status that it gets.
        """
        if self._begun is None or self._ended or not self._turn.keeps:
            return None
        if self._turn.conversation is not None:
            # A conversation gets whole turns only.
            return None
        self._ended = True
        given = {**self._begun, "status": status, "output": self._partial}
        return self._keeper.response(self._request, self._turn, given)

    async def _send_whole(self) -> None:
        start, self._start = self._start, None
        assert start is not None
        body = bytes(self._body)
        self._body.clear()
        try:
            given = orjson.loads(body)
        except orjson.JSONDecodeError:
            given = None
        if isinstance(given, dict):
            body = orjson.dumps(await self._stored(given))
        length = (b"content-length", str(len(body)).encode())
        await self._send({**start, "headers": [*_without_length(start["headers"]), length]})
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> Message:
        more = message.get("more_body", False)
        lines = self._lines.take(message.get("body", b""), ends=not more)
        if any(marker in lines for marker in _MARKERS):
            lines = b"".join([await self._line(line) for line in lines.splitlines(keepends=True)])
        return {**message, "body": lines}

    async def _line(self, line: bytes) -> bytes:
        if not line.startswith(_DATA) or not any(marker in line for marker in _MARKERS):
            return line
        try:
            event = orjson.loads(line[len(_DATA) :])
        except orjson.JSONDecodeError:
            return line
        kind = event.get("type") if isinstance(event, dict) else None
        if kind == "response.output_item.done":
            self._remember(event.get("item"), len(line))
            return line
        response = event.get("response") if isinstance(event, dict) else None
        if not isinstance(response, dict) or self._ended:
            return line
        if isinstance(kind, str) and kind in _ENDS:
            self._ended = True
            event["response"] = await self._stored(response)
        else:
            event["response"] = self._begun = self._named(response, stored=self._turn.keeps)
        return b"data: " + orjson.dumps(event) + b"\n"

    def _remember(self, item: object, size: int) -> None:
        self._partial_bytes += size
        if self._partial_bytes <= _MAX_PARTIAL_BYTES:
            self._partial.append(item)

    async def _stored(self, given: dict[str, Any]) -> dict[str, Any]:
        """Store a response that has ended, and return it as the client gets it."""
        named = self._named(given, stored=self._turn.keeps)
        if not self._turn.keeps:
            return named
        if self._turn.conversation is not None and named.get("status") not in CONTINUED:
            return {**named, "store": False}
        # It is stored even where the client leaves meanwhile, and may wait for the next turn.
        response = self._keeper.response(self._request, self._turn, named)
        if await asyncio.shield(self._keeper.begin_store(response)):
            return named
        return {**named, "store": False}

    def _named(self, given: dict[str, Any], *, stored: bool) -> dict[str, Any]:
        turn = self._turn
        ours: dict[str, Any] = {
            "id": turn.response_id,
            "store": stored,
            "previous_response_id": turn.previous,
        }
        if turn.conversation is not None:
            ours["conversation"] = {"id": turn.conversation}
        return {**given, **ours}


def _without_length(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] != b"content-length"]
