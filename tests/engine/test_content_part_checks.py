"""Our check of content parts covers every address and media type that vLLM's parser accepts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from service.config import Config
from service.errors import CoeError
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.media_tokens import media_of

LIMITS = RequestLimitChecker(
    Config.model_validate({"experts": {"a": {"model": "m"}}, "pools": {"cpu": {"engine": "vllm"}}})
)
TYPES = (None, "text", "thinking", "refusal", "input_text", "output_text", "tool_reference")
MEDIA = ("image_url", "audio_url", "video_url", "input_audio", "image_pil")
EMBEDS = ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds")
URL = "http://169.254.169.254/latest/meta-data"


def parts() -> list[dict[str, Any]]:
    """Every type with every key, with and without a uuid, the address alone and in an object."""
    found = []
    for kind, key, uuid, whole in itertools.product(
        (*TYPES, *MEDIA, *EMBEDS, "input_image", ["text"]),
        (*MEDIA, *EMBEDS),
        (None, "1"),
        (False, True),
    ):
        part: dict[str, Any] = {"text": "x", "detail": "auto"}
        part[key] = {"url": URL} if whole else URL
        if kind is not None:
            part["type"] = kind
        if uuid is not None:
            part["uuid"] = uuid
        if kind == "prompt_embeds":
            part["data"] = "gASV"
        found.append(part)
    return found


def refused(part: dict[str, Any]) -> bool:
    try:
        LIMITS.fields({"messages": [{"role": "user", "content": [part]}]})
    except CoeError:
        return True
    return False


def test_content_part_that_vllm_would_fetch_or_load_is_refused() -> None:
    chat = pytest.importorskip("vllm.renderers.chat_utils")
    taken = 0
    for part in parts():
        try:
            kind, content = chat._parse_chat_message_content_mm_part(dict(part))
        except Exception:
            continue  # vLLM refuses it
        if content is None or kind == "input_audio":
            continue
        if kind in chat.TEXT_PART_TYPES or kind == "tool_reference":
            continue
        if content == "unknown part_type content":
            continue
        taken += 1
        assert refused(part), (kind, part)
    assert taken > 100


def test_content_part_that_vllm_takes_for_media_is_counted_as_media() -> None:
    chat = pytest.importorskip("vllm.renderers.chat_utils")
    capability = {"image_url": "vision", "input_image": "vision", "video_url": "vision"}
    capability |= {"audio_url": "audio", "input_audio": "audio"}
    seen = set()
    for part in parts():
        try:
            kind, content = chat._parse_chat_message_content_mm_part(dict(part))
        except Exception:
            continue
        if content is not None and kind in capability:
            seen.add(kind)
            needs = media_of({"messages": [{"role": "user", "content": [part]}]}).needs
            assert capability[kind] in needs, (kind, part)
    assert seen == capability.keys()
