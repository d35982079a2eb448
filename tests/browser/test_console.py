"""The console in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
import yaml
from playwright.async_api import Browser, Page, expect

from service.config import Config
from service.gpu_devices import GpuMemory
from tests.browser.conftest import Watched, watched
from tests.support import foreign_server
from tests.support.in_process_service import ADMIN_KEY, chat, run_gateway

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.asyncio(loop_scope="module")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
expect.set_options(timeout=20_000)
MATH = "A farmer has 12 cows and buys 7 more. How many cows?"

# Four experts that take turns in one slot, and the demo's router before them.
TURNS = Config.model_validate(
    {
        "router": {"artifact": str(ROOT / "router_models" / "artifacts" / "demo@1")},
        "experts": {
            name: {"model": name, "categories": [name]}
            for name in ("general", "math", "intents", "code")
        },
        "pools": {
            "cpu": {
                "engine": "simulated",
                "slots": 1,
                "swap": {"min_stay_s": 0},
                "simulated": {"swap_s": 0.02, "decode_ms": 5, "tokens": 12},
            }
        },
    }
)


def expert(page: Page, name: str) -> Any:
    return page.locator(f'.expert[data-name="{name}"]')


async def opened(seen: Watched, url: str, path: str = "/console") -> Page:
    await seen.page.goto(url + path)
    if path == "/console":
        await expect(seen.page.locator(".expert")).to_have_count(4)
    return seen.page


async def faults(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2 A and AA, contrast included."""
    await page.evaluate(AXE)
    found = await page.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
    )
    assert any(rule["id"] == "color-contrast" for rule in found["passes"]), "contrast was measured"
    return [
        f"{rule['id']}: {node['html'][:120]} {node['any'][:1]}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


async def test_console_prompt_shows_explanation_answer_and_times(chromium: Browser) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        await page.fill("#prompt", MATH)
        await expect(page.locator("#posterior .first")).to_contain_text("math")
        await expect(page.locator("tr.chosen")).to_contain_text("math")
        await expect(page.locator("#formula")).to_contain_text("U = Q − 0.05")
        await page.press("#prompt", "Control+Enter")
        answer = page.locator(".answer:not(.busy)")
        await expect(answer.locator("pre")).to_contain_text("math:")
        await expect(answer.locator("header")).to_contain_text("math")
        for step in ("route", "queue", "swap", "prefill", "decode"):
            await expect(answer.locator(".legend")).to_contain_text(step)
        # The swap that it needed is seen in the experts' list, and the request below.
        await expect(expert(page, "math")).to_have_attribute("data-state", "device")
        await expect(expert(page, "math")).to_contain_text("swapped in")
        await expect(page.locator("#routes tr")).to_have_count(1)
        await expect(page.locator("#routes tr")).to_contain_text("math")
        await expect(page.locator("#flow .ribbon")).to_have_count(1)
        assert MATH not in await page.locator(".routes").inner_text()
        seen.clean()


async def test_console_shows_budgets_and_what_is_left(chromium: Browser) -> None:
    given = TURNS.model_dump(exclude_defaults=True)
    priced = {**given["experts"]["math"], "price": {"prompt": 1000, "completion": 1000}}
    experts = {**given["experts"], "math": priced}
    budgets = {"everybody": {"amount": 1, "period": "day"}}
    config = Config.model_validate(
        {**given, "experts": experts, "budgets": budgets, "prices": {"unit": "EUR"}}
    )
    async with run_gateway(config) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        await expect(page.locator(".budget")).to_contain_text("everybody100 % left")
        for _ in range(3):
            await s.ask(chat("word " * 60, model="math"))
        await expect(page.locator(".budget")).not_to_contain_text("100 % left")
        # Every column of costs says of what.
        heads = page.locator("[data-cost]")
        assert await heads.count() == 3
        for text in await heads.all_text_contents():
            assert text.endswith(" EUR")
        seen.clean()


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_console_shows_what_was_saved(chromium: Browser, theme: str) -> None:
    given = TURNS.model_dump(exclude_defaults=True)
    for name, one in given["experts"].items():
        price = 40 if name == "code" else 1
        one |= {
            "quality": {label: 0.9 if name == "code" else 0.5 for label in given["experts"]},
            "price": {"prompt": price, "completion": price},
        }
    given["experts"]["math"]["quality"]["math"] = 0.88
    given["savings"] = {"against": ["code"]}
    config = Config.model_validate(given)
    async with run_gateway(config) as s, watched(chromium, s.url, theme=theme) as seen:
        page = await opened(seen, s.url)
        card = page.locator("#savings-card")
        await expect(card).to_be_hidden()
        for _ in range(3):
            status, headers, _ = await s.ask(chat(MATH, model="auto"))
            assert (status, headers["x-coe-expert"]) == (200, "math")
        # Who names an expert leaves nothing to save.
        await s.ask(chat(MATH, model="general"))
        await expect(card).to_be_visible()
        await expect(card.locator(".budget")).to_have_count(1)
        await expect(card).to_contain_text("code")
        await expect(card).to_contain_text("3 requests")
        async with s.get("/metrics") as reply:
            text = await reply.text()

        def total(name: str) -> float:
            return sum(map(float, re.findall(rf"^{name}\{{.*\}} (\S+)", text, re.MULTILINE)))

        cost, baseline = total("coe_savings_cost_total"), total("coe_savings_baseline_cost_total")
        assert 0 < cost < baseline
        await expect(card).to_contain_text(f"{100 * (1 - cost / baseline):.0f} % of the cost")
        await expect(card).to_contain_text("−2.0 points")
        await expect(card).not_to_contain_text("NaN")
        # The meter is as long as the share says.
        meter = card.locator(".meter")
        whole, part = await meter.bounding_box(), await meter.locator("b").bounding_box()
        assert whole is not None
        assert part is not None
        assert part["width"] / whole["width"] == pytest.approx(1 - cost / baseline, abs=0.03)
        assert await faults(page) == []
        seen.clean()


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_console_shows_what_quality_costs(chromium: Browser, theme: str) -> None:
    given = TURNS.model_dump(exclude_defaults=True)
    figures = {"general": (0.5, 1), "math": (0.6, 2), "intents": (0.4, 1), "code": (0.9, 40)}
    for name, (quality, price) in figures.items():
        given["experts"][name] |= {
            "quality": {label: quality for label in figures} | {name: 0.95},
            "price": {"prompt": price, "completion": price},
        }
    config = Config.model_validate(given)
    async with run_gateway(config) as s, watched(chromium, s.url, theme=theme) as seen:
        page = await opened(seen, s.url)
        await expect(page.locator("#presets tr")).to_have_count(3)
        await expect(page.locator("#frontier .preset")).not_to_have_count(0)
        await expect(page.locator("#frontier-note")).to_contain_text("auto is expected at")
        await expect(page.locator("#frontier-mix")).to_contain_text("fitted on")
        # Saving everything is worth less than a wide lead: the presets differ in quality.
        shown = await page.locator("#presets td:nth-child(2)").all_inner_texts()
        quality = [float(text.removesuffix(" %")) for text in shown]
        assert quality == sorted(quality)
        assert quality[0] < quality[2]
        await page.fill("#prompt", MATH)
        await page.press("#prompt", "Control+Enter")
        other = page.locator(".answer:not(.busy) .elsewhere")
        await expect(other).to_contain_text("code")
        await expect(other).to_contain_text("general")
        row = page.locator("#routes tr")
        await expect(row).to_have_count(1)
        assert re.search(r" to ", await row.locator("td").nth(10).inner_text())
        # From now on the mix is that of the traffic.
        await expect(page.locator("#frontier-mix")).to_contain_text("1 prompt")
        assert await faults(page) == []
        seen.clean()


async def test_console_shows_the_demo_s_frontier_and_where_its_presets_stand(
    chromium: Browser,
) -> None:
    """The demo's config, whose adapters a simulated engine stands in for."""
    given = yaml.safe_load((ROOT / "deploy" / "config" / "demo.yaml").read_text())
    folder = ROOT / "router_models"
    price = {"prompt": 0.1345, "completion": 0.1345}
    for one in given["experts"].values():
        if "adapter" in one:
            one["adapter"] = str(folder / "experts" / "artifacts" / Path(one["adapter"]).name)
        one["price"] = price
    given |= {"pools": {"cpu": {"engine": "simulated"}}, "server": {}}
    given["router"]["artifact"] = str(folder / "artifacts" / "demo@2")
    config = Config.model_validate(given)
    async with run_gateway(config) as s, watched(chromium, s.url) as seen:
        await seen.page.goto(s.url + "/console")
        rows = seen.page.locator("#presets tr")
        await expect(rows).to_have_count(3)
        points = await seen.page.locator("#frontier .frontier").get_attribute("points")
        assert points is not None
        assert len(set(points.split())) >= 3
        # Two rings: `auto:fast` asks `brief` for questions of fact, `auto` and `auto:best` don't.
        await expect(seen.page.locator("#frontier .preset")).to_have_count(2)
        await expect(rows.nth(0)).to_contain_text("brief")
        await expect(rows.nth(1)).not_to_contain_text("brief")
        seen.clean()


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_console_shows_the_memory_of_gpus(
    chromium: Browser, theme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tuple(
        GpuMemory(i, f"GPU-{i}", "NVIDIA H200", 140 << 30, (60 + i) << 30, (79 - i) << 30)
        for i in range(2)
    )
    monkeypatch.setattr("service.pool.pool_process.gpu_memory", lambda: memory)
    given = TURNS.model_dump(mode="json", exclude_defaults=True)
    given["pools"]["cpu"]["gpus"] = 1
    config = Config.model_validate(given)
    async with run_gateway(config) as s, watched(chromium, s.url, theme=theme) as seen:
        page = await opened(seen, s.url)
        await expect(page.locator("#gpus li")).to_have_count(2)
        first = page.locator("#gpus li").first
        await expect(first).to_contain_text("GPU 0, NVIDIA H200: 60 GiB used of 140 GiB")
        await expect(first).to_contain_text("79 GiB free")
        assert await faults(page) == []
        seen.clean()


async def test_console_residency_view_follows_the_traffic(chromium: Browser) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        for name in ("code", "intents"):
            await s.ask(chat(model=name))
            await expect(expert(page, name)).to_have_attribute("data-state", "device")
        await expect(expert(page, "code")).to_have_attribute("data-state", "host")
        seen.clean()


async def test_console_compares_two_experts_and_stops_a_stream(chromium: Browser) -> None:
    slow = TURNS.model_dump()
    slow["pools"]["cpu"]["simulated"]["decode_ms"] = 50
    async with run_gateway(Config.model_validate(slow)) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        await page.locator("#prompt").blur()
        await page.keyboard.press("c")
        await page.select_option("#model-a", "code")
        await page.select_option("#model-b", "general")
        await page.fill("#tokens", "10")
        await page.click("#send")
        await expect(page.locator(".answer")).to_have_count(2)
        await expect(page.locator(".answer:not(.busy)")).to_have_count(2)
        await expect(page.locator(".answer").nth(0).locator("pre")).to_contain_text("code:")
        await expect(page.locator(".answer").nth(1).locator("pre")).to_contain_text("general:")
        await page.fill("#tokens", "2000")
        await page.click("#send")
        # They share a slot: one of them answers first, and would for long.
        await expect(page.locator("#answers")).to_contain_text(re.compile("(code|general): "))
        await page.keyboard.press("Escape")
        await expect(page.locator(".answer .fault")).to_have_count(2)
        seen.clean()


async def test_console_admin_key_moves_weights_and_is_in_no_url(chromium: Browser) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        assert await page.locator(".acts").count() == 0
        await page.locator("#prompt").blur()
        await page.keyboard.press("k")
        await page.fill("#admin-key", "wrong-key")
        await page.press("#admin-key", "Enter")
        await page.get_by_role("button", name="load code").click()
        await expect(page.locator("#admin-said")).to_contain_text("admin key")
        await page.click("#keys-open")
        await page.fill("#admin-key", ADMIN_KEY)
        await page.press("#admin-key", "Enter")
        await page.get_by_role("button", name="load code").click()
        await expect(page.locator("#admin-said")).to_contain_text("load code: done")
        await expect(expert(page, "code")).to_have_attribute("data-state", "host")
        await page.get_by_role("button", name="pin code", exact=True).click()
        await expect(expert(page, "code")).to_contain_text("pinned")
        await page.get_by_role("button", name="unpin code").click()
        await page.get_by_role("button", name="evict code").click()
        await expect(expert(page, "code")).to_have_attribute("data-state", "disk")
        assert not any(ADMIN_KEY in url for url in requests)
        assert ADMIN_KEY not in await page.content()
        assert await page.evaluate("Object.keys(localStorage).join()") == ""
        await page.click("#keys-open")
        await page.click("#forget")
        await expect(page.locator(".acts")).to_have_count(0)
        # The wrong key's refusal is the one thing that the browser has noted.
        assert [complaint for complaint in seen.complaints if "401" not in complaint] == []
        assert seen.strangers == []


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [1440, 390])
async def test_console_is_accessible(chromium: Browser, theme: str, width: int) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url, theme=theme, width=width) as seen:
        page = await opened(seen, s.url)
        await page.evaluate(f"sessionStorage.setItem('coe-admin-key', '{ADMIN_KEY}')")
        await page.reload()
        await page.click("#send")
        await expect(page.locator(".answer:not(.busy)")).to_be_visible()
        await expect(page.locator("#routes tr")).to_have_count(1)
        assert await page.evaluate("document.documentElement.dataset.theme") == theme
        assert await faults(page) == []
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(wide) <= 0, "nothing hangs over the edge"
        seen.clean()


