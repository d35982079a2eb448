"""Calls of one expert whose answer goes to no client."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from service.engine.engine_interface import Message
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request_record import RequestRecord
from service.gateway.response_send import ResponseSend
from service.gateway.routing.route_plan import RoutePlan
from service.types import MAX_LATER

if TYPE_CHECKING:
    from service.gateway.dispatch.dispatcher import Dispatcher


class BufferedSend:
    """An ASGI send that keeps the reply in memory."""

    def __init__(self) -> None:
        self.status = 0
        # Bytes that are added to bytes would be copied anew for each piece.
        self._parts: list[bytes] = []

    @property
    def body(self) -> bytes:
        """The body so far."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self._parts.append(message.get("body", b""))


@dataclass(frozen=True, slots=True)
class SideAnswer:
    """The reply to a side call.

    Attributes:
        status: Its HTTP status.
        body: Its body.
        prompt_tokens: Tokens of the prompt; None where nobody counted them.
        completion_tokens: Tokens of the answer; None where nobody counted them.
    """

    status: int
    body: bytes
    prompt_tokens: int | None
    completion_tokens: int | None


class SideCalls:
    """Calls experts through a gateway's dispatcher.

    Args:
        dispatcher: Calls experts.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def ask(self, request: InferenceRequest, expert: str, timeout_s: float) -> SideAnswer:
        """Ask one expert, and wait for its whole answer.

        Raises:
            CoeError: There is no answer.
        """
        dispatcher = self._dispatcher
        plan = RoutePlan(
            rows=np.array([dispatcher.catalog.index[expert]]),
            quality=np.ones(1),
            escalation_prob=np.zeros((1, MAX_LATER)),
            first=expert,
            category="",
            confidence=1.0,
            reason="named",
        )
        request = replace(request, deadline_ms=int(timeout_s * 1000), own_deadline=False)
        buffer, record = BufferedSend(), RequestRecord(expert=expert)
        reply = ResponseSend(buffer, [], record)
        await dispatcher.dispatch(request, plan, reply, time.monotonic() + timeout_s)
        call = record.calls[-1] if len(record.calls) == 1 else None
        return SideAnswer(
            buffer.status,
            buffer.body,
            call.prompt_tokens if call is not None else None,
            call.completion_tokens if call is not None else None,
        )

    def resident(self) -> set[str]:
        """The experts that answer without a swap: on a device, or remote."""
        found: set[str] = set()
        for view in self._dispatcher.views():
            found |= {
                name
                for name, state in view.snapshot.experts.items()
                if view.boot is None or state.state == "device"
            }
        return found
