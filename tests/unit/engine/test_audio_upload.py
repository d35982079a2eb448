"""The form for servers has every field of the JSON, and the recording's own bytes."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.audio_upload import audio_upload
from service.errors import InvalidRequestError
from service.gateway.request.audio_form import read_audio_form
from tests.unit.batches.test_file_upload import receiving


def json_of(recording: bytes, **more: Any) -> bytes:
    return orjson.dumps({"file": base64.b64encode(recording).decode(), **more})


@given(st.binary(min_size=1, max_size=300), st.text(max_size=20).map(lambda t: t + ".wav"))
async def test_form_is_read_back_as_the_same_request(recording: bytes, filename: str) -> None:
    fields = {
        "language": "de",
        "temperature": 0.5,
        "seed": 3,
        "timestamp_granularities[]": ["word", "segment"],
    }
    made = audio_upload(json_of(recording, model="ours", filename=filename, **fields), "theirs")
    read = await read_audio_form(
        receiving(made.body, []),
        {b"content-type": made.content_type.encode()},
        max_audio_bytes=1000,
        stall_timeout_s=5,
    )
    data = orjson.loads(read)
    del data["filename"]
    assert data == {**orjson.loads(json_of(recording)), "model": "theirs", **fields}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"file": "?"}', b'{"file": 5}'])
def test_request_without_a_recording_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        audio_upload(body, "theirs")
