"""HAProxy with a configuration as Ray Serve writes it, started through our wrapper."""

from __future__ import annotations

import json
import re
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from ray.serve._private import haproxy_templates

from service.http.prompt_endpoints import ENDPOINTS
from service.launch.haproxy_config import write_wrapper

# The lines of Serve's own file that we change, and those between.
CONFIG = """global
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    errorfile 502 {folder}/none
frontend prometheus
    bind :{metrics}
    mode http
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend default_backend if {{ path /nobody }}
    default_backend gateway
backend gateway
    server one 127.0.0.1:{gateway}
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Ping /-/routes for routes."
listen stats
  bind *:{stats}
  stats enable
  stats uri /stats
"""


class Gateway(BaseHTTPRequestHandler):
    """Tells the headers that it got; a request with x-hold waits for `opened`."""

    protocol_version = "HTTP/1.1"
    opened = Event()

    def do_GET(self) -> None:
        if "x-hold" in self.headers:
            self.opened.wait(60)
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.dumps({k.lower(): v for k, v in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass
class Running:
    folder: Path
    ports: dict[str, int]  # with that of the gateway

    def ask(self, raw: bytes) -> tuple[int, Any]:
        """Send bytes, read a reply: status and JSON."""
        with closing(socket.create_connection(("127.0.0.1", self.ports["port"]), 5)) as made:
            made.sendall(raw)
            data = b""
            while b"\r\n\r\n" not in data:
                data += made.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
            while len(body) < length:
                body += made.recv(65536)
            return int(head.split()[1]), json.loads(body)


def free_ports(count: int) -> list[int]:
    made = [socket.socket() for _ in range(count)]
    for item in made:
        item.bind(("127.0.0.1", 0))
    found = [item.getsockname()[1] for item in made]
    for item in made:
        item.close()
    return found


@contextmanager
def running(folder: Path, host: str | None) -> Iterator[Running]:
    names = ("port", "metrics", "stats")
    ports = dict(zip(names, free_ports(3), strict=True))
    own = (ports["stats"], ports["metrics"])
    program = write_wrapper(
        folder, own_ports=own, header_timeout_s=5, fallback_socket=None, host=host
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    config = folder / "haproxy.cfg"
    ports["gateway"] = server.server_address[1]
    config.write_text(CONFIG.format(folder=folder, **ports))
    process = subprocess.Popen([program, "-db", "-f", str(config)])
    try:
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s and not listens("127.0.0.1", ports["port"]):
            assert process.poll() is None
            time.sleep(0.05)
        yield Running(folder, ports)
    finally:
        process.terminate()
        process.wait(10)
        server.shutdown()
        server.server_close()


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("haproxy"), None) as made:
        yield made


def test_haproxy_template_of_serve_has_the_lines_that_are_changed() -> None:
    text = "".join(v for v in vars(haproxy_templates).values() if isinstance(v, str))
    for line in (
        "stats socket {{ config.socket_path }} mode 666 level admin",
        "frontend http_frontend\n    bind {{ config.frontend_host }}:{{ config.frontend_port }}",
        "bind :{{ config.metrics_port }}",
        "    http-request return status 404 ",
        "/-/routes ",
        "bind *:{{ config.stats_port }}",
    ):
        assert line in text


def test_haproxy_statistics_are_on_loopback_and_the_admin_socket_is_private(proxy: Running) -> None:
    for name in ("metrics", "stats"):
        assert listens("127.0.0.1", proxy.ports[name])
        # Bound to every interface it would answer there too.
        assert not listens("127.0.0.2", proxy.ports[name])
    assert stat.S_IMODE((proxy.folder / "admin.sock").stat().st_mode) == 0o600


def test_haproxy_listens_where_the_config_says(tmp_path: Path) -> None:
    with running(tmp_path, "0.0.0.0") as made:
        assert listens("127.0.0.2", made.ports["port"])
        assert not listens("127.0.0.2", made.ports["stats"])


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(
    "announced",
    [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n5\r\nhello"],
)
def test_haproxy_get_with_a_body_is_refused(
    proxy: Running, method: bytes, announced: bytes
) -> None:
    if method == b"HEAD":
        with closing(socket.create_connection(("127.0.0.1", proxy.ports["port"]), 5)) as made:
            made.sendall(b"HEAD / HTTP/1.1\r\nhost: x\r\n" + announced)
            assert made.recv(65536).startswith(b"HTTP/1.1 400")
        return
    status, answer = proxy.ask(b"GET /console/events HTTP/1.1\r\nhost: x\r\n" + announced)
    assert (status, answer["error"]["message"]) == (400, "GET and HEAD take no body")


@pytest.mark.parametrize("bare", [b"", b"content-length: 0\r\n"])
def test_haproxy_get_without_a_body_passes(proxy: Running, bare: bytes) -> None:
    assert proxy.ask(b"GET / HTTP/1.1\r\nhost: x\r\n" + bare + b"\r\n")[0] == 200


def test_haproxy_websocket_is_refused_and_other_upgrades_are_ignored(proxy: Running) -> None:
    upgrade = b"connection: upgrade\r\nupgrade: %s\r\nsec-websocket-version: 13\r\n"
    key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    head = b"GET / HTTP/1.1\r\nhost: x\r\n"
    status, answer = proxy.ask(head + upgrade % b"WebSocket" + key)
    assert (status, answer["error"]["code"]) == (400, "invalid_request_error")
    status, answer = proxy.ask(head + upgrade % b"h2c" + b"\r\n")
    assert (status, "upgrade" in answer) == (200, False)


@pytest.mark.parametrize(
    "header",
    [
        "x-request-disconnect-disabled: ?1",
        "x-request-timeout-seconds: 1",
        "x-session-id: a",
        "serve_multiplexed_model_id: a",
        "x-request-id: a b",
    ],
)
def test_haproxy_blocks_serve_s_own_endpoints(proxy: Running, header: str) -> None:
    status, answer = proxy.ask(f"GET / HTTP/1.1\r\nhost: x\r\n{header}\r\n\r\n".encode())
    assert status == 200
    assert header.partition(":")[0] not in answer


@pytest.mark.parametrize(
    ("method", "path", "own_watch"),
    [
        *(("POST", path, True) for path in ENDPOINTS),
        ("GET", ENDPOINTS[0], False),
        ("POST", f"{ENDPOINTS[0]}/x", False),
        ("POST", "/v1/feedback", False),
        ("GET", "/console/events", False),
    ],
)
def test_haproxy_leaves_the_watch_for_clients_of_prompts_to_the_gateway(
    proxy: Running, method: str, path: str, own_watch: bool
) -> None:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-request-disconnect-disabled: ?2\r\n\r\n"
    status, answer = proxy.ask(head.encode())
    assert status == 200
    assert answer.get("x-request-disconnect-disabled") == ("?1" if own_watch else None)


def test_haproxy_renames_the_session_that_serve_would_obey(proxy: Running) -> None:
    status, answer = proxy.ask(b"GET / HTTP/1.1\r\nhost: x\r\nx-session-id: my one\r\n\r\n")
    assert status == 200
    assert answer["x-coe-session-id"] == "my one"
    assert "x-session-id" not in answer


def test_haproxy_without_a_gateway_answers_503(proxy: Running) -> None:
    status, body = proxy.ask(b"GET /nobody HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (status, body["error"]["code"]) == (503, "gateway_unavailable")


def probed(port: int) -> bool:
    """Whether the kernel waits to probe a connection to this port (timer 2 of proc's table)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(
        int(row[2].rpartition(":")[2], 16) == port and row[3] == "01" and row[5].startswith("02:")
        for row in rows
    )


def test_haproxy_probes_a_gateway_that_says_nothing(proxy: Running) -> None:
    try:
        with closing(socket.create_connection(("127.0.0.1", proxy.ports["port"]), 5)) as made:
            made.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-hold: 1\r\n\r\n")
            end_s = time.monotonic() + 60
            while not probed(proxy.ports["gateway"]):
                assert time.monotonic() < end_s
                time.sleep(0.02)
    finally:
        Gateway.opened.set()
