"""Batches in the console, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from service.config import Config
from service.store.api_keys import digest_of
from tests.browser.conftest import watched
from tests.browser.test_console import TURNS, faults, opened
from tests.integration.test_batches import KEY, OTHER, client, create, ended, line, upload
from tests.support.in_process_service import ADMIN_KEY, run_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = "the prompt of nobody else"


def config(tmp_path: Path, **more: Any) -> Config:
    """Four experts in one slot. An answer of 2,000 tokens takes longer than any test."""
    given = TURNS.model_dump(exclude_defaults=True)
    for one in given["experts"].values():
        one["price"] = {"prompt": 100, "completion": 100}
    given["pools"]["cpu"]["simulated"] |= {"decode_ms": 100, "max_model_len": 4096}
    given["batches"] = {"folder": str(tmp_path / "batches"), "lease_s": 1}
    return Config.model_validate({**given, "prices": {"unit": "EUR"}, **more})


def lines() -> list[str]:
    """Six lines that are answered at once, two that are refused, and four that never end."""
    messages = [{"role": "user", "content": SECRET}]
    short = [line(i, model="general", messages=messages, max_tokens=1) for i in range(6)]
    wrong = [line(6 + i, model="general", messages=messages, max_tokens=-1) for i in range(2)]
    long = [line(8 + i, model="code", messages=messages, max_tokens=2000) for i in range(4)]
    return [*short, *wrong, *long]


def shown(page: Page, batch_id: str) -> Any:
    return page.locator(f'.batch[data-id="{batch_id}"]')


@pytest.mark.parametrize(("theme", "width"), [("dark", 1440), ("light", 390)])
async def test_console_shows_and_cancels_batches(
    chromium: Browser, tmp_path: Path, theme: str, width: int
) -> None:
    async with (
        run_gateway(config(tmp_path)) as s,
        watched(chromium, s.url, theme=theme, width=width) as seen,
        client(s) as api,
    ):
        page = await opened(seen, s.url)
        card = page.locator("#batches-card")
        await expect(card).to_be_hidden()
        made = await create(
            api, (await upload(api, *lines())).id, extra_body={"coe": {"max_cost": 50}}
        )
        batch = shown(page, made.id)
        await expect(batch).to_have_attribute("data-status", "in_progress")
        await expect(batch.locator(".facts")).to_contain_text("8 of 12 lines")
        await expect(batch.locator(".facts")).to_contain_text("2 failed")
        await expect(batch.locator(".facts")).to_contain_text("of at most 50 EUR")
        await expect(batch.locator(".facts")).to_contain_text("to go")
        legend = batch.locator(".legend")
        await expect(legend).to_contain_text("general 8 of 8")
        await expect(legend).to_contain_text("code 0 of 4")
        # The meter is as long as the lines say.
        meter = batch.locator(".meter")
        whole, done = await meter.bounding_box(), await meter.locator("b").first.bounding_box()
        assert whole is not None
        assert done is not None
        assert done["width"] / whole["width"] == pytest.approx(6 / 12, abs=0.02)
        assert await faults(page) == []
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(wide) <= 0, "nothing hangs over the edge"
        # One press asks, and only the second one cancels.
        await batch.get_by_role("button", name="cancel batch").click()
        await batch.get_by_role("button", name="really cancel batch").click()
        await expect(batch).to_have_attribute("data-status", "cancelled")
        await expect(batch.locator("button")).to_have_count(0)
        assert (await ended(api, made.id)).status == "cancelled"
        assert SECRET not in await page.content()
        seen.clean()


async def test_console_shows_a_tenant_its_own_batches_only(
    chromium: Browser, tmp_path: Path
) -> None:
    keys = {
        "a": {"tenant": "acme", "sha256": digest_of(KEY)},
        "b": {"tenant": "other", "sha256": digest_of(OTHER)},
    }
    async with (
        run_gateway(config(tmp_path, keys=keys)) as s,
        watched(chromium, s.url) as seen,
        client(s) as api,
        client(s, OTHER) as others,
    ):
        mine = await create(api, (await upload(api, *lines())).id)
        theirs = await create(others, (await upload(others, *lines())).id)
        page = seen.page
        await page.goto(s.url + "/console")
        await page.locator("#keys").wait_for()
        # The admin sees that there are batches, and none of them.
        await page.fill("#admin-key", ADMIN_KEY)
        await page.press("#admin-key", "Enter")
        note = page.locator("#batches-note")
        await expect(note).to_contain_text("an API key shows its tenant's")
        await expect(note).to_contain_text("2 under way, of all tenants together")
        await expect(page.locator(".batch")).to_have_count(0)
        for key, own, other in ((KEY, mine, theirs), (OTHER, theirs, mine)):
            await page.click("#keys-open")
            await page.fill("#api-key", key)
            await page.press("#api-key", "Enter")
            await expect(shown(page, own.id)).to_be_visible()
            await expect(shown(page, other.id)).to_have_count(0)
        await shown(page, theirs.id).get_by_role("button").click()
        await shown(page, theirs.id).get_by_role("button", name="really").click()
        await expect(shown(page, theirs.id)).to_have_attribute("data-status", "cancelled")
        assert (await api.batches.retrieve(mine.id)).status in ("validating", "in_progress")
        # Without the admin key there is no stream, and one's own batches all the same.
        await page.click("#keys-open")
        await page.fill("#api-key", KEY)
        await page.fill("#admin-key", "")
        await page.press("#admin-key", "Enter")
        await page.reload()
        await expect(shown(page, mine.id)).to_be_visible()
        await expect(shown(page, theirs.id)).to_have_count(0)
        await api.batches.cancel(mine.id)
        await expect(shown(page, mine.id)).to_have_attribute("data-status", "cancelled")
        assert [one for one in seen.complaints if "401" not in one] == []
        assert seen.strangers == []
