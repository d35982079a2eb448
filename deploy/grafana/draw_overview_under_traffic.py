"""Asks a running service for three minutes and draws its overview.

`python -m deploy.grafana.draw_overview_under_traffic http://127.0.0.1:8000 overview.png`, beside
`make serve` and with Debian's prometheus installed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from deploy.grafana.overview_drawing import WINDOW_S, draw

_USERS = 6
_PROMPTS = (
    "Tell me a joke",
    "Who was Ada Lovelace?",
    "Describe the sea in autumn",
    "A farmer has 12 cows and buys 7 more. How many cows?",
    "What is 15 percent of 240?",
    "please freeze my bank account",
    "book a flight to Paris",
    "Write a Python function that reverses a string",
)


@contextmanager
def prometheus(target: str) -> Iterator[str]:
    """One that scrapes a service every second, for as long as this runs; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        scrape = {"job_name": "coe", "static_configs": [{"targets": [target.split("//")[1]]}]}
        config.write_text(
            json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
        )
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={address}",
                "--log.level=error",
            ]
        )
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(20)


async def ask(url: str) -> None:
    """Some users who ask, read and think; busier every other half minute."""
    chance = random.Random(3)
    end_s = time.monotonic() + WINDOW_S
    async with aiohttp.ClientSession() as session:

        async def user() -> None:
            while time.monotonic() < end_s:
                message = {"role": "user", "content": chance.choice(_PROMPTS)}
                body = {
                    "model": "auto",
                    "stream": True,
                    "max_tokens": chance.choice((8, 16, 24, 40)),
                    "messages": [message],
                }
                async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                    await reply.read()
                busy = int(time.monotonic()) // 30 % 2
                await asyncio.sleep(chance.expovariate(1 / (1 if busy else 4)))

        await asyncio.gather(*(user() for _ in range(_USERS)))


def main() -> int:
    """0: drawn."""
    url, path = sys.argv[1:3]
    with prometheus(url) as live:
        asyncio.run(ask(url))
        draw(live, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
