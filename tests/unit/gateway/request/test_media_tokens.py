"""Pictures, sound and video: capable experts, and the tokens that media count as."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.quality_cost_bounds import Exclusion
from service.broker.selection import select
from service.config import Config
from service.config.experts import MediaConfig
from service.errors import ConfigError, InvalidRequestError
from service.expert_capabilities import with_capabilities
from service.gateway.request.media_tokens import (
    NOTHING,
    Media,
    MediaPrices,
    image_size,
    media_of,
    media_tokens,
)
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.routing.candidate_planner import selection_request
from service.gateway.routing.routing_setup import RoutingSetup
from service.models.input_modalities import Senses, senses_of
from service.rpc.snapshot import ExpertState, Snapshot, Speed
from service.types import Residency


def png(width: int, height: int, size: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    body = struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + b"\0" * size


def jpeg(width: int, height: int) -> bytes:
    comment = b"\xff\xfe" + struct.pack(">H", 302) + b"x" * 300
    tables = b"\xff\xdb" + struct.pack(">H", 67) + b"\1" * 65
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3)
    return b"\xff\xd8" + comment + tables + frame + b"\0" * 20


def webp(kind: bytes, width: int, height: int) -> bytes:
    if kind == b"VP8X":
        inner = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        inner = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        inner = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    data = b"WEBP" + kind + struct.pack("<I", len(inner)) + inner
    return b"RIFF" + struct.pack("<I", len(data)) + data


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(data: bytes = b"") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(data)}"}}


RECORDING = {"type": "input_audio", "input_audio": {"data": coded(b"RIFF" * 99), "format": "wav"}}
FILM = {"type": "video_url", "video_url": {"url": "https://films/x.mp4"}}


def request_for(*parts: dict[str, Any], model: str = "auto", **more: Any) -> InferenceRequest:
    content = [{"type": "text", "text": "what is this?"}, *parts]
    data = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    return parse_request("/v1/chat/completions", orjson.dumps(data), {}, 120_000)


@pytest.mark.parametrize(
    "data",
    [
        png(640, 480),
        jpeg(640, 480),
        b"GIF89a" + struct.pack("<HH", 640, 480),
        *(webp(kind, 640, 480) for kind in (b"VP8X", b"VP8L", b"VP8 ")),
    ],
)
def test_picture_size_is_read_from_its_header(data: bytes) -> None:
    assert image_size(coded(data)) == (640, 480)
    assert image_size(coded(data + b"\0" * 300_000)) == (640, 480)
    for end in range(0, len(coded(data)) - 4, 7):
        assert image_size(coded(data)[:end]) in (None, (640, 480))


@pytest.mark.parametrize(
    "payload", ["", "A", "!!!!", "é" * 8, coded(b"%PDF-1.7"), coded(png(0, 5))]
)
def test_picture_size_of_other_bytes_is_none(payload: str) -> None:
    assert image_size(payload) is None


@pytest.mark.parametrize(
    ("endpoint_data", "media"),
    [
        ({"messages": [{"role": "user", "content": "data:image/png;base64,AAAA"}]}, NOTHING),
        ({"messages": [{"role": "user", "content": [FILM]}]}, Media(video=1)),
        (
            {"input": [{"content": [{"type": "input_image", "image_url": "data:x;base64,AAAA"}]}]},
            Media((None,), carried_bytes=4),
        ),
        (
            {
                "messages": [
                    {
                        "content": [
                            {
                                "type": "image",
                                "source": {
                                    "type": "base64",
                                    "media_type": "image/png",
                                    "data": coded(png(8, 9)),
                                },
                            }
                        ]
                    }
                ]
            },
            Media(((8, 9),), carried_bytes=len(coded(png(8, 9)))),
        ),
        (
            {"messages": [{"content": [{"type": "tool_result", "content": [picture(png(3, 4))]}]}]},
            Media(((3, 4),), carried_bytes=len(coded(png(3, 4)))),
        ),
        (
            {
                "input": [
                    {
                        "type": "computer_call_output",
                        "output": {"type": "computer_screenshot", "image_url": "https://x/y"},
                    }
                ]
            },
            Media((None,)),
        ),
    ],
)
def test_media_parts_are_found_in_every_api(endpoint_data: dict[str, Any], media: Media) -> None:
    assert media_of(endpoint_data) == media


def test_media_parts_require_capabilities() -> None:
    assert request_for().needs == {"chat"}
    assert request_for(picture()).needs == {"chat", "vision"}
    assert request_for(FILM).needs == {"chat", "vision"}
    assert request_for(RECORDING).needs == {"chat", "audio"}
    assert request_for(RECORDING, picture()).needs == {"chat", "audio", "vision"}


def test_picture_tokens_depend_on_its_size_and_not_on_its_bytes() -> None:
    by_area = MediaConfig(image_tokens=1280, image_edge=28)
    for size, tokens in (((280, 280), 100 + 8), ((28, 28), 64 + 8), ((9999, 9999), 1280)):
        assert media_tokens(Media((size,)), by_area) == tokens
    assert media_tokens(Media((None,)), by_area) == 1280
    assert media_tokens(Media(((28, 28),)), MediaConfig()) == 4096
    assert media_tokens(Media(audio=2, video=1), MediaConfig(audio_tokens=7)) == 14 + 16_384
    few, many = request_for(picture(png(280, 280))), request_for(picture(png(280, 280, 300_000)))
    assert many.prompt_tokens <= few.prompt_tokens + 2
    assert many.most_prompt_tokens == pytest.approx(few.most_prompt_tokens, abs=8)


def test_picture_tokens_are_counted_for_capable_experts_only() -> None:
    config = Config.model_validate(
        {
            "experts": {
                "text": {"model": "m", "media": {"image_tokens": 9}},
                "sees": {**SEES, "media": {"image_tokens": 100}},
                "dear": {**SEES, "media": {"image_tokens": 500}},
            },
            "recipes": {"both": {"kind": "cascade", "members": ["sees"], "later": ["dear"]}},
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    prices = MediaPrices(config)
    counts = {model: prices.tokens(model, Media((None,))) for model in ("sees", "both", "auto")}
    assert counts == {"sees": 100, "both": 500, "auto": 500}
    assert prices.tokens("auto", NOTHING) == 0


SEES = {"model": "m", "capabilities": ["chat", "vision"]}


def composition(**experts: dict[str, Any]) -> Config:
    return Config.model_validate({"experts": experts, "pools": {"cpu": {"engine": "simulated"}}})


def test_selection_of_a_picture_request_prefers_a_vision_expert() -> None:
    far = {
        "remote": {"url": "http://x/v1", "model": "y"},
        "price": {"prompt": 5, "completion": 15},
        "quality": {"general": 0.5},
    }
    config = composition(vision={**SEES, "categories": ["general"]}, textonly=far)
    routing = RoutingSetup(config)
    states = {"vision": ExpertState(Residency.DEVICE, max_model_len=32_768)}
    speeds = {"vision": Speed(0.2, 0.02, 0.0002)}
    views = [
        PoolView("p", Snapshot("p", "cpu", experts=states, speeds=speeds), 0.0, {}),
        PoolView("", Snapshot("", "remote", experts={"textonly": states["vision"]}), 0.0, {}),
    ]
    for size in (1_000, 300_000):
        request = request_for(picture(png(640, 480, size)), max_tokens=100)
        plan = routing.planner.plan(request)
        standing = PoolStateTable(routing.catalog.index).to_matrix(views)
        weighed = select(
            routing.catalog, standing, selection_request(routing.cost_model, request, plan)
        )
        assert [routing.catalog.recipes[row].name for row in plan.rows.tolist()] == ["vision"]
        assert (weighed.exclusion == Exclusion.CONTEXT).sum() == 0
        assert weighed.best_position() is not None
        assert np.isfinite(weighed.utility).all()


def test_selection_of_a_picture_request_without_a_vision_expert_raises() -> None:
    router = RoutingSetup(composition(text={"model": "m"}, sees=SEES)).planner
    router.plan(request_for(picture(), model="sees"))
    with pytest.raises(InvalidRequestError, match="expert 'text' can't do vision; it can do chat"):
        router.plan(request_for(picture(), model="text"))
    blind = RoutingSetup(composition(text={"model": "m"})).planner
    with pytest.raises(
        InvalidRequestError, match="no expert can do chat, vision; the request holds images"
    ):
        blind.plan(request_for(picture()))
    with pytest.raises(InvalidRequestError, match="no expert can do audio, chat"):
        router.plan(request_for(RECORDING))


def folder(at: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (at / "preprocessor_config.json").write_text(json.dumps(processor))
    return at


_QWEN = {"patch_size": 14, "merge_size": 2}
_SEEING: dict[str, Any] = {"vision_config": {}}


@pytest.mark.parametrize(
    ("config", "processor", "senses"),
    [
        ({"model_type": "qwen2"}, None, Senses()),
        (_SEEING, {**_QWEN, "max_pixels": 784 * 1280}, Senses(True, False, 1288, 28)),
        (_SEEING, {**_QWEN, "size": {"longest_edge": 784 * 1280}}, Senses(True, False, 1288, 28)),
        (_SEEING, {**_QWEN, "size": {"longest_edge": 1024}}, Senses(True)),
        (_SEEING, None, Senses(True)),
        ({**_SEEING, "mm_tokens_per_image": 256}, None, Senses(True, False, 264)),
        (
            {**_SEEING, "model_type": "llava", "image_seq_length": 576},
            None,
            Senses(True, False, 584),
        ),
        ({"audio_config": {}}, None, Senses(audio=True)),
        ({"thinker_config": {**_SEEING, "audio_config": {}}}, None, Senses(True, True)),
    ],
)
def test_model_senses_are_read_from_the_model_folder(
    tmp_path: Path, config: dict[str, Any], processor: dict[str, Any] | None, senses: Senses
) -> None:
    assert senses_of(folder(tmp_path / "m", config, processor)) == senses
    (tmp_path / "m" / "config.json").write_text("{")
    assert senses_of(tmp_path / "m") == Senses()


def test_expert_capabilities_default_to_the_model_folder_s_senses(tmp_path: Path) -> None:
    seeing = folder(tmp_path / "v", _SEEING, {**_QWEN, "max_pixels": 784 * 1280})
    text = folder(tmp_path / "t", {"model_type": "qwen2"})
    config = with_capabilities(
        composition(
            plain={"model": str(seeing)},
            tuned={"base": "plain", "adapter": "a"},
            told={"model": str(seeing), "capabilities": ["chat"], "media": {"image_tokens": 5}},
            text={"model": str(text)},
            gone={"model": str(tmp_path / "none"), "capabilities": ["chat", "vision"]},
        )
    )
    for name in ("plain", "tuned"):
        assert config.experts[name].capabilities[-1] == "vision"
        assert (config.experts[name].media.image_tokens, config.experts[name].media.image_edge) == (
            1288,
            28,
        )
    assert config.experts["told"].capabilities == ("chat",)
    assert config.experts["told"].media.image_tokens == 5
    assert "vision" not in config.experts["text"].capabilities
    assert "vision" in config.experts["gone"].capabilities
    with pytest.raises(ConfigError, match=r"experts\.liar\.capabilities: 'vision' is declared"):
        with_capabilities(
            composition(liar={"model": str(text), "capabilities": ["chat", "vision"]})
        )


def test_auto_embeddings_of_several_embedding_experts_use_one_vector_space() -> None:
    def embeds(space: str | None) -> dict[str, Any]:
        return {"model": "m", "capabilities": ["embeddings"], "space": space}

    body = orjson.dumps({"model": "auto", "input": "x"})
    request = parse_request("/v1/embeddings", body, {}, 1000)
    for experts in ({"a": embeds(None)}, {"a": embeds("s"), "b": embeds("s")}):
        plan = RoutingSetup(composition(chat={"model": "m"}, **experts)).planner.plan(request)
        assert plan.first == "a"
    with pytest.raises(ValueError, match=r"experts\.b\.space: 2 experts embed \(a, b\)"):
        composition(a=embeds("s"), b=embeds(None))
    with pytest.raises(ValueError, match="space is for experts with the capability embeddings"):
        composition(a={"model": "m", "space": "s"})
    router = RoutingSetup(composition(a=embeds("s"), b=embeds("t"))).planner
    with pytest.raises(InvalidRequestError, match=r"name one \(s: a; t: b\)") as caught:
        router.plan(request)
    assert caught.value.param == "model"
    named = orjson.dumps({"model": "b", "input": "x"})
    assert router.plan(parse_request("/v1/embeddings", named, {}, 1000)).first == "b"
