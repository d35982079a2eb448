"""Open WebUI in front of the service: pick a model, ask, read the answer.

Opt-in: `deploy/open_webui.sh` installs it, `pytest -m open_webui` runs this alone.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from playwright.async_api import Browser, expect

from service.config import Config
from tests.browser.conftest import watched
from tests.support.in_process_service import run_gateway

pytestmark = [
    pytest.mark.open_webui,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

PROGRAM = Path(__file__).parents[2] / ".cache" / "open_webui" / "venv" / "bin" / "open-webui"
CONFIG = Config.model_validate(
    {
        "experts": {name: {"model": name} for name in ("general", "math")},
        "pools": {"cpu": {"engine": "simulated", "simulated": {"tokens": 12, "decode_ms": 5}}},
    }
)
# Nobody to log in, nothing fetched: no model for documents, no look for a newer version.
ALONE = {
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "of-this-test-alone",
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_OLLAMA_API": "False",
    "ENABLE_VERSION_UPDATE_CHECK": "False",
    "ENABLE_TITLE_GENERATION": "False",
    "ENABLE_TAGS_GENERATION": "False",
    "ENABLE_FOLLOW_UP_GENERATION": "False",
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
    "SCARF_NO_ANALYTICS": "True",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def answers(url: str) -> None:
    """Return when it does."""
    async with aiohttp.ClientSession() as client:
        while True:
            try:
                async with client.get(url + "/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)


@asynccontextmanager
async def open_webui(api: str, folder: Path) -> AsyncIterator[str]:
    """Open WebUI with the service as its only provider: where it is."""
    if not PROGRAM.exists():
        pytest.skip("Open WebUI is not installed (deploy/open_webui.sh installs it)")
    port = free_port()
    more = {"DATA_DIR": str(folder), "OPENAI_API_BASE_URL": api, "OPENAI_API_KEY": "none"}
    environment = os.environ | ALONE | more
    environment.pop("PYTHONPATH", None)
    log = folder / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(str(PROGRAM), "serve", "--host", "127.0.0.1", "--port", str(port)),
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        up, ended = asyncio.create_task(answers(url)), asyncio.create_task(process.wait())
        await asyncio.wait({up, ended}, timeout=200, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        assert up.done(), log.read_text()[-4000:]
        yield url
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_open_webui_picks_an_expert_and_shows_its_answer(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        run_gateway(CONFIG) as service,
        open_webui(service.url + "/v1", tmp_path) as url,
        watched(chromium, url) as seen,
    ):
        page = seen.page
        await page.goto(url)
        # What is new, told at a first visit, is in front of everything else.
        await page.get_by_role("button", name="Okay, Let's Go!").click()
        await page.get_by_label("Selected model").click()
        listed = page.get_by_role("option")
        await expect(listed).to_have_text([re.compile(n) for n in ("auto", "general", "math")])
        await listed.nth(2).click()
        await page.locator("#chat-input").click()
        await page.keyboard.type("Say hello.")
        await page.keyboard.press("Enter")
        # The simulated engine begins with the expert's name and says as many words as it may.
        answer = page.locator(".chat-assistant")
        await expect(answer).to_contain_text(re.compile(r"math:(\s+\w+){11}"))
        assert seen.strangers == []