async def test_console_theme_is_switched_and_remembered(chromium: Browser) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url) as seen:
        page = await opened(seen, s.url)
        await page.keyboard.press("t")
        root = page.locator("html")
        await expect(root).to_have_attribute("data-theme", "light")
        await page.reload()
        await expect(root).to_have_attribute("data-theme", "light")
        seen.clean()


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_api_page_sends_what_it_shows(chromium: Browser, theme: str) -> None:
    async with run_gateway(TURNS) as s, watched(chromium, s.url, theme=theme) as seen:
        page = await opened(seen, s.url, "/docs")
        chat_card = page.locator("#post-v1-chat-completions")
        await chat_card.get_by_role("button", name="Send").click()
        await expect(chat_card.get_by_label("Reply")).to_contain_text("200 OK")
        await expect(chat_card.get_by_label("Reply")).to_contain_text("x-coe-expert: general")
        assert await faults(page) == []
        seen.clean()


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_console_shows_the_log_of_a_server_to_admins(chromium: Browser, theme: str) -> None:
    run = foreign_server.command("--say", "<b>loaded</b> the weights")
    names = ("general", "math", "intents", "code")
    experts = {name: {"command": {"run": run, "memory_bytes": 1}} for name in names}
    pools = {"cpu": {"slots": 1, "swap": {"min_stay_s": 0}}}
    config = Config.model_validate(
        {"router": {"artifact": "none"}, "experts": experts, "pools": pools}
    )
    async with run_gateway(config) as s, watched(chromium, s.url, theme=theme) as seen:
        page = await opened(seen, s.url)
        assert await page.get_by_role("button", name="log general").count() == 0
        await page.evaluate(f"sessionStorage.setItem('coe-admin-key', '{ADMIN_KEY}')")
        await page.reload()
        await expect(expert(page, "general")).to_contain_text("by command")
        await page.get_by_role("button", name="log general").click()
        await expect(page.locator("#server-log-title")).to_have_text("Log of general")
        # Its text is no markup.
        await expect(page.locator("#server-log-lines")).to_have_text("<b>loaded</b> the weights")
        assert await faults(page) == []
        await page.keyboard.press("Escape")
        await expect(page.locator("#server-log")).not_to_be_visible()
        seen.clean()
