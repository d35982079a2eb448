"""What answers on the service's port until a gateway does: the console, showing how far it is.

`coe serve` opens it in its first second. Once HAProxy listens, it passes to the lobby what
it can't pass to a gateway: before there is one, and after the last has stopped. It holds requests
of browsers to the gateway's own rules (`api.cross_origin`). Only the standard library and files,
because everything else still has to be imported; the words of errors come when they are needed.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from service.errors import CoeError
from service.gateway.console.assets import Asset, load_assets
from service.gateway.cross_origin import CrossOriginRules, has_body

_BEAT_S = 0.5
_MOST_CONNECTIONS = 64
_READ_S = 5.0
_MOST_BODY_BYTES = 2**20
_RETRY_S = 2
# Names of headers, as a browser lists those that a page wants to send.
_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}\Z")


@dataclass(slots=True)
class _Step:
    name: str
    done_s: float | None = None


class StartupServer:
    """`step` says what is done next; `serve_port` and `leave_port` open and close the port.

    `rules` say which browsers' requests are answered, `keyless` whether keys are not needed.
    """

    def __init__(
        self,
        steps: tuple[str, ...],
        began_s: float,
        rules: CrossOriginRules,
        *,
        keyless: bool,
    ) -> None:
        self._rules = rules
        self._keyless = keyless
        self._steps = [_Step(name) for name in steps]
        self._began_s = began_s
        self._changed = threading.Condition()
        self._servers: list[_Server] = []
        self._assets = load_assets()
        self._over = False
        self._word = "starting"

    # --- telling

    def done(self, name: str) -> float:
        """This step is done; in s since the start."""
        now_s = time.monotonic() - self._began_s
        with self._changed:
            for step in self._steps:
                if step.name == name:
                    step.done_s = round(now_s, 1)
            self._changed.notify_all()
        return now_s

    def finish(self) -> None:
        """A gateway answers from now on: whoever looks at the lobby looks again, there."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stopping(self) -> None:
        """What comes now comes too late."""
        self._word = "stopping"

    def progress(self) -> dict[str, Any]:
        """How far it is."""
        first = next((step for step in self._steps if step.done_s is None), None)
        return {
            "elapsed_s": round(time.monotonic() - self._began_s, 1),
            "steps": [
                {"name": step.name, "done_s": step.done_s, "now": step is first}
                for step in self._steps
            ],
        }

    # --- listening

    def serve_socket(self, path: Path) -> None:
        """Answer on a Unix socket: HAProxy's way here."""
        self._serve(_UnixServer(str(path), _Handler))

    def serve_port(self, host: str, port: int) -> None:
        """Answer on the service's own port, beside whoever else will. Raises OSError."""
        self._serve(_PortServer((host, port), _Handler))

    def leave_port(self) -> None:
        """Give the port up: somebody else listens there now."""
        for server in [one for one in self._servers if isinstance(one, _PortServer)]:
            self._end(server)

    def close(self) -> None:
        """End everything."""
        self.finish()
        for server in list(self._servers):
            self._end(server)

    def _serve(self, server: _Server) -> None:
        server.lobby = self
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    def _end(self, server: _Server) -> None:
        self._servers.remove(server)
        server.shutdown()
        server.server_close()

    # --- for the handlers

    def asset(self, path: str) -> Asset | None:
        """The file served there."""
        return self._assets.get(path)

    def wait(self) -> bool:
        """Until something changes, half a second at most. False: it is over."""
        with self._changed:
            if not self._over:
                self._changed.wait(_BEAT_S)
            return not self._over

    def check(self, method: str, headers: Message) -> None:
        """Raises CoeError where only a misled browser would ask this way."""
        given = {
            name.lower().encode("latin-1"): value.encode("latin-1", "replace")
            for name, value in reversed(headers.items())
        }
        self._rules.check(method.encode(), given, keyless=self._keyless, body=has_body(given))

    def may_read(self, origin: str | None) -> bool:
        """Whether pages of an origin elsewhere may read replies."""
        return self._rules.may_read(origin)

    def excuse(self, path: str) -> bytes:
        """Why there is no answer yet, as the clients of a path read it."""
        # Not at the top: it takes what is not loaded yet.
        from service.http.openai_errors import dialect_of, error_body

        seconds = time.monotonic() - self._began_s
        message = f"the service is {self._word}"
        if self._word == "starting":
            message += f", for {seconds:.0f} s so far; /console shows how far it is"
        detail = {"message": message, "type": "server_error", "param": None, "code": self._word}
        return error_body(detail, 503, dialect_of(path))


