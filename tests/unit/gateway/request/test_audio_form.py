"""A form with a recording becomes JSON; what is no such form is refused by its field."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest

from service.errors import (
    BodyTooLargeError,
    CoeError,
    InvalidRequestError,
    UnsupportedMediaTypeError,
)
from service.gateway.request.audio_form import read_audio_form
from service.http.asgi_helpers import ClientDisconnectedError
from tests.unit.batches.test_file_upload import HEADERS, form, part, receiving

SOUND = b"RIFF\r\n--xy" * 10
FILE = part("file", SOUND, "a.wav")


async def read(
    body: bytes, headers: dict[bytes, bytes] = HEADERS, cuts: tuple[int, ...] = (), most: int = 500
) -> Any:
    receive = receiving(body, list(cuts))
    raw = await read_audio_form(receive, headers, max_audio_bytes=most, stall_timeout_s=5)
    return orjson.loads(raw)


@pytest.mark.parametrize("cuts", [(), (1, 20, 60), tuple(range(0, 400, 7))])
async def test_form_becomes_json_with_typed_fields(cuts: tuple[int, ...]) -> None:
    fields = {"model": "auto", "language": "de", "temperature": "0.5", "seed": "3", "prompt": ""}
    parts = [part(name, value.encode()) for name, value in fields.items()]
    listed = [part("timestamp_granularities[]", value) for value in (b"word", b"segment")]
    assert await read(form(*parts, FILE, *listed), cuts=cuts) == {
        "model": "auto",
        "language": "de",
        "temperature": 0.5,
        "seed": 3,
        "timestamp_granularities[]": ["word", "segment"],
        "filename": "a.wav",
        "file": base64.b64encode(SOUND).decode(),
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(part("model", b"auto")), "file"),
        (form(part("file", b"", "a.wav")), "file"),
        (form(FILE, FILE), "file"),
        (form(FILE, part("stream", b"true")), "stream"),
        (form(FILE, part("temperature", b"warm")), "temperature"),
        (form(FILE, part("temperature", b"nan")), "temperature"),
        (form(FILE, part("seed", b"1.5")), "seed"),
        (form(FILE, part("prompt", b"x" * 5000)), "prompt"),
        (form(FILE)[:-20], None),
        (b"{}", None),
        (b"", None),
    ],
)
async def test_form_that_is_not_valid_is_refused_by_its_field(
    body: bytes, param: str | None
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await read(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        *(("temperature", text, "a finite number") for text in ("inf", "-Infinity", "1e999", "x")),
        *(("seed", text, "64 bits") for text in (f"{2**63}", f"{-(2**63)}", "9" * 30, "9" * 4000)),
        *(("top_k", text, "64 bits") for text in ("1e3", "9" * 4096, "inf")),
    ],
)
async def test_number_that_json_can_not_hold_is_refused(name: str, text: str, allowed: str) -> None:
    with pytest.raises(InvalidRequestError, match=allowed) as caught:
        await read(form(FILE, part(name, text.encode())))
    assert caught.value.param == name


async def test_number_is_kept_up_to_its_bounds_and_left_out_where_it_is_empty() -> None:
    fields = {"seed": 2**63 - 1, "top_k": -1, "temperature": 1e308}
    parts = [part(name, str(value).encode()) for name, value in fields.items()]
    found = await read(form(*parts, part("top_p", b""), FILE))
    assert {name: found[name] for name in fields} == fields
    assert "top_p" not in found


@pytest.mark.parametrize(
    ("body", "headers", "error"),
    [
        (form(FILE), {b"content-type": b"application/json"}, UnsupportedMediaTypeError),
        (form(FILE), {}, UnsupportedMediaTypeError),
        (form(part("file", b"x" * 501, "a")), HEADERS, BodyTooLargeError),
        (form(FILE), {**HEADERS, b"content-length": b"9999999"}, BodyTooLargeError),
    ],
)
async def test_form_that_is_too_large_or_none_is_refused(
    body: bytes, headers: dict[bytes, bytes], error: type[CoeError]
) -> None:
    with pytest.raises(error):
        await read(body, headers)


async def test_client_that_leaves_ends_the_form() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnectedError):
        await read_audio_form(receive, HEADERS, max_audio_bytes=10, stall_timeout_s=5)
