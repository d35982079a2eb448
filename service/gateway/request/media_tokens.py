"""Finds images, sound and video in a request, and estimates their tokens. Pure.

The number of tokens of an image depends on its size in pixels, not on its bytes. By its bytes, a
photograph of 300 kB would have 100,000 tokens, but a model makes only some hundreds of it.
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
# The keys are in the order in which vLLM looks for them.
_KEYS = {"image_url": "image", "audio_url": "audio", "input_audio": "audio", "video_url": "video"}
_KINDS = {
    **_KEYS,
    **dict.fromkeys(("image", "input_image", "computer_screenshot"), "image"),
    **dict.fromkeys(("video", "input_video"), "video"),
}
# The beginning of an image that contains its size, except for JPEGs with large previews.
_HEADER_CHARACTERS = 65_536
# Processors enlarge small images, and chat templates add tokens around each image.
_LEAST_TOKENS = 64
_AROUND_TOKENS = 8

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Media:
    """The images, sound and video of a request.

    Attributes:
        images: Width and height of each image in pixels; None if only a fetch would show them.
        audio: Number of recordings.
        video: Number of videos.
        carried_bytes: Number of bytes of the body that contain media as base64.
    """

    images: tuple[Size | None, ...] = ()
    audio: int = 0
    video: int = 0
    carried_bytes: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities that an expert needs for these media."""
        needs = set()
        if self.images or self.video:
            needs.add("vision")
        if self.audio:
            needs.add("audio")
        return frozenset(needs)


NOTHING = Media()


def inner_parts(part: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts inside of a message or part, each after its path in it."""
    for name in INNER:
        held = part.get(name)
        if isinstance(held, dict):
            yield name, held
        elif isinstance(held, list):
            for i, item in enumerate(held):
                if isinstance(item, dict):
                    yield f"{name}[{i}]", item
                elif isinstance(item, list):
                    # No API has lists in lists, but their parts are checked as well.
                    yield f"{name}[{i}]", {"content": item}


def top_parts(data: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the messages and items of a request's body, each after its path."""
    for name in _FIELDS:
        held = data.get(name)
        if isinstance(held, list):
            for i, item in enumerate(held):
                if isinstance(item, dict):
                    yield f"{name}[{i}]", item


def media_of(data: Mapping[str, Any]) -> Media:
    """Find the media in the body of a request."""
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
    """Estimate the tokens of all media. An image of unknown size has the maximum.

    Args:
        media: The media.
        costs: Tokens of each kind of media for an expert.
    """
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
    """Estimates the tokens that media take in the experts of a config."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def tokens(self, model: str, media: Media) -> int:
        """Return the most tokens that the media take in any expert that `model` may call.

        Args:
            model: An expert, a recipe or `auto`.
            media: The media of the request.
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
            names = [name for name, item in able if media.needs <= set(item.capabilities)]
        return max((media_tokens(media, config.experts[name].media) for name in names), default=0)


def _all_parts(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    level = [item for _, item in top_parts(data)]
    for _ in range(PARTS_DEEP + 1):
        yield from level
        level = [inner for part in level for _, inner in inner_parts(part)]


def _kind(part: Mapping[str, Any]) -> str | None:
    """The kind of a part; None for text. As in vLLM, keys decide if it has a uuid or no type."""
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((kind for key, kind in _KEYS.items() if key in part), None)
        if kind is not None:
            return kind
    return _KINDS.get(kind) if isinstance(kind, str) else None


def _payload(part: Mapping[str, Any]) -> str:
    """The base64 of a part; empty if the part refers to a URL."""
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
    """Read width and height in pixels from the first bytes of a PNG, GIF, WebP or JPEG.

    Args:
        payload: The image in base64.

    Returns:
        (width, height); None if the format is unknown.
    """
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
        # A start of frame of any coding has the size. DHT, JPG and DAC are no starts of frames.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
