"""Requests from other sites, preflights, HEAD, and misspelled paths over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.in_process_service import ADMIN_KEY, CHAT, chat, run_gateway, simulated

PAGE = "https://chat.example.com"
ONE = simulated({"cpu": {"tokens": 4}}, server={"cors_origins": [PAGE]})
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_foreign_post_and_rebound_host_are_refused() -> None:
    async with run_gateway(ONE) as s:
        tricks: list[dict[str, str]] = [
            {"content-type": "text/plain"},
            {"content-type": "application/json", "origin": "http://attacker.example"},
            {"content-type": "application/json", "host": "attacker.example"},
            {"content-type": "application/json", "sec-fetch-site": "cross-site"},
        ]
        for headers in tricks:
            async with s.client.post(s.url + CHAT, json=chat(), headers=headers) as reply:
                assert reply.status in (403, 415), headers
                error = (await reply.json())["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert "access-control-allow-origin" not in reply.headers
        for path in ("/console/events", "/metrics", "/v1/models", "/ready", "/console"):
            async with s.client.get(s.url + path, headers={"host": "attacker.example"}) as reply:
                assert reply.status == 403, path
        assert s.pools["cpu"].engine.asked == []
        async with s.get("/metrics") as reply:
            text = await reply.text()
        assert 'coe_requests_rejected_total{gateway="gateway",reason="host_not_allowed"} 6' in text


async def test_configured_origin_asks_and_reads() -> None:
    async with run_gateway(ONE) as s:
        async with s.client.options(s.url + CHAT, headers=PREFLIGHT) as reply:
            assert reply.status == 200
            assert reply.headers["access-control-allow-origin"] == PAGE
            allowed = reply.headers["access-control-allow-headers"]
            assert "x-stainless-os" in allowed
            assert "POST" in reply.headers["access-control-allow-methods"]
        headers = {"origin": PAGE}
        for stream in (False, True):
            async with s.post(chat(stream=stream), headers=headers) as reply:
                assert reply.status == 200
                assert reply.headers["access-control-allow-origin"] == PAGE
                assert reply.headers["access-control-expose-headers"] == "*"
        # It can read what was wrong, too.
        async with s.post(chat(model="nobody"), headers=headers) as reply:
            assert reply.status == 404
            assert reply.headers["access-control-allow-origin"] == PAGE
        async with s.client.post(s.url + CHAT, data=b"{}", headers=headers) as reply:
            assert reply.status == 415
            assert reply.headers["access-control-allow-origin"] == PAGE


async def test_preflight_of_a_foreign_origin_allows_nothing() -> None:
    async with run_gateway(ONE) as s:
        headers = {**PREFLIGHT, "origin": "https://attacker.example"}
        async with s.client.options(s.url + CHAT, headers=headers) as reply:
            assert reply.status == 400
            assert "access-control-allow-origin" not in reply.headers
    async with (
        run_gateway(simulated({"cpu": {"tokens": 4}})) as s,
        s.client.options(s.url + CHAT, headers=headers) as reply,
    ):
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers


async def test_origin_is_not_checked_once_keys_are_required() -> None:
    async with run_gateway(simulated({"cpu": {"tokens": 4}})) as s:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        status, _, made = await s.ask({"tenant": "default"}, "/admin/keys", headers=headers)
        assert status in (200, 201), made
        await s.gateway.current.authenticator.look()
        shown = {"authorization": f"Bearer {made['key']}"}
        foreign = {**shown, "host": "api.example.com", "origin": "http://other.example"}
        assert (await s.ask(chat(), headers=foreign))[0] == 200
        text = {**shown, "content-type": "text/plain"}
        assert (await s.ask(chat(), headers=text))[0] == 415


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ready",
        "/v1/models",
        "/v1/models/general",
        "/metrics",
        "/openapi.json",
        "/console",
        "/console/events",
        "/v1/usage",
    ],
)
async def test_head_equals_get_without_a_body(path: str) -> None:
    async with run_gateway(ONE) as s:
        async with s.client.head(s.url + path) as head:
            assert await head.read() == b""
        async with s.get(path) as get:
            assert (head.status, head.headers["content-type"]) == (
                get.status,
                get.headers["content-type"],
            )


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", CHAT),
        ("POST", "//v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions/", CHAT),
        ("POST", "/v1/v1/chat/completions", CHAT),
        ("GET", "/models", "/v1/models"),
        ("GET", "/v1/models/", "/v1/models"),
    ],
)
async def test_wrong_path_is_answered_with_the_right_one(
    method: str, path: str, meant: str
) -> None:
    async with run_gateway(ONE) as s:
        body: Any = chat() if method == "POST" else None
        async with s.client.request(method, s.url + path, json=body) as reply:
            assert reply.status == 404
            error = (await reply.json())["error"]
        assert error["code"] == "not_found"
        assert f"did you mean {meant}?" in error["message"]


async def test_streams_have_headers_against_proxy_buffering() -> None:
    async with run_gateway(ONE) as s:
        async with s.post(chat(stream=True)) as reply:
            assert reply.headers["x-accel-buffering"] == "no"
            assert reply.headers["cache-control"] == "no-cache"
        async with s.get("/console/events") as reply:
            assert reply.headers["x-accel-buffering"] == "no"
            assert "no-store" in reply.headers["cache-control"]
