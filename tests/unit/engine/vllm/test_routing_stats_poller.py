"""The loop that reads routing samples from an engine."""

from __future__ import annotations

from typing import Any, cast

import pytest

from service.config import MoeCapture
from service.engine.vllm import routing_stats_poller
from service.engine.vllm.routing_stats_poller import RoutingStatsPoller
from tests.support.polling import until


class Watch:
    """An observer that ignores routing samples."""

    def on_routing_sample(self, chosen: object) -> None:
        pass


async def test_poll_loop_after_an_error_continues_and_logs_no_prompt(
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


async def test_poller_that_is_refused_leaves_the_expert_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[str] = []

    async def ask(method: str, *args: object) -> Any:
        asked.append(method)
        return {"refused": "layer 0 is routed inside its kernel"}

    poller = RoutingStatsPoller(ask, cast(Any, Watch()), MoeCapture())
    await poller.start("a", ["a"])
    await poller.stop(poll=True)
    assert asked == ["coe_capture"]
    assert "nothing is sampled: layer 0 is routed inside its kernel" in caplog.text
