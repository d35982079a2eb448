"""A gateway with its pools in a thread of its own, for tests that can't be coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.config import Config
from tests.support.in_process_service import RunningGateway, run_gateway

T = TypeVar("T")


@dataclass
class Answer:
    """An ASGI send that records the response and asserts the order of its messages."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "a second head"
            self.status = message["status"]
            for name, value in message["headers"]:
                assert not set(name + value) & set(b"\r\n\0"), "a header that no server would send"
                self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")
            return
        assert self.status, "a body before its head"
        assert not self.ended, "something came after the end"
        self.body += message.get("body", b"")
        self.ended = not message.get("more_body", False)


@dataclass
class GatewayThread:
    """A running gateway with its pools, and the event loop of their thread."""

    loop: asyncio.AbstractEventLoop
    gateway: RunningGateway
    app: Any

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        """Run a coroutine in the loop of the thread, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: list[tuple[bytes, bytes]],
        *,
        query: bytes = b"",
    ) -> Answer:
        """Send a request to the gateway's ASGI application, without a server in between."""
        return self.run(ask(self.app, method, path, body, headers, query=query))


async def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes,
    headers: list[tuple[bytes, bytes]],
    *,
    query: bytes = b"",
) -> Answer:
    """Send a request to an ASGI application; its body arrives in two pieces."""
    pieces = iter([body[: len(body) // 2], body[len(body) // 2 :]])
    left = 2

    async def receive() -> dict[str, Any]:
        nonlocal left
        if left == 0:
            await asyncio.Event().wait()
        left -= 1
        return {"type": "http.request", "body": next(pieces), "more_body": left > 0}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    answer = Answer()
    async with asyncio.timeout(60):
        await app(scope, receive, answer)
    return answer


@contextmanager
def gateway_in_thread(config: Config) -> Iterator[GatewayThread]:
    """Run a gateway with its pools in a thread, for as long as the context lasts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made: Future[RunningGateway] = Future()
    enough = asyncio.Event()

    async def live() -> None:
        # One task does it all: `run_gateway` asserts at its end that no other task is left.
        async with run_gateway(config) as running:
            made.set_result(running)
            await enough.wait()

    living = asyncio.run_coroutine_threadsafe(live(), loop)
    living.add_done_callback(lambda done: made.done() or made.set_exception(_why(done)))
    try:
        yield GatewayThread(loop, made.result(120), made.result().gateway)
    finally:
        # Also after a failure: what is left open would fail the tests that come next.
        loop.call_soon_threadsafe(enough.set)
        try:
            living.result(120)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _why(done: Future[None]) -> BaseException:
    return done.exception() or AssertionError("the gateway ended")
