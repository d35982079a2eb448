"""The command line's client: whom it shows a key, and what it follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.cli.http_client import admin, admin_headers, ask, is_loopback
from service.errors import CoeError
from tests.support.http_server import QuietHandler, serve


@contextmanager
def server(status: int, **headers: str) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers everything alike, and what it was asked."""
    requests: list[Any] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802  # the name that the server calls
            requests.append(self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

    with serve(Handler) as url:
        yield url, requests


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COE_HOME", str(tmp_path))
    monkeypatch.delenv("COE_ADMIN_KEY", raising=False)
    (tmp_path / "admin-key").write_text("this-machine-s-admin-key")
    return tmp_path


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("body", [None, "{}"])
def test_request_redirect_is_refused_and_the_key_is_not_sent_on(
    status: int, body: str | None
) -> None:
    with server(200) as (elsewhere, caught), server(status, location=elsewhere) as (url, requests):
        with pytest.raises(CoeError, match="redirects"):
            ask(url, "GET" if body is None else "POST", "/x", {"authorization": "Bearer K"}, body)
        assert len(requests) == 1
        assert caught == []


def test_request_sends_json_and_bypasses_proxies_for_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with server(200) as (url, requests), server(502) as (proxy, caught):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        assert ask(url, "POST", "/x", {}, "{}") == {}
        assert requests[0]["content-type"] == "application/json"
        assert caught == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.9.1", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://localhost.example.com", False),
        ("http://127.0.0.1.example.com", False),
        ("http://127.0.0.1@example.com", False),
        ("http://10.0.0.1", False),
        ("https://coe.example.com", False),
        ("", False),
    ],
)
def test_request_admin_key_of_the_file_is_sent_to_loopback_only(
    home: Path, url: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_loopback(url) is expected
    assert bool(admin_headers(url)) is expected
    if not expected:
        with pytest.raises(CoeError, match="COE_ADMIN_KEY"):
            admin(url, "GET", "/admin/experts")
    monkeypatch.setenv("COE_ADMIN_KEY", "that-service-s-own-key")
    assert admin_headers(url) == {"authorization": "Bearer that-service-s-own-key"}
