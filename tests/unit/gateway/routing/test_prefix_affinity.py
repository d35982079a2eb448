"""The engine that has a conversation in its prefix cache: known by this gateway, or by a pool."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.broker.pool_state import PoolView
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.routing.prefix_affinity import PrefixAffinity, prefix_of
from service.rpc.snapshot import Snapshot
from service.types import Tenant

HELLO = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "more"}
# By API: the body of a first turn, and that of the next one.
TURNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": ({"messages": [HELLO]}, {"messages": [HELLO, HI, MORE]}),
    "/v1/messages": (
        {"system": "be brief", "max_tokens": 9, "messages": [HELLO]},
        {"system": "be brief", "max_tokens": 9, "messages": [HELLO, HI, MORE]},
    ),
    "/v1/responses": (
        {"input": "hello"},
        {"input": [HELLO, HI, {"type": "function_call", "call_id": "1", "arguments": "{}"}, MORE]},
    ),
}


def request_for(
    body: dict[str, Any], path: str = "/v1/chat/completions", tenant: str = "a"
) -> InferenceRequest:
    whose = Tenant(tenant, cache_salt=f"salt of {tenant}")
    return parse_request(path, orjson.dumps(body), {}, 1000, whose)


def pool(**prefixes: str) -> PoolView:
    return PoolView("boot", Snapshot("boot", "cpu", prefixes=prefixes), 0.0, {})


@pytest.mark.parametrize("path", TURNS)
def test_prefix_hint_names_where_the_last_turn_was_answered(path: str) -> None:
    first, second = (request_for(body, path) for body in TURNS[path])
    known = PrefixAffinity()
    assert known.hint(first) is None
    known.record_answer(first, "math", "boot")
    warm = known.hint(second)
    assert warm is not None
    assert (warm.expert, warm.boot) == ("math", "boot")
    assert 0 < warm.tokens < second.prompt_tokens
    assert PrefixAffinity().hint(second) is None, "another gateway does not know it by itself"
    from_pool = PrefixAffinity().hint(second, [pool(), pool(**{prefix_of(first): "math"})])
    assert from_pool == warm


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "hallo"}, HI, MORE]},
        {"messages": [{"role": "system", "content": "be brief"}, HELLO, HI, MORE]},
    ],
)
def test_prefix_hint_of_another_beginning_is_none(other: dict[str, Any]) -> None:
    first = request_for({"messages": [HELLO]})
    known = PrefixAffinity()
    known.record_answer(first, "math", "boot")
    assert known.hint(request_for(other), [pool(**{prefix_of(first): "math"})]) is None


def test_prefix_hint_is_the_tenants_own() -> None:
    first, second = TURNS["/v1/chat/completions"]
    known = PrefixAffinity()
    known.record_answer(request_for(first), "math", "boot")
    shared = pool(**{prefix_of(request_for(first)): "math"})
    assert known.hint(request_for(second, tenant="b"), [shared]) is None


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [1.5, {"role": "assistant"}],
        [{"role": ["assistant"], "content": {}}, {"role": "assistant", "content": None}],
    ],
)
def test_prefix_hint_of_malformed_messages_is_none(messages: Any) -> None:
    known = PrefixAffinity()
    one = request_for({"messages": messages}, path="/tokenize")
    known.record_answer(one, "math", "boot")
    assert known.hint(one) is None
