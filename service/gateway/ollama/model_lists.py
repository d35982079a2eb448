"""Models in the forms of Ollama's API: the list, one model, and those in memory. Pure.

What Ollama knows of a file and we do not is 0 or empty. A model's digest is that of its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

API_VERSION = "0.12.0"
"""The version of Ollama whose API this is; clients refuse older ones."""
# A model in memory that nothing unloads is shown as one that stays for a century.
_NEVER = "2126-01-01T00:00:00Z"
_CAPABILITIES = {
    "chat": "completion",
    "tools": "tools",
    "vision": "vision",
    "embeddings": "embedding",
}


def listed(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The list of models, from the entries of OpenAI's."""
    return {"models": [_head(entry) for entry in entries if _is_shown(entry)]}


def running(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The models whose weights are on the device."""
    models = []
    for entry in entries:
        if _is_shown(entry) and entry["coe"].get("state") == "device":
            head = _head(entry)
            del head["modified_at"]
            more = {"expires_at": _NEVER, "size_vram": 0}
            models.append({**head, **more, "context_length": entry.get("max_model_len", 0)})
    return {"models": models}


def shown(entry: Mapping[str, Any], *, thinks: bool = False) -> dict[str, Any]:
    """What is known of one model.

    Args:
        entry: Its entry in OpenAI's list.
        thinks: Whether it can be told to think.
    """
    able = entry["coe"]["capabilities"]
    capabilities = [theirs for ours, theirs in _CAPABILITIES.items() if ours in able]
    context = entry.get("max_model_len")
    info: dict[str, Any] = {"general.architecture": "coe", "general.basename": entry["id"]}
    if context is not None:
        info["coe.context_length"] = context
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": _time(entry),
        "details": _details(entry),
        "model_info": info,
        "capabilities": [*capabilities, "thinking"] if thinks else capabilities,
    }


def _is_shown(entry: Mapping[str, Any]) -> bool:
    """Whether Ollama's API can ask a model: it chats or embeds."""
    return bool({"chat", "completions", "embeddings"} & {*entry["coe"]["capabilities"]})


def _head(entry: Mapping[str, Any]) -> dict[str, Any]:
    name = entry["id"]
    return {
        "name": name,
        "model": name,
        "modified_at": _time(entry),
        "size": 0,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(entry),
    }


def _details(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "parent_model": entry.get("parent", ""),
        "format": "",
        "family": entry["coe"]["kind"],
        "families": [entry["coe"]["kind"]],
        "parameter_size": "",
        "quantization_level": "",
    }


def _time(entry: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(entry["created"], UTC).isoformat().replace("+00:00", "Z")
