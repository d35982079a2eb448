"""Pages of other sites in a real browser: requests that they may send, and replies they may read.

`attacker.example` and `friend.example` resolve to this machine for this browser only. The service
therefore sees a rebound host name.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page

from tests.support.in_process_service import (
    CHAT,
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What a page does: ask, and tell what it could read.
ASK = """async ([url, options]) => {
    try {
        const reply = await fetch(url, options);
        return {kind: reply.type, status: reply.status, text: await reply.text(),
                expert: reply.headers.get("x-coe-expert")};
    } catch (error) {
        return {kind: "failed", status: 0, text: String(error), expert: null};
    }
}"""


async def blank(scope: Any, receive: Any, send: Any) -> None:
    """An empty page of somebody else's."""
    del scope, receive
    head = [(b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"<!doctype html><title>x</title>"})


@asynccontextmanager
async def two_sites(chromium: Browser, host: str) -> AsyncIterator[tuple[RunningGateway, Page]]:
    """The service, which knows `friend.example`, and a page of a host on another port."""
    async with serving(blank) as other:
        port = urlsplit(other.url).port
        config = simulated(
            {"cpu": {"tokens": 3}}, server={"cors_origins": [f"http://friend.example:{port}"]}
        )
        async with run_gateway(config) as s:
            context = await chromium.new_context()
            try:
                page = await context.new_page()
                page.set_default_timeout(20_000)
                await page.goto(f"http://{host}:{port}/")
                yield s, page
            finally:
                await context.close()


def post(**more: Any) -> dict[str, Any]:
    return {"method": "POST", "body": json.dumps(chat("hi", stream=True)), **more}


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("host", ["attacker.example", "localhost", "127.0.0.1"])
async def test_foreign_page_can_not_make_the_service_work(chromium: Browser, host: str) -> None:
    async with two_sites(chromium, host) as (s, page):
        tries = [
            post(mode="no-cors", headers={"content-type": "text/plain"}),
            post(mode="no-cors"),
            post(headers=JSON),
            post(headers={**JSON, "authorization": "Bearer x"}),
        ]
        for options in tries:
            answer = await page.evaluate(ASK, [s.url + CHAT, options])
            assert answer["kind"] in ("failed", "opaque"), options
            assert answer["text"] == "" or answer["kind"] == "failed"
        # A form needs no script at all.
        await page.set_content(
            f'<form method="post" enctype="text/plain" action="{s.url}{CHAT}">'
            """<input name='{"model":"general","messages":[{"role":"user","content":"hi'"""
            """ value='"}]}'></form>"""
        )
        await page.evaluate("document.forms[0].submit()")
        await page.wait_for_url(s.url + CHAT)
        assert "refused while no API key is needed" in await page.content()
        assert s.pools["cpu"].engine.asked == []


@pytest.mark.parametrize("path", ["/v1/models", "/console/events", "/metrics"])
async def test_foreign_page_can_not_read_answers(chromium: Browser, path: str) -> None:
    async with two_sites(chromium, "attacker.example") as (s, page):
        answer = await page.evaluate(ASK, [s.url + path, {}])
        assert answer["kind"] == "failed"


async def test_rebound_host_name_reads_and_does_nothing(chromium: Browser) -> None:
    async with two_sites(chromium, "attacker.example") as (s, page):
        # The same origin for the browser: no preflight, and everything may be read.
        there = f"http://attacker.example:{urlsplit(s.url).port}"
        reply = await page.goto(there + "/console")
        assert reply is not None
        assert reply.status == 403
        for path, options in ((CHAT, post(headers=JSON)), ("/v1/models", {}), ("/metrics", {})):
            answer = await page.evaluate(ASK, [there + path, options])
            assert answer["status"] == 403
            assert "host" in answer["text"]
        assert s.pools["cpu"].engine.asked == []


async def test_configured_origin_asks_and_reads(chromium: Browser) -> None:
    async with two_sites(chromium, "friend.example") as (s, page):
        headers = {**JSON, "authorization": "Bearer any", "x-stainless-os": "Linux"}
        answer = await page.evaluate(ASK, [s.url + CHAT, post(headers=headers)])
        assert (answer["status"], answer["kind"], answer["expert"]) == (200, "cors", "general")
        assert answer["text"].endswith("data: [DONE]\n\n")
        answer = await page.evaluate(ASK, [s.url + "/v1/models", {}])
        assert '"general"' in answer["text"]
        wrong = {"method": "POST", "headers": JSON, "body": "{"}
        answer = await page.evaluate(ASK, [s.url + CHAT, wrong])
        assert (answer["status"], "valid JSON" in answer["text"]) == (400, True)


async def test_own_page_works(chromium: Browser) -> None:
    async with two_sites(chromium, "localhost") as (s, page):
        for host in ("127.0.0.1", "localhost"):
            there = f"http://{host}:{urlsplit(s.url).port}"
            await page.goto(there + "/console")
            answer = await page.evaluate(ASK, [CHAT, post(headers=JSON)])
            assert (answer["status"], answer["kind"]) == (200, "basic")
