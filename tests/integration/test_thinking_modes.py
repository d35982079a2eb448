"""Two ways of asking one model, and an endpoint that thinks as long as it is let."""

from __future__ import annotations

import itertools
import json
from typing import Any

from service.config import Config
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import chat, run_gateway, serving, simulated

ANSWER = 5


class Thinker:
    """A vLLM server whose thinking is short, or once in ten answers long, as the budget allows."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self._natural = itertools.cycle([*range(20, 29), 2000])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await read_body(receive, 10**6))
        self.asked.append(body)
        thinks = body["chat_template_kwargs"]["enable_thinking"]
        thought = min(next(self._natural), body.get("thinking_token_budget", 10**6)) * thinks
        usage = {
            "prompt_tokens": 3,
            "completion_tokens": thought + ANSWER,
            "completion_tokens_details": {"reasoning_tokens": thought},
        }
        fields = {"model": "m", "choices": [{"message": {"content": "a"}}], "usage": usage}
        kind = (b"content-type", b"application/json")
        await send({"type": "http.response.start", "status": 200, "headers": [kind]})
        await send({"type": "http.response.body", "body": json.dumps(fields).encode()})


def config(url: str) -> Config:
    far = {"url": url + "/v1", "model": "m", "thinking_fields": "vllm"}
    return simulated(
        {"cpu": {}},
        experts={
            "general": {"model": "m", "thinking": False, "quality": {"general": 0.1}},
            "think": {
                "remote": far,
                "thinking": {"learned_quantile": 0.8},
                "price": {"completion": 1e6},
                "categories": ["general"],
            },
            "fast": {"base": "think", "thinking": False, "quality": {"general": 0.9}},
        },
    )


async def test_requests_choose_the_way_and_easy_prompts_learn_to_think_little() -> None:
    thinker = Thinker()
    async with serving(thinker) as served, run_gateway(config(served.url)) as stage:
        for effort, chosen in (("none", "fast"), ("medium", "think")):
            status, headers, _ = await stage.ask(chat(model="auto", reasoning_effort=effort))
            assert (status, headers["x-coe-expert"]) == (200, chosen)
        for model, effort in (("think", "none"), ("fast", "medium")):
            status, _, reply = await stage.ask(chat(model=model, reasoning_effort=effort))
            assert status == 400
            assert f"expert '{model}'" in reply["error"]["message"]
            assert reply["error"]["param"] == "reasoning_effort"
        spent = []
        medium = chat(model="auto:fast/general", reasoning_effort="medium")
        for _ in range(160):
            status, _, reply = await stage.ask(medium)
            assert status == 200
            (call,) = reply["usage"]["coe"]["calls"]
            # Thinking is part of the answer, and of its price.
            assert call["completion_tokens"] == call["reasoning_tokens"] + ANSWER == call["cost"]
            spent.append(call)
        budgets = [call.get("thinking_budget") for call in spent]
        assert budgets[0] is None
        assert budgets[-1] == thinker.asked[-1]["thinking_token_budget"]
        assert budgets[-1] == 30
        assert max(call["reasoning_tokens"] for call in spent[:50]) == 2000
        assert max(call["reasoning_tokens"] for call in spent[100:]) == 30
        # Who asks for more gets it.
        await stage.ask({**medium, "reasoning_effort": "high"})
        assert "thinking_token_budget" not in thinker.asked[-1]
        async with stage.get("/metrics") as answer:
            metrics = await answer.text()
        total = sum(call["reasoning_tokens"] for call in spent)
        line = next(x for x in metrics.splitlines() if x.startswith("coe_reasoning_tokens_total{"))
        assert 'expert="think"' in line
        assert float(line.split()[-1]) >= total
