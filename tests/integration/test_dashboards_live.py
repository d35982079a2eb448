"""Every dashboard panel has data in a live Prometheus after a short load."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.project.test_dashboards import BOARDS, panels
from tests.support.prometheus_server import Prometheus, needs_prometheus, prometheus
from tests.support.traffic_for_every_metric import an_engine_dies, busy_site, round_of_traffic

# vLLM's own are asked for where there is one: tests/integration/test_demo.py.
ENGINE = "vllm:"
LOAD_S = 6.0


def empty(live: Prometheus) -> list[str]:
    """The panels that show nothing."""
    return [
        f"{board.stem}: {panel['title']}"
        for board in BOARDS
        for panel in panels(board)
        if not any(live.series(target["expr"]) for target in panel["targets"])
        and not any(ENGINE in target["expr"] for target in panel["targets"])
    ]


@needs_prometheus
async def test_every_panel_has_data_after_a_short_load(tmp_path: Path) -> None:
    async with busy_site(tmp_path) as s:
        starting = prometheus(s.url, tmp_path)
        live = await asyncio.to_thread(starting.__enter__)
        try:
            end_s = time.monotonic() + LOAD_S
            await an_engine_dies(s)
            while time.monotonic() < end_s or await asyncio.to_thread(empty, live):
                assert time.monotonic() < end_s + 120, await asyncio.to_thread(empty, live)
                await round_of_traffic(s)
            health = await asyncio.to_thread(live.rules)
            assert health
            assert set(health.values()) == {"ok"}
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)
