"""Runs one line of a batch as a request: the whole way of a client's request, in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import orjson

from service.batches.batch_records import LineResult
from service.errors import CoeError, InfeasibleBoundsError
from service.http.asgi_helpers import Message, Receive, Send
from service.http.error_formats import error_response
from service.http.on_behalf import OnBehalf, UsedByCalls
from service.http.token_usage import token_counts, usage_of
from service.store.store_interface import Settlement

Endpoint = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
"""Answers a request with a prompt, as ASGI."""

# Tries of a line whose failure may or may not go away: the server failed, not just for now.
MOST_FAILURES = 3


class After(Enum):
    """What follows a try of a line."""

    FINISHED = auto()
    WAIT = auto()
    TRY_AGAIN = auto()


@dataclass(slots=True)
class LineReply:
    """A reply to a line.

    Attributes:
        status: Its HTTP status.
        headers: Its headers, by name in lower case.
        body: Its body.
    """

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    async def send(self, message: Message) -> None:
        """Take a message of the reply, as ASGI's `send`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.lower(): value for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")

    def refuse(self, error: CoeError) -> None:
        """Make it the reply for an error."""
        response = error_response(error)
        self.status, self.headers = response.status, dict(response.headers)
        self.body = bytearray(response.body)

    @property
    def retry_after_s(self) -> float | None:
        """When a retry may succeed, in s; None where the reply does not say."""
        given = self.headers.get(b"retry-after", b"")
        return float(given) if given.isdigit() else None


def after_reply(
    status: int,
    *,
    waits: bool,
    failures: int,
    own_deadline: bool = False,
    answered: bool = False,
) -> After:
    """Decide what follows a reply. Pure.

    A line may be repeated safely, because only the try whose result is stored is charged. A line
    whose answer takes longer than a line may take would keep an engine busy until the batch's end,
    and nobody would pay for it. So it has as many tries as one whose server fails.

    Args:
        status: The HTTP status; 0 for a reply that was cut off.
        waits: Whether the reply says when to come again.
        failures: How many replies of the line failed before, without having to wait.
        own_deadline: Whether the line's body sets a deadline, which then was too short.
        answered: Whether an engine has made tokens of an answer.
    """
    if status == 504 and own_deadline:
        return After.FINISHED
    if status == 503 or (status == 504 and not answered) or (status == 429 and waits):
        return After.WAIT
    if status == 0 or (status >= 500 and status != 507):
        return After.FINISHED if failures + 1 >= MOST_FAILURES else After.TRY_AGAIN
    return After.FINISHED


def least_cost(reply: LineReply) -> float | None:
    """The least bound of cost with which a request is answered that was refused for its bound.

    Args:
        reply: The reply to it.

    Returns:
        The bound in units of cost; None for any other reply.
    """
    if reply.status != 400:
        return None
    try:
        error = orjson.loads(reply.body)["error"]
        if error["code"] != InfeasibleBoundsError.code:
            return None
        nearest = error["nearest"]
        least = nearest.get("max_cost", nearest.get("together", {}).get("max_cost"))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
    return float(least) if isinstance(least, (int, float)) else None


def wait_s(tries: int, retry_after_s: float | None, jitter: float) -> float:
    """Seconds until the next try: what the reply says, or twice as long each time; 60 at most.

    Args:
        tries: The tries so far, at least 1.
        retry_after_s: What the last reply said, or None.
        jitter: A random number in [0, 1), which spreads the tries.
    """
    doubled = 0.25 * 2.0 ** min(tries - 1, 10)
    wait = max(doubled, retry_after_s or 0.0)
    return min(60.0, wait) * (0.75 + 0.25 * jitter)


def has_deadline(body: Mapping[str, Any]) -> bool:
    """Whether the body of a line sets the deadline of its request."""
    own = body.get("coe")
    return isinstance(own, dict) and own.get("deadline_ms") is not None


