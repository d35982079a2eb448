"""Anthropic's Python client lists and finds the models of a service."""

from __future__ import annotations

import anthropic
import pytest

from tests.support.in_process_service import run_gateway, simulated

_EXPERTS = {
    "a": {"model": "m", "categories": ["general"]},
    "b": {"model": "m", "capabilities": ["chat"]},
    "vectors": {"model": "m", "capabilities": ["embeddings"]},
}


async def test_anthropic_client_lists_models_by_page_and_finds_them() -> None:
    config = simulated({"cpu": {"max_model_len": 64}}, experts=_EXPERTS)
    async with run_gateway(config) as s:
        client = anthropic.AsyncAnthropic(base_url=s.url, api_key="none", max_retries=0)
        async with client:
            page = await client.models.list(limit=2)
            assert [model.id for model in page.data] == ["auto", "a"]
            assert page.has_more
            assert [model.id async for model in client.models.list(limit=1)] == ["auto", "a", "b"]
            found = await client.models.retrieve("b")
            assert (found.id, found.type, found.max_input_tokens) == ("b", "model", 64)
            for name in ("nobody", "vectors"):
                with pytest.raises(anthropic.NotFoundError) as caught:
                    await client.models.retrieve(name)
                body = caught.value.body
                assert isinstance(body, dict)
                assert body["type"] == "error"
                assert body["error"]["type"] == "not_found_error"
            with pytest.raises(anthropic.BadRequestError, match="from 1 to 1000"):
                await client.models.list(limit=5000)
        async with s.get("/v1/models") as reply:
            assert (await reply.json())["object"] == "list"
