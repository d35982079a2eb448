"""What follows a reply to a line, and the result that it makes."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest

from service.batches.line_call import (
    MOST_FAILURES,
    After,
    LineCall,
    LineReply,
    after_reply,
    fault_of,
    least_cost,
    result_of,
    wait_s,
    with_used,
)
from service.errors import DeadlineExceededError, RateLimitExceededError, UnauthorizedError
from service.http.asgi_helpers import send_response
from service.http.on_behalf import OnBehalf, UsedByCalls, on_behalf
from service.types import NOBODY


@pytest.mark.parametrize(
    ("status", "waits", "failures", "after"),
    [
        (200, False, 0, After.FINISHED),
        (400, False, 0, After.FINISHED),
        (404, False, 0, After.FINISHED),
        (401, False, 0, After.FINISHED),
        (429, True, 99, After.WAIT),
        (429, False, 0, After.FINISHED),
        (503, False, 99, After.WAIT),
        (504, False, 99, After.WAIT),
        (504, False, MOST_FAILURES - 2, After.WAIT),
        (500, False, 0, After.TRY_AGAIN),
        (502, False, MOST_FAILURES - 2, After.TRY_AGAIN),
        (502, False, MOST_FAILURES - 1, After.FINISHED),
        (0, False, 0, After.TRY_AGAIN),
        (0, False, MOST_FAILURES - 1, After.FINISHED),
    ],
)
def test_after_reply(status: int, waits: bool, failures: int, after: After) -> None:
    assert after_reply(status, waits=waits, failures=failures) is after
    own = after_reply(status, waits=waits, failures=failures, own_deadline=True)
    # A deadline of the line's own would be too short again.
    assert own is (After.FINISHED if status == 504 else after)
    # An engine that has made tokens all the time would make them again, for nobody's account.
    if status == 504:
        after = After.TRY_AGAIN if failures < MOST_FAILURES - 1 else After.FINISHED
    assert after_reply(status, waits=waits, failures=failures, answered=True) is after


@pytest.mark.parametrize(
    ("coe", "deadline"),
    [({"deadline_ms": 70}, None), ({"deadline_ms": "x"}, None), ({"deadline_ms": None}, b"2500"),
     ({"max_cost": 1}, b"2500"), ([], b"2500")],
)  # fmt: skip
async def test_call_leaves_a_deadline_of_its_body_in_force(
    coe: object, deadline: bytes | None
) -> None:
    seen: dict[bytes, bytes] = {}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])

    call = LineCall("/v1/embeddings", {"coe": coe}, "batch_req_1", 2.5)
    await call.run(answer, OnBehalf(NOBODY), LineReply().send)
    assert seen.get(b"x-coe-deadline-ms") == deadline


def test_wait_grows_to_a_minute_and_keeps_to_what_the_reply_says() -> None:
    waits = [wait_s(tries, None, 1.0) for tries in range(1, 40)]
    assert waits == sorted(waits)
    assert waits[0] == 0.25
    assert waits[-1] == 60
    assert wait_s(1, 10.0, 1.0) == 10
    assert wait_s(1, 10.0, 0.0) == 7.5
    assert wait_s(1, 86_400.0, 1.0) == 60


async def reply_with(status: int, body: bytes) -> LineReply:
    reply = LineReply()
    await send_response(reply.send, status, [(b"Retry-After", b"7")], body)
    return reply


@pytest.mark.parametrize("words", [("prompt", "completion"), ("input", "output")])
async def test_result_of_an_answer_has_its_usage(words: tuple[str, str]) -> None:
    prompt, answer = words
    usage = {
        f"{prompt}_tokens": 3,
        f"{answer}_tokens": 4,
        f"{prompt}_tokens_details": {"cached_tokens": 2},
        f"{answer}_tokens_details": {"reasoning_tokens": 1},
        "coe": {"cost": 0.5},
    }
    reply = await reply_with(200, json.dumps({"id": "x", "usage": usage}).encode())
    assert reply.retry_after_s == 7
    result = result_of(5, "mine", "batch_req_1", reply, b"[]")
    assert (result.line, result.failed, result.settlements) == (5, False, b"[]")
    assert (result.prompt_tokens, result.completion_tokens, result.cost) == (3, 4, 0.5)
    assert (result.cached_tokens, result.reasoning_tokens) == (2, 1)
    assert json.loads(result.body) == {
        "id": "batch_req_1",
        "custom_id": "mine",
        "response": {
            "status_code": 200,
            "request_id": "batch_req_1",
            "body": {"id": "x", "usage": usage},
        },
        "error": None,
    }
    assert b"\n" not in result.body


@pytest.mark.parametrize("body", [b"", b"{", b'{"a":'])
async def test_result_of_a_cut_answer_is_an_error(body: bytes) -> None:
    result = result_of(0, "a", "r", await reply_with(200, body), None)
    assert result.failed
    assert json.loads(result.body)["error"]["code"] == "no_answer"


async def test_result_without_an_answer_has_what_its_last_try_made() -> None:
    used = UsedByCalls(9, 40, 0.5)
    reply = LineReply()
    reply.refuse(DeadlineExceededError("too late"))
    late = with_used(result_of(0, "a", "r", reply, b"[]"), used)
    assert (late.prompt_tokens, late.completion_tokens, late.cost) == (9, 40, 0.5)
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "coe": {"cost": 3.0}}
    answer = await reply_with(200, json.dumps({"usage": usage}).encode())
    told = with_used(result_of(0, "a", "r", answer, b"[]"), used)
    assert (told.prompt_tokens, told.completion_tokens, told.cost) == (1, 2, 3.0)


async def test_result_of_an_error_reply_keeps_status_and_body() -> None:
    reply = LineReply()
    reply.refuse(UnauthorizedError("no longer"))
    result = result_of(0, "a", "r", reply, None)
    found = json.loads(result.body)
    assert result.failed
    assert found["error"] is None
    assert found["response"]["status_code"] == 401
    assert found["response"]["body"]["error"]["code"] == "invalid_api_key"
    reply.refuse(RateLimitExceededError("later", retry_after_s=3.0))
    assert (reply.status, reply.retry_after_s) == (429, 3.0)


def test_fault_of_a_line_without_a_name() -> None:
    found = json.loads(fault_of(3, None, "r", "invalid_json_line", "line 4: no JSON").body)
    assert found == {
        "id": "r",
        "custom_id": None,
        "response": None,
        "error": {"code": "invalid_json_line", "message": "line 4: no JSON"},
    }


async def test_call_is_made_for_its_tenant_in_the_lowest_class() -> None:
    seen: dict[str, Any] = {}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope, body=await receive(), behalf=on_behalf(scope))
        await send_response(send, 200, [], b"{}")

    behalf: OnBehalf[Any] = OnBehalf(NOBODY)
    reply = LineReply()
    call = LineCall("/v1/embeddings", {"model": "m"}, "batch_req_1", 2.5)
    await call.run(answer, behalf, reply.send)
    headers = dict(seen["headers"])
    assert (seen["path"], seen["method"], seen["behalf"]) == ("/v1/embeddings", "POST", behalf)
    assert headers[b"x-coe-priority"] == b"low"
    assert headers[b"x-coe-deadline-ms"] == b"2500"
    assert headers[b"x-request-id"] == b"batch_req_1"
    assert seen["body"]["body"] == b'{"model":"m"}'
    assert int(headers[b"content-length"]) == 13
    assert reply.status == 200


@pytest.mark.parametrize(
    ("body", "most", "header"),
    [
        ({}, 0.5, b"0.5"),
        ({}, math.inf, None),
        ({"coe": {"max_cost": 2}}, 0.5, b"0.5"),
        ({"coe": {"max_cost": 0.1}}, 0.5, None),
        ({"coe": {"max_cost": "much"}}, 0.5, None),
    ],
)
async def test_call_tells_the_lower_bound_of_cost(
    body: dict[str, Any], most: float, header: bytes | None
) -> None:
    seen: dict[str, Any] = {}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        await send_response(send, 200, [], b"{}")

    call = LineCall("/v1/embeddings", {"model": "m", **body}, "batch_req_1", 2.5, most)
    await call.run(answer, OnBehalf(NOBODY), LineReply().send)
    assert dict(seen["headers"]).get(b"x-coe-max-cost") == header


@pytest.mark.parametrize(
    ("status", "error", "least"),
    [
        (400, {"code": "infeasible_bounds", "nearest": {"max_cost": 0.5}}, 0.5),
        (400, {"code": "infeasible_bounds", "nearest": {"together": {"max_cost": 2}}}, 2.0),
        (400, {"code": "infeasible_bounds", "nearest": {"min_quality": 0.5}}, None),
        (400, {"code": "infeasible_bounds", "nearest": {"max_cost": "0.5"}}, None),
        (400, {"code": "infeasible_bounds", "nearest": None}, None),
        (400, {"code": "infeasible_bounds"}, None),
        (400, {"code": "invalid_request", "nearest": {"max_cost": 0.5}}, None),
        (400, None, None),
        (200, {"code": "infeasible_bounds", "nearest": {"max_cost": 0.5}}, None),
    ],
)
def test_least_cost_is_that_of_a_reply_that_refuses_the_bound(
    status: int, error: object, least: float | None
) -> None:
    reply = LineReply(status, body=bytearray(orjson.dumps({"error": error})))
    assert least_cost(reply) == least


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'"error"'])
def test_least_cost_of_a_strange_body_is_unknown(body: bytes) -> None:
    assert least_cost(LineReply(400, body=bytearray(body))) is None