class _Server(ThreadingMixIn, UnixStreamServer):
    """A thread for each connection, up to a bound; those above it are closed at once."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    lobby: StartupServer

    def __init__(self, address: Any, handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.Semaphore(_MOST_CONNECTIONS)
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is a place for it."""
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is nobody's fault."""


class _UnixServer(_Server):
    """On a Unix socket."""


class _PortServer(_Server):
    """On a TCP port that HAProxy binds too, before this one leaves it."""

    address_family = socket.AF_INET

    def server_bind(self) -> None:
        """With both options that HAProxy uses."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with it."""

    server: _Server
    timeout = _READ_S

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """The console's files and its events; the rest is not there yet."""
        lobby = self.server.lobby
        if self._refused():
            return
        path = self.path.partition("?")[0]
        asset = lobby.asset(path)
        if path == "/":
            self._reply(307, {"location": "/console"}, b"")
        elif path == "/console/events":
            self._stream(lobby)
        elif path == "/docs":
            # It needs the description that only a gateway has.
            self._reply(307, {"location": "/console"}, b"")
        elif asset is not None:
            self._reply(200, asset.headers, asset.body)
        elif path == "/health":
            self._json(200, b'{"status":"starting"}')
        elif path == "/ready":
            self._json(503, b'{"ready":false,"experts":{}}')
        else:
            self._json(503, lobby.excuse(path))

    def do_OPTIONS(self) -> None:
        """A browser asks what a page may send: the same as later, to the gateway."""
        if not self._refused():
            wanted = self.headers.get("access-control-request-headers", "")
            allowed = {
                "access-control-allow-methods": "GET, HEAD, POST",
                "access-control-allow-headers": wanted if _NAMES.match(wanted) else "content-type",
            }
            self._reply(204, allowed, b"")

    def do_POST(self) -> None:
        """Nobody answers prompts yet."""
        # Unread, the body would make the kernel reset the connection under our reply.
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) <= _MOST_BODY_BYTES:
            self.rfile.read(int(length))
        if not self._refused():
            self._json(503, self.server.lobby.excuse(self.path))

    def _refused(self) -> bool:
        """Whether the rules refuse this request; then it has been answered."""
        try:
            self.server.lobby.check(self.command, self.headers)
        except CoeError as error:
            # Not at the top: it takes what is not loaded yet, and is rarely needed.
            from service.http.openai_errors import dialect_of, error_response

            fault = error_response(error, dialect_of(self.path))
            headers = {name.decode(): value.decode() for name, value in fault.headers}
            self._reply(fault.status, headers, fault.body)
            return True
        return False

    def _stream(self, lobby: StartupServer) -> None:
        head = {
            "content-type": "text/event-stream",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }
        self._reply(200, head, b"retry: 300\n\n")
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):
            while True:
                data = json.dumps(lobby.progress()).encode()
                self.wfile.write(b"event: progress\ndata: " + data + b"\n\n")
                if not lobby.wait():
                    return

    def _json(self, status: int, body: bytes) -> None:
        headers = {"content-type": "application/json"}
        if status == 503:
            headers["retry-after"] = str(_RETRY_S)
        self._reply(status, headers, body)

    def _reply(self, status: int, headers: Any, body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        origin = self.headers.get("origin")
        if origin is not None and self.server.lobby.may_read(origin):
            self.send_header("access-control-allow-origin", origin)
            self.send_header("vary", "Origin")
        self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged here."""
