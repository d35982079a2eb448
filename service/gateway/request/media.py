"""Pictures, sound and films in a request: which there are, and how many tokens they take. Pure.

An engine makes tokens of what a picture shows, not of the base64 that carries it: a photograph of
300 kB is 100,000 tokens by its bytes and some hundred to its model.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.config import Config
from service.config.experts import MediaConfig

PARTS_DEEP = 4
"""Levels of parts within parts that are looked at; deeper ones are refused."""
INNER = ("content", "output", "source")
"""Fields of a message or part that hold further parts."""
_FIELDS = ("messages", "input", "system")
# In vLLM's order.
_KEYS = {"image_url": "image", "audio_url": "audio", "input_audio": "audio", "video_url": "video"}
_KINDS = {
    **_KEYS,
    **dict.fromkeys(("image", "input_image", "computer_screenshot"), "image"),
    **dict.fromkeys(("video", "input_video"), "video"),
}
# So much of a picture has its size in it, but for JPEGs with large previews.
_HEADER_CHARACTERS = 65_536
# Processors scale small pictures up, and templates put something around each.
_LEAST_TOKENS = 64
_AROUND_TOKENS = 8

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Media:
    """What a request holds beside text.

    Attributes:
        images: Width and height of each picture in pixels; None where only a fetch would tell.
        audio: How many recordings.
        video: How many films.
        carried_bytes: Bytes of the body that carry them, as base64.
    """

    images: tuple[Size | None, ...] = ()
    audio: int = 0
    video: int = 0
    carried_bytes: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities that an expert must have to take it."""
        needs = set()
        if self.images or self.video:
            needs.add("vision")
        if self.audio:
            needs.add("audio")
        return frozenset(needs)


NOTHING = Media()


def inner_parts(part: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts that a message or part holds, each with its place in it."""
    for name in INNER:
        held = part.get(name)
        if isinstance(held, dict):
            yield name, held
        elif isinstance(held, list):
            for i, one in enumerate(held):
                if isinstance(one, dict):
                    yield f"{name}[{i}]", one
                elif isinstance(one, list):
                    # No API has lists in lists; what is in them is looked at all the same.
                    yield f"{name}[{i}]", {"content": one}


def top_parts(data: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The messages and items of a request's body, each with its place in it."""
    for name in _FIELDS:
        held = data.get(name)
        if isinstance(held, list):
            for i, one in enumerate(held):
                if isinstance(one, dict):
                    yield f"{name}[{i}]", one


def media_of(data: Mapping[str, Any]) -> Media:
    """What the body of a request holds beside text."""
    images: list[Size | None] = []
    counts = {"audio": 0, "video": 0}
    carried = 0
    for part in _all_parts(data):
        kind = _kind(part)
        if kind is None:
            continue
        payload = _payload(part)
        carried += len(payload)
        if kind == "image":
            images.append(image_size(payload))
        else:
            counts[kind] += 1
    if not images and not carried and not any(counts.values()):
        return NOTHING
    return Media(tuple(images), counts["audio"], counts["video"], carried)


def media_tokens(media: Media, costs: MediaConfig) -> int:
    """How many tokens all of it takes: by the pictures' sizes where those are known."""
    total = media.audio * costs.audio_tokens + media.video * costs.video_tokens
    edge = costs.image_edge
    for size in media.images:
        whole = costs.image_tokens
        if size is not None and edge is not None:
            area = -(-size[0] // edge) * -(-size[1] // edge)
            whole = min(whole, max(area, _LEAST_TOKENS) + _AROUND_TOKENS)
        total += whole
    return total


class MediaPrices:
    """What media in a request cost the experts that may be asked for it, in tokens."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def tokens(self, model: str, media: Media) -> int:
        """Return the most tokens that the media take in any expert that `model` may call.

        `model` is an expert, a recipe or `auto`.
        """
        if media is NOTHING:
            return 0
        config = self._config
        if model in config.experts:
            names: Iterable[str] = (model,)
        elif model in config.recipes:
            names = config.recipes[model].recipe().experts
        else:
            able = config.experts.items()
            names = [name for name, one in able if media.needs <= set(one.capabilities)]
        return max((media_tokens(media, config.experts[name].media) for name in names), default=0)


def _all_parts(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    level = [one for _, one in top_parts(data)]
    for _ in range(PARTS_DEEP + 1):
        yield from level
        level = [inner for part in level for _, inner in inner_parts(part)]


def _kind(part: Mapping[str, Any]) -> str | None:
    """What a part is, as vLLM decides it: by its keys where it has a uuid or no type."""
    said = part.get("type")
    if said is None or part.get("uuid") is not None:
        kind = next((kind for key, kind in _KEYS.items() if key in part), None)
        if kind is not None:
            return kind
    return _KINDS.get(said) if isinstance(said, str) else None


def _payload(part: Mapping[str, Any]) -> str:
    """The base64 that carries a part; empty where it is to be fetched."""
    for held in _held(part):
        if isinstance(held, dict):
            held = held.get("url") or held.get("data")
        if isinstance(held, str) and held:
            if held[:5].lower() == "data:":
                return held.partition(",")[2]
            return "" if "://" in held[:16] else held
    return ""


def _held(part: Mapping[str, Any]) -> Iterable[Any]:
    return (part.get(name) for name in (*_KEYS, "source", "input_video"))


def image_size(payload: str) -> Size | None:
    """Width and height in pixels, from the first bytes of a PNG, GIF, WebP or JPEG in base64."""
    head = payload[:_HEADER_CHARACTERS]
    try:
        data = base64.b64decode(head[: len(head) // 4 * 4])
    except (binascii.Error, ValueError):
        return None
    try:
        size = _size_in(data)
    except (struct.error, IndexError):
        return None
    return size if size is not None and min(size) > 0 else None


def _size_in(data: bytes) -> Size | None:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:6] in (b"GIF87a", b"GIF89a"):
        width, height = struct.unpack("<HH", data[6:10])
        return width, height
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    return _jpeg_size(data) if data[:2] == b"\xff\xd8" else None


def _webp_size(data: bytes) -> Size | None:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        width = int.from_bytes(data[24:27], "little") + 1
        return width, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> Size | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        # Start of frame, whichever coding; DHT, JPG and DAC lie between them.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