@dataclass(frozen=True, slots=True)
class LineCall:
    """A line as a request.

    Attributes:
        endpoint: Its path.
        body: Its body.
        request_id: Its request id.
        timeout_s: The longest wait for its answer, in s, where the body sets no deadline.
        max_cost: The most that it may cost; the body may set a lower bound itself.
    """

    endpoint: str
    body: dict[str, Any]
    request_id: str
    timeout_s: float
    max_cost: float = math.inf

    async def run(self, answer: Endpoint, behalf: OnBehalf[Settlement], send: Send) -> None:
        """Make the request.

        Args:
            answer: Answers it.
            behalf: The tenant for whom it is made, which gets what settles its claims.
            send: Takes the reply.
        """
        data = orjson.dumps(self.body)
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": self.endpoint,
            "raw_path": self.endpoint.encode(),
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
                (b"x-request-id", self.request_id.encode()),
                (b"x-coe-priority", b"low"),
            ],
        }
        if not has_deadline(self.body):
            deadline_ms = max(1, math.ceil(self.timeout_s * 1000))
            scope["headers"].append((b"x-coe-deadline-ms", str(deadline_ms).encode()))
        own = self.body.get("coe")
        bound = own.get("max_cost") if isinstance(own, dict) else None
        # The header comes before the body, and a bound that is not valid gets the parser's error.
        valid = bound is None or (isinstance(bound, (int, float)) and bound > self.max_cost)
        if math.isfinite(self.max_cost) and valid:
            scope["headers"].append((b"x-coe-max-cost", f"{self.max_cost:.12g}".encode()))
        behalf.put(scope)
        unread = [data]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.Event().wait()  # its client never leaves
            raise AssertionError

        await answer(scope, receive, send)


def result_of(
    line: int, custom_id: str, request_id: str, reply: LineReply, settlements: bytes | None
) -> LineResult:
    """The result that a reply makes: a line of the output or the error file.

    Args:
        line: The line's number.
        custom_id: The client's name of it.
        request_id: The id of its request.
        reply: The last reply to it.
        settlements: What settles its claims.
    """
    failed = reply.status != 200
    try:
        body = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        body, failed = None, True
    if body is None:
        return fault_of(
            line, custom_id, request_id, "no_answer", "the answer was cut off", settlements
        )
    usage = usage_of(body) if isinstance(body, dict) and not failed else None
    prompt, completion = token_counts(usage) if usage is not None else (None, None)
    coe = usage.get("coe") if usage is not None else None
    cost = coe.get("cost") if isinstance(coe, dict) else None
    return LineResult(
        line,
        failed,
        orjson.dumps(
            {
                "id": request_id,
                "custom_id": custom_id,
                "response": {"status_code": reply.status, "request_id": request_id, "body": body},
                "error": None,
            }
        ),
        settlements,
        prompt or 0,
        completion or 0,
        float(cost) if isinstance(cost, (int, float)) else 0.0,
        _detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        _detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
    )


def with_used(result: LineResult, used: UsedByCalls) -> LineResult:
    """Return a result with what its calls came to, where it has no answer that tells it.

    Args:
        result: The result of a line.
        used: What the calls of its last try came to.
    """
    if not result.failed:
        return result
    return replace(
        result,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cost=used.cost,
    )


def _detail(usage: Mapping[str, Any] | None, groups: tuple[str, ...], name: str) -> int:
    """A count inside a usage's details, in the words of either API; 0 without it."""
    for group in groups:
        details = usage.get(group) if usage is not None else None
        count = details.get(name) if isinstance(details, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**31:
            return count
    return 0


def fault_of(
    line: int,
    custom_id: str | None,
    request_id: str,
    code: str,
    message: str,
    settlements: bytes | None = None,
) -> LineResult:
    """The result of a line that was not answered.

    Args:
        line: The line's number.
        custom_id: The client's name of it, or None where it has no usable one.
        request_id: The id of its request.
        code: The machine-readable reason.
        message: What was wrong.
        settlements: What settles its claims.
    """
    fault = {
        "id": request_id,
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return LineResult(line, True, orjson.dumps(fault), settlements)
