"""Reads from a model folder's config whether the model takes images, audio and video.

The tokens of a picture are known where the model's processor counts them by a simple rule. Qwen-VL
and GLM-V count by area. LLaVA-1.5, PaliGemma and Gemma use a fixed number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VISION = ("vision_config", "visual", "vision_tower_config", "perceiver_config")
_AUDIO = ("audio_config", "audio_encoder_config", "speech_config")
_FIXED = {"llava": "image_seq_length", "paligemma": "num_image_tokens"}
# The tokens that templates put around a picture: its beginning, its end, line breaks.
_AROUND = 8


@dataclass(frozen=True, slots=True)
class Senses:
    """The inputs that a model takes beside text.

    Attributes:
        vision: Whether the model takes images.
        audio: Whether the model takes audio.
        image_tokens: The largest number of tokens of one picture, or None where there is no simple
            rule.
        image_edge: The edge in pixels of the square that becomes one token. None where a picture's
            size does not matter or there is no simple rule.
    """

    vision: bool = False
    audio: bool = False
    image_tokens: int | None = None
    image_edge: int | None = None


def senses_of(folder: Path) -> Senses:
    """Read `config.json` and `preprocessor_config.json`. Unreadable files declare no inputs."""
    config = _object(folder / "config.json")
    thinker = config.get("thinker_config")
    parts = {**config, **thinker} if isinstance(thinker, dict) else config
    vision = any(isinstance(parts.get(name), dict) for name in _VISION)
    audio = any(isinstance(parts.get(name), dict) for name in _AUDIO)
    if not vision:
        return Senses(audio=audio)
    tokens, edge = _picture(parts, _object(folder / "preprocessor_config.json"))
    return Senses(vision, audio, tokens, edge)


def _picture(
    config: Mapping[str, Any], processor: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """Return the largest number of tokens of one picture, and the edge of a token in pixels."""
    patch, merge = _count(processor, "patch_size"), _count(processor, "merge_size")
    if patch and merge:
        size = processor.get("size")
        areas = size if isinstance(size, dict) else {}
        most = _count(processor, "max_pixels") or _count(areas, "longest_edge")
        edge = patch * merge
        # `longest_edge` is an area here, because a length would be a few thousand at most.
        if most and most > 100 * edge * edge:
            return most // (edge * edge) + _AROUND, edge
        return None, None
    fixed = _count(config, "mm_tokens_per_image") or _count(
        config, _FIXED.get(str(config.get("model_type")), "")
    )
    return (fixed + _AROUND if fixed else None), None


def _count(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    return None


def _object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
