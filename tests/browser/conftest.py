"""A real browser that can reach the service under test and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page, Route, async_playwright

_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # Names of other sites that lead here.
    "--host-resolver-rules=MAP attacker.example 127.0.0.1, MAP friend.example 127.0.0.1",
)


@dataclass
class Watched:
    """A page, and what must stay empty: what it complained of, and hosts that it asked."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def clean(self) -> None:
        """Raise unless nothing was wrong."""
        assert self.complaints == []
        assert self.strangers == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """The system's browser, or the test is skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (deploy/test_tools.sh installs it as root)")
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=found, args=list(_ARGUMENTS))
        yield browser
        await browser.close()


@asynccontextmanager
async def watched(
    chromium: Browser, url: str, *, theme: str = "dark", width: int = 1440, height: int = 960
) -> AsyncIterator[Watched]:
    """A page with no past; requests to any host but the service's are blocked and noted."""
    context = await chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme="light" if theme == "light" else "dark",
        reduced_motion="reduce",
    )
    try:
        page = await context.new_page()
        page.set_default_timeout(20_000)
        seen = Watched(page)
        home = urlsplit(url).netloc

        async def gate(route: Route) -> None:
            if urlsplit(route.request.url).netloc == home:
                await route.continue_()
            else:
                seen.strangers.append(route.request.url)
                await route.abort()

        def note(said: ConsoleMessage) -> None:
            if said.type in ("error", "warning"):
                seen.complaints.append(said.text)

        await context.route("**/*", gate)
        page.on("console", note)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        yield seen
    finally:
        await context.close()
