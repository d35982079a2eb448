"""Following the routers of one engine, whatever its worker answers."""

from __future__ import annotations

from typing import Any, cast

import pytest

from service.config import MoeCapture
from service.engine.vllm import routing_stats_poller
from service.engine.vllm.routing_stats_poller import RoutingStatsPoller
from tests.support.waiting import until


class Watch:
    """Who is told; here only that something is."""

    def on_routing_sample(self, chosen: object) -> None:
        """See `EngineWatch`."""


async def test_a_look_that_goes_wrong_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(routing_stats_poller, "INTERVAL_S", 0.001)
    looks: list[int] = []

    async def ask(method: str, *args: object) -> Any:
        if method == "coe_capture":
            return {"layers": [0], "experts": 2, "top_k": 1}
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("a prompt that somebody quotes")
        return {}

    poller = RoutingStatsPoller(ask, cast(Any, Watch()), MoeCapture())
    await poller.start("a", ["a"])
    try:
        poller.has_news = True
        await until(lambda: len(looks) == 1, "it has looked")
        poller.has_news = True
        await until(lambda: len(looks) == 2, "it looks again")
    finally:
        await poller.stop(poll=False)
    assert "RuntimeError" in caplog.text
    assert "a prompt" not in caplog.text
