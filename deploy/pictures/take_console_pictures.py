"""Takes the README's pictures of the console from a running service, with real traffic.

    coe serve -c deploy/config/swap.yaml
    python deploy/pictures/take_console_pictures.py

Needs the `dev` packages and Debian's chromium. Prompts go to the service while the page is
open; each picture is a WebP beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import threading
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
PROMPTS = {
    "general": ["Tell me a joke", "What is the capital of France?", "Say something kind."],
    "math": ["A farmer has 12 cows and buys 7 more. How many cows?", "What is 3 times 14?"],
    "intents": ["please freeze my bank account", "book a flight to Paris"],
    "code": [
        "Write a Python function that reverses a string",
        "Write a loop over a list in Python",
    ],
}
ASKED = "A farmer has 12 cows and buys 7 more. How many cows are there?"


def traffic(url: str, over: threading.Event, rate: float) -> None:
    """Prompts of every kind, in bursts of one kind as people's are, until it is over."""
    chance = random.Random(1)
    while not over.is_set():
        kind = chance.choice(list(PROMPTS))
        for _ in range(chance.randint(1, 4)):
            prompt = chance.choice(PROMPTS[kind])
            threading.Thread(target=ask, args=(url, prompt), daemon=True).start()
            over.wait(chance.expovariate(rate))


def ask(url: str, prompt: str) -> None:
    """Send a request and discard its answer."""
    body = {
        "model": "auto",
        "max_tokens": 24,
        "messages": [{"role": "user", "content": prompt}],
    }
    request = urllib.request.Request(
        url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()


def picture(page: Page, url: str, name: str, height: int) -> None:
    """The page, after one prompt of its own was answered."""
    page.goto(url + "/console")
    page.wait_for_selector(".expert")
    page.fill("#prompt", ASKED)
    page.fill("#tokens", "48")
    time.sleep(25)
    page.click("#send")
    page.wait_for_selector(".answer:not(.busy)", timeout=120_000)
    time.sleep(1)
    page.evaluate("document.activeElement.blur()")
    width = page.viewport_size["width"] if page.viewport_size else 0
    data = page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": height})
    path = HERE / f"{name}.webp"
    Image.open(io.BytesIO(data)).convert("RGB").save(path, "WEBP", quality=82, method=6)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB")


def main() -> None:
    """Both themes, and a phone."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--url", default="http://127.0.0.1:8000")
    words.add_argument("--rate", type=float, default=1.0, help="prompts a second")
    given = words.parse_args()
    over = threading.Event()
    threading.Thread(target=traffic, args=(given.url, over, given.rate), daemon=True).start()
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        shots = (("dark", 1440, 1085), ("light", 1440, 1085), ("phone", 390, 844))
        for name, width, height in shots:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="light" if name == "light" else "dark",
                device_scale_factor=1.25 if name != "phone" else 2,
            )
            picture(context.new_page(), given.url, f"console-{name}", height)
            context.close()
        browser.close()
    over.set()


if __name__ == "__main__":
    main()
