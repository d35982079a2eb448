"""An HTTP server on the service's port until a gateway answers. Its console shows the start.

`coe serve` opens it in its first second. After HAProxy has started, HAProxy sends it all requests
before the first gateway runs and after the last gateway has stopped. The server applies the
gateway's rules for browsers (`gateway.cross_site_guard`). It uses only the standard library,
because other imports take time. Error texts are imported when they are needed.
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
from service.gateway.cross_site_guard import CrossOriginRules, has_body

_EVENT_INTERVAL_S = 0.5
_MAX_CONNECTIONS = 64
_READ_TIMEOUT_S = 5.0
_MAX_BODY_BYTES = 2**20
_RETRY_S = 2
# A list of header names in a browser's preflight request.
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}\Z")


@dataclass(slots=True)
class _Step:
    name: str
    done_s: float | None = None


class StartupServer:
    """Answers requests and reports the start's progress.

    Args:
        steps: The names of the start's steps, in order.
        began_s: The `time.monotonic` time of the start.
        rules: The rules that decide which requests of browsers are answered.
        keyless: Whether requests need no key.
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
        self._state = "starting"

    # --- progress

    def done(self, name: str) -> float:
        """Mark a step as done, and return the time since the start in s."""
        now_s = time.monotonic() - self._began_s
        with self._changed:
            for step in self._steps:
                if step.name == name:
                    step.done_s = round(now_s, 1)
            self._changed.notify_all()
        return now_s

    def finish(self) -> None:
        """End the event streams, so that browsers connect again and reach a gateway."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stopping(self) -> None:
        """Answer from now on that the service is stopping."""
        self._state = "stopping"

    def progress(self) -> dict[str, Any]:
        """Return the elapsed time and the state of each step."""
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
        """Answer on a Unix socket, for HAProxy."""
        self._serve(_UnixServer(str(path), _Handler))

    def serve_port(self, host: str, port: int) -> None:
        """Answer on the service's port; HAProxy will share it.

        Raises:
            OSError: The port can't be opened.
        """
        self._serve(_PortServer((host, port), _Handler))

    @property
    def port(self) -> int | None:
        """The port that it listens on; None while it listens on none."""
        servers = (server for server in self._servers if isinstance(server, _PortServer))
        return next((server.socket.getsockname()[1] for server in servers), None)

    def leave_port(self) -> None:
        """Close the port, because HAProxy listens on it now."""
        for server in [s for s in self._servers if isinstance(s, _PortServer)]:
            self._end(server)

    def close(self) -> None:
        """Stop all listeners."""
        self.finish()
        for server in list(self._servers):
            self._end(server)

    def _serve(self, server: _Server) -> None:
        server.startup = self
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    def _end(self, server: _Server) -> None:
        self._servers.remove(server)
        server.shutdown()
        server.server_close()

    # --- for the handlers

    def asset(self, path: str) -> Asset | None:
        """Return the console's file with this path."""
        return self._assets.get(path)

    def wait(self) -> bool:
        """Wait for progress, half a second at most. Return False once the start is over."""
        with self._changed:
            if not self._over:
                self._changed.wait(_EVENT_INTERVAL_S)
            return not self._over

    def check(self, method: str, headers: Message) -> None:
        """Apply the rules for browsers.

        Raises:
            CoeError: A foreign web page sent the request.
        """
        given = {
            name.lower().encode("latin-1"): value.encode("latin-1", "replace")
            for name, value in reversed(headers.items())
        }
        self._rules.check(method.encode(), given, keyless=self._keyless, body=has_body(given))

    def may_read(self, origin: str | None) -> bool:
        """Return whether pages of another origin may read replies."""
        return self._rules.may_read(origin)

    def unavailable_body(self, path: str) -> bytes:
        """Return the error body for a path, in the format of its API."""
        # Not at the top: this import needs modules that are not loaded yet.
        from service.http.error_formats import dialect_of, error_body

        seconds = time.monotonic() - self._began_s
        message = f"the service is {self._state}"
        if self._state == "starting":
            message += f", for {seconds:.0f} s so far; /console shows the progress"
        detail = {"message": message, "type": "server_error", "param": None, "code": self._state}
        return error_body(detail, 503, dialect_of(path))


class _Server(ThreadingMixIn, UnixStreamServer):
    """Uses a thread per connection up to a limit, and closes further connections at once."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    startup: StartupServer

    def __init__(self, address: Any, handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.Semaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Accept a connection while there is a free thread."""
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Free the thread when the connection has ended."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that left."""


class _UnixServer(_Server):
    """Listens on a Unix socket."""


class _PortServer(_Server):
    """Listens on a TCP port that HAProxy also binds before this server closes the port."""

    address_family = socket.AF_INET

    def server_bind(self) -> None:
        """Bind with the options that HAProxy uses."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection."""

    server: _Server
    timeout = _READ_TIMEOUT_S

    def do_HEAD(self) -> None:
        """Answer as GET does, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Serve the console's files and events. Everything else gets 503."""
        startup = self.server.startup
        if self._refused():
            return
        path = self.path.partition("?")[0]
        asset = startup.asset(path)
        if path == "/":
            self._reply(307, {"location": "/console"}, b"")
        elif path == "/console/events":
            self._stream(startup)
        elif path == "/docs":
            # /docs needs the OpenAPI description, which only a gateway has.
            self._reply(307, {"location": "/console"}, b"")
        elif asset is not None:
            self._reply(200, asset.headers, asset.body)
        elif path == "/health":
            self._json(200, b'{"status":"starting"}')
        elif path == "/ready":
            self._json(503, b'{"ready":false,"experts":{}}')
        else:
            self._json(503, startup.unavailable_body(path))

    def do_OPTIONS(self) -> None:
        """Answer a preflight request, as the gateway would."""
        if not self._refused():
            wanted = self.headers.get("access-control-request-headers", "")
            allowed = {
                "access-control-allow-methods": "GET, HEAD, POST",
                "access-control-allow-headers": wanted
                if _HEADER_NAMES.match(wanted)
                else "content-type",
            }
            self._reply(204, allowed, b"")

    def do_POST(self) -> None:
        """Refuse prompts with 503."""
        # If the body stayed unread, the kernel would reset the connection under the reply.
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) <= _MAX_BODY_BYTES:
            self.rfile.read(int(length))
        if not self._refused():
            self._json(503, self.server.startup.unavailable_body(self.path))

    def _refused(self) -> bool:
        """Answer the request with an error if the rules refuse it; return whether they do."""
        try:
            self.server.startup.check(self.command, self.headers)
        except CoeError as error:
            # Not at the top: this import needs modules that are not loaded yet.
            from service.http.error_formats import dialect_of, error_response

            fault = error_response(error, dialect_of(self.path))
            headers = {name.decode(): value.decode() for name, value in fault.headers}
            self._reply(fault.status, headers, fault.body)
            return True
        return False

    def _stream(self, startup: StartupServer) -> None:
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
                data = json.dumps(startup.progress()).encode()
                self.wfile.write(b"event: progress\ndata: " + data + b"\n\n")
                if not startup.wait():
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
        if origin is not None and self.server.startup.may_read(origin):
            self.send_header("access-control-allow-origin", origin)
            self.send_header("vary", "Origin")
        self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
