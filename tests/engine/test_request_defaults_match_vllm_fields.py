"""The forms that defaults have on each endpoint are those of vLLM's own requests."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from service.gateway.request.expert_defaults import FIELDS
from tests.unit.gateway.request.test_expert_defaults import EVERY, FORMS

REQUESTS = {
    "/v1/chat/completions": "openai.chat_completion.protocol:ChatCompletionRequest",
    "/v1/completions": "openai.completion.protocol:CompletionRequest",
    "/v1/responses": "openai.responses.protocol:ResponsesRequest",
    "/v1/responses/input_tokens": "openai.responses.protocol:ResponsesRequest",
    "/v1/messages": "anthropic.protocol:AnthropicMessagesRequest",
    "/v1/messages/count_tokens": "anthropic.protocol:AnthropicCountTokensRequest",
    "/tokenize": "serve.tokenize.protocol:TokenizeChatRequest",
}


def request_class(path: str) -> Any:
    pytest.importorskip("vllm")
    module, _, name = REQUESTS[path].partition(":")
    return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)


@pytest.mark.filterwarnings("ignore")  # vLLM's and torch's own
@pytest.mark.parametrize("path", sorted(FIELDS))
def test_form_of_defaults_is_valid_for_vllm_and_leaves_no_field_out(path: str) -> None:
    made = request_class(path)
    made.model_validate({"model": "m", **FORMS[path]})
    assert FORMS[path].keys() <= made.model_fields.keys()
    # A default whose field vLLM knows by the same name has a place in the table.
    same = (EVERY.keys() - {"system", "max_tokens"}) & made.model_fields.keys()
    assert same <= FIELDS[path].keys()
