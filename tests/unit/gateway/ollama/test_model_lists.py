"""Models in the forms of Ollama's API, which its own client can read."""

from __future__ import annotations

from typing import Any

from ollama import ListResponse, ProcessResponse, ShowResponse

from service.gateway.ollama.model_lists import listed, running, shown


def entry(name: str, *capabilities: str, state: str = "device", **more: Any) -> dict[str, Any]:
    coe = {"kind": "full", "capabilities": capabilities, "state": state}
    return {"id": name, "created": 1e9, "coe": coe, **more}


ENTRIES = [
    entry("chats", "chat", "tools", max_model_len=64, parent="base"),
    entry("embeds", "embeddings", state="disk"),
    entry("ranks", "rerank"),
]


def test_list_has_the_models_that_ollama_s_api_can_ask() -> None:
    found = ListResponse.model_validate(listed(ENTRIES)).models
    assert [model.model for model in found] == ["chats", "embeds"]
    assert len({model.digest for model in found}) == 2
    assert found[0].modified_at is not None
    assert found[0].modified_at.timestamp() == 1e9
    assert found[0].details is not None
    assert found[0].details.parent_model == "base"


def test_running_models_are_those_on_a_device() -> None:
    (found,) = ProcessResponse.model_validate(running(ENTRIES)).models
    assert (found.name, found.context_length) == ("chats", 64)


def test_model_has_its_capabilities_and_context() -> None:
    found = ShowResponse.model_validate(shown(ENTRIES[0], thinks=True))
    assert found.capabilities == ["completion", "tools", "thinking"]
    assert found.modelinfo is not None
    architecture = found.modelinfo["general.architecture"]
    assert found.modelinfo[f"{architecture}.context_length"] == 64
    assert shown(ENTRIES[1])["capabilities"] == ["embedding"]
