"""Calls of members, with a dispatcher that answers at once or never."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from service.broker.cost_model import CostModel
from service.broker.round_gains import RoundGains
from service.broker.token_prices import Price
from service.gateway.dispatch.deliberation import DeliberationExecutor
from service.gateway.dispatch.member_calls import MemberCall, MemberCalls
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import ExpertCall, RequestRecord
from service.http.asgi_helpers import send_response

SYSTEM_BYTES = 4000


def request(**more: object) -> InferenceRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 64, **more}
    return parse_request("/v1/chat/completions", json.dumps(body).encode(), {}, 1000)


def prices(prompt: float, completion: float) -> CostModel:
    return cast(CostModel, SimpleNamespace(price=lambda _: Price(prompt, completion)))


def calls(
    reply: bytes | None, asked: InferenceRequest, cost_model: CostModel | None = None
) -> DeliberationExecutor:
    """Calls whose members reply with these bytes; None never replies."""

    async def dispatch(_: Any, __: Any, send: Any, *more: Any) -> None:
        if reply is None:
            await asyncio.sleep(60)
        send.expert_call = ExpertCall("e", Price(1, 1))
        send.record.calls.append(send.expert_call)
        await send_response(send, 200, [(b"content-type", b"application/json")], reply or b"")

    option = SimpleNamespace(wait_s=0.0, answer_s=1e-6)
    selection = SimpleNamespace(
        expert_in_pool=lambda _: option, request=SimpleNamespace(tokens=np.array([5000.0]))
    )
    dispatcher = SimpleNamespace(
        dispatch=dispatch, defaults=SimpleNamespace(system_bytes=lambda *_: SYSTEM_BYTES)
    )
    parts: dict[str, Any] = {
        "dispatcher": dispatcher,
        "catalog": SimpleNamespace(index={"e": 0}),
        "cost_model": cost_model or prices(1, 1),
        "recipe": None,
        "request": asked,
        "plan": None,
        "selection": selection,
        "position": 0,
        "reply": SimpleNamespace(record=RequestRecord()),
        "deadline_s": time.monotonic() + 10,
        "round_gains": RoundGains(),
    }
    return DeliberationExecutor(**parts)


@pytest.fixture(autouse=True)
def _one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemberCalls, "only", lambda *_: None)


@pytest.mark.parametrize(
    "choices",
    [
        None,
        [],
        ["x"],
        [{}],
        [{"message": None}],
        [{"message": "x"}],
        [{"message": {"content": ["x"]}}],
        [{"message": {"content": 7}}],
        [{"message": {"content": "x"}}, "y"],
        [{"message": {"content": "x"}, "logprobs": [1]}],
        [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": None}]}}],
        [{"message": {"content": "x"}, "finish_reason": ["stop"]}],
    ],
)
async def test_ask_a_member_that_sends_another_format_has_failed_alone(choices: object) -> None:
    asked = calls(json.dumps({"choices": choices}).encode(), request())
    answer = await asked.ask(MemberCall("e", asked.request))
    assert answer.error is not None
    assert "unknown format" in answer.error.message
    assert (answer.text, answer.final) == ("", None)


async def test_ask_reads_a_member_s_answer() -> None:
    choice = {"message": {"content": "#### 4"}, "finish_reason": "stop", "logprobs": None}
    asked = calls(json.dumps({"choices": [choice]}).encode(), request())
    answer = await asked.ask(MemberCall("e", asked.request))
    assert answer.ok
    assert answer.text == "#### 4"
    assert answer.final is not None


@pytest.mark.parametrize(
    ("usage", "tokens", "estimated"),
    [
        ({}, (None, 25 + 10), True),
        ({"usage": {"prompt_tokens": 7}}, (7, 25 + 10), True),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 0}}, (7, 0), False),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 9}}, (7, 9), False),
    ],
)
async def test_ask_a_member_without_usage_is_charged_by_its_answer_s_size(
    usage: dict[str, Any], tokens: tuple[int | None, int], estimated: bool
) -> None:
    message = {"content": "x" * 100, "reasoning": "y" * 40, "reasoning_content": "y" * 40}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}], **usage}
    asked = calls(json.dumps(reply).encode(), request())
    answer = await asked.ask(MemberCall("e", asked.request))
    [call] = answer.record.calls
    prompt, completion = tokens
    assert call.prompt_tokens == (asked.request.prompt_tokens if prompt is None else prompt)
    assert call.completion_tokens == completion
    assert call.estimated is estimated
    assert call.cost > 0


async def test_together_call_cut_short_has_no_more_tokens_than_it_could_have() -> None:
    asked = calls(None, request())
    [answer] = await asked.together(
        [MemberCall("e", asked.request, "review")], until_s=time.monotonic() + 0.05
    )
    [call] = answer.record.calls
    assert call.completion_tokens == 64


@pytest.mark.parametrize(("more", "fits"), [(0.9, False), (1.1, True)])
async def test_within_cost_counts_the_experts_own_system_prompts(more: float, fits: bool) -> None:
    asked = request()
    asked = request(coe={"max_cost": more * (asked.most_prompt_tokens + SYSTEM_BYTES) / 1e6})
    made = calls(b"", asked, prices(1, 0))._within_cost([asked], ["e"])
    assert (made is not None) is fits
