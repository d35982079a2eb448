"""The server that answers on the port until the gateway is up."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.gateway.cross_site_guard import CrossOriginRules
from service.launch.startup_server import StartupServer


@pytest.fixture
def startup() -> Iterator[StartupServer]:
    rules = CrossOriginRules("127.0.0.1", (), ("http://friend.example",))
    made = StartupServer(("first", "second"), time.monotonic(), rules, keyless=True)
    made.serve_port("127.0.0.1", 0)
    yield made
    made.close()


def port_of(startup: StartupServer) -> int:
    assert startup.port is not None
    return startup.port


def ask(
    startup: StartupServer, path: str, body: str | None = None, method: str = "", **headers: str
) -> tuple[int, Any, bytes]:
    method = method or ("POST" if body is not None else "GET")
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        given = {"content-type": "application/json", **given}
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(startup), timeout=5)) as c:
        c.request(method, path, body, given)
        reply = c.getresponse()
        return reply.status, reply.headers, reply.read()


def events(data: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]


def test_startup_server_serves_the_console_and_answers_prompts_with_503(
    startup: StartupServer,
) -> None:
    status, headers, page = ask(startup, "/console")
    assert (status, b"coe" in page) == (200, True)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(startup, "/console/app.js")[0] == 200
    status, headers, _ = ask(startup, "/")
    assert (status, headers["location"]) == (307, "/console")
    assert ask(startup, "/health")[0] == 200
    assert ask(startup, "/ready")[0] == 503
    assert ask(startup, "/console/../secret")[0] == 503
    status, headers, body = ask(startup, "/v1/chat/completions", "x" * 100_000)
    error = json.loads(body)["error"]
    assert (status, headers["retry-after"], error["code"]) == (503, "2", "starting")
    assert error.keys() == {"message", "type", "param", "code"}
    data = json.loads(ask(startup, "/v1/messages", "{}")[2])
    assert (data["type"], data["error"]["type"]) == ("error", "overloaded_error")
    startup.stopping()
    assert json.loads(ask(startup, "/v1/models")[2])["error"]["code"] == "stopping"


def test_startup_server_event_stream_reports_steps_and_ends(startup: StartupServer) -> None:
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(ask(startup, "/console/events")[2]))
    reader.start()
    assert startup.done("first") >= 0
    assert [step["now"] for step in startup.progress()["steps"]] == [False, True]
    startup.done("second")
    startup.finish()
    reader.join(10)
    assert not reader.is_alive()
    last = events(got[0])[-1]
    assert [step["name"] for step in last["steps"]] == ["first", "second"]


def test_startup_server_hands_its_port_over_to_the_service(startup: StartupServer) -> None:
    port = port_of(startup)
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        startup.leave_port()
        with closing(socket.create_connection(("127.0.0.1", port), 5)):
            other.settimeout(5)
            other.accept()[0].close()


def test_startup_server_listens_on_a_unix_socket(startup: StartupServer, tmp_path: Path) -> None:
    startup.serve_socket(tmp_path / "startup")
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(5)
        client.connect(str(tmp_path / "startup"))
        client.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.0 503")


def test_startup_server_limits_connections_and_request_size(
    startup: StartupServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = startup._servers[0]
    monkeypatch.setattr(server, "_places", threading.Semaphore(1))
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(startup), timeout=5)) as stream:
        stream.request("GET", "/console/events")
        reply = stream.getresponse()  # kept: a reply that nobody holds closes its connection
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(startup, "/health")
        assert reply.status == 200


@pytest.mark.parametrize("path", ["/console", "/console/events", "/v1/models", "/ready"])
def test_startup_server_foreign_host_or_origin_is_forbidden(
    startup: StartupServer, path: str
) -> None:
    for headers in ({"host": "attacker.example"}, {"origin": "http://attacker.example"}):
        status, _, body = ask(startup, path, **headers)
        assert status == 403, headers
        assert json.loads(body)["error"]["code"] in ("host_not_allowed", "origin_not_allowed")
    assert ask(startup, "/ready", origin="http://friend.example")[0] == 503


def test_startup_server_post_that_is_not_json_is_refused(startup: StartupServer) -> None:
    status, _, body = ask(startup, "/v1/messages", "{}", content_type="text/plain")
    data = json.loads(body)
    assert (status, data["type"], data["error"]["type"]) == (415, "error", "invalid_request_error")


def test_startup_server_head_equals_get_without_a_body(startup: StartupServer) -> None:
    for path in ("/health", "/ready", "/console", "/console/events", "/v1/models"):
        status, _, body = ask(startup, path, method="HEAD")
        assert body == b""
        if path != "/console/events":
            assert status == ask(startup, path)[0]


def test_startup_server_configured_origin_may_read_the_state(startup: StartupServer) -> None:
    friend = "http://friend.example"
    wanted = {"access_control_request_method": "POST", "access_control_request_headers": "x-a"}
    status, headers, _ = ask(startup, "/v1/models", method="OPTIONS", origin=friend, **wanted)
    assert (status, headers["access-control-allow-origin"]) == (204, friend)
    assert headers["access-control-allow-headers"] == "x-a"
    wanted = {"access_control_request_headers": "a\tb: c"}
    headers = ask(startup, "/", method="OPTIONS", origin=friend, **wanted)[1]
    assert headers["access-control-allow-headers"] == "content-type"
    status, headers, _ = ask(startup, "/v1/chat/completions", "{}", origin=friend)
    assert (status, headers["access-control-allow-origin"]) == (503, friend)
    stranger = "http://attacker.example"
    for method in ("OPTIONS", "GET"):
        status, headers, _ = ask(startup, "/v1/models", method=method, origin=stranger)
        assert (status, headers["access-control-allow-origin"]) == (403, None)


def test_startup_server_malformed_content_length_is_answered(startup: StartupServer) -> None:
    with closing(socket.create_connection(("127.0.0.1", port_of(startup)), timeout=5)) as link:
        head = "POST /v1/chat/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: \xb2\r\n"
        link.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode("latin-1"))
        assert b" 503 " in link.recv(1024).partition(b"\r\n")[0]
