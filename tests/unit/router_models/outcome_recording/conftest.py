"""An endpoint with OpenAI's API over real HTTP, whose answers the tests script."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.http.asgi_helpers import read_body
from tests.support.in_process_service import serving

Answer = Callable[[str, str], Any]


@dataclass
class Upstream:
    """The endpoint. `answer(model, prompt)` gives a text, a status, or seconds to hang.

    Attributes:
        gate: Answers wait for it.
        price: Cost of a token of a prompt or an answer, told as this service does; None: not told.
        thought: Tokens of thinking, told of every answer; None: not told.
        failures: How many attempts of each (model, prompt) fail first, with this status.
    """

    answer: Answer = lambda model, prompt: f"{model}: {prompt}"
    models: tuple[str, ...] = ("a", "b")
    price: float | None = 1e-3
    failures: int = 0
    status: int = 503
    delay_s: float = 0.0
    template_tokens: int = 10
    thought: int | None = None
    gate: asyncio.Event | None = None
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    tries: Counter[tuple[str, str]] = field(default_factory=Counter)
    charged: float = 0.0
    now: int = 0
    most_at_once: int = 0

    def has(self, count: int) -> bool:
        """Whether so many requests have come."""
        return len(self.asked) >= count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers.append(dict(scope["headers"]))
        if scope["path"] == "/v1/models":
            price = {"prompt": (self.price or 0) * 1e6, "completion": (self.price or 0) * 1e6}
            coe = {"kind": "full"} | ({"price": price} if self.price is not None else {})
            entries = [{"id": name, "coe": coe} for name in self.models]
            auto = {"id": "auto", "coe": {"kind": "auto"}}
            await self._send(send, 200, {"object": "list", "data": [auto, *entries]})
            return
        body = json.loads(await read_body(receive, 10**7))
        self.asked.append(body)
        prompt = body["messages"][-1]["content"]
        self.tries[body["model"], prompt] += 1
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            await asyncio.sleep(self.delay_s)
            if self.gate is not None:
                await self.gate.wait()
            await self._reply(send, body, prompt)
        finally:
            self.now -= 1

    async def _reply(self, send: Any, body: dict[str, Any], prompt: str) -> None:
        if self.tries[body["model"], prompt] <= self.failures:
            await self._send(send, self.status, {"error": {"message": "later", "code": "busy"}})
            return
        answer = self.answer(body["model"], prompt)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = "late"
        if isinstance(answer, int):
            await self._send(
                send, answer, {"error": {"message": "no", "code": None, "type": "bad"}}
            )
            return
        words = answer.split()[: body["max_tokens"]]
        cut = len(words) < len(answer.split())
        usage: dict[str, Any] = {
            "prompt_tokens": self.template_tokens + len(prompt.split()),
            "completion_tokens": len(words),
        }
        cost = (self.price or 0.0) * sum(usage.values())
        if self.thought is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.thought}
        self.charged += cost
        if self.price is not None:
            usage["coe"] = {"cost": round(cost, 9)}
        choice = {
            "message": {"content": " ".join(words) if cut else answer},
            "finish_reason": "length" if cut else "stop",
        }
        await self._send(send, 200, {"choices": [choice], "usage": usage})

    async def _send(self, send: Any, status: int, data: Any) -> None:
        kind = (b"content-type", b"application/json")
        await send({"type": "http.response.start", "status": status, "headers": [kind]})
        await send({"type": "http.response.body", "body": json.dumps(data).encode()})


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Upstream]:
    """A running endpoint; attempts that fail are repeated at once."""

    async def at_once(attempt: int, asked_s: float, jitter: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("router_models.outcome_recording.recorder.backoff", at_once)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    application = Upstream()
    async with serving(application) as served:
        application.url = served.url
        yield application
