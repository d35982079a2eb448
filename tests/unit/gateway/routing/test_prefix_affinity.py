"""The expert and pool that answered a conversation last."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.types import Tenant

FIRST = [{"role": "user", "content": "hello"}]
SECOND = [*FIRST, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]


def request_for(
    messages: Any, tenant: str = "a", path: str = "/v1/chat/completions"
) -> InferenceRequest:
    whose = Tenant(tenant, cache_salt=f"salt of {tenant}")
    return parse_request(path, orjson.dumps({"messages": messages}), {}, 1000, whose)


def test_prefix_hint_names_where_the_conversation_was_answered_for_its_tenant_only() -> None:
    known = PrefixAffinity()
    assert known.hint(request_for(FIRST)) is None
    known.record_answer(request_for(FIRST), "math", "boot")
    warm = known.hint(request_for(SECOND))
    assert warm is not None
    assert (warm.expert, warm.boot) == ("math", "boot")
    assert known.hint(request_for(SECOND, tenant="b")) is None


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
    one = request_for(messages, path="/tokenize")
    known.record_answer(one, "math", "boot")
    assert known.hint(one) is None
