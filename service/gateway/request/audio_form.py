"""Reads a request to transcribe: a form with a recording becomes JSON with the recording in base64.

Inside the service such a request is JSON like any other, so that it is parsed, routed, retried and
counted alike. `service.engine.audio_upload` makes a form of it again. The recording is held in
memory only.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import orjson

from service.errors import InvalidRequestError
from service.http.asgi_helpers import Receive
from service.http.multipart_forms import UploadForm, read_form

_LIST = "timestamp_granularities[]"
_READ_AS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("model", "language", "prompt", "response_format"), str),
    **dict.fromkeys(("hotwords", "to_language"), str),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), float),
    **dict.fromkeys(("top_k", "seed"), int),
}


async def read_audio_form(
    receive: Receive, headers: dict[bytes, bytes], *, max_audio_bytes: int, stall_timeout_s: float
) -> bytes:
    """Read a form, and return the request as JSON.

    Args:
        receive: The request's ASGI `receive`.
        headers: The request's headers, by name.
        max_audio_bytes: The largest recording.
        stall_timeout_s: The longest wait for the next bytes, in s.

    Raises what `read_form` raises, and InvalidRequestError for a field that is not valid.
    """
    recording = bytearray()

    async def keep(pending: bytearray, _: bool) -> None:
        recording.extend(pending)
        pending.clear()

    form = await read_form(
        receive, headers, keep, max_file_bytes=max_audio_bytes, stall_timeout_s=stall_timeout_s
    )
    return await asyncio.to_thread(_as_json, form, recording)


def _as_json(form: UploadForm, recording: bytearray) -> bytes:
    if not recording:
        raise InvalidRequestError("`file` is empty", param="file")
    data: dict[str, Any] = {}
    for name, text in form.fields.items():
        if name in (_LIST, _LIST.removesuffix("[]")):
            data[_LIST] = form.repeated[name]
        elif (read := _READ_AS.get(name)) is not None:
            try:
                value = read(text)
            except ValueError:
                value = float("nan")
            if value != value:
                raise InvalidRequestError(f"`{name}` must be a number", param=name)
            if value != "":  # as some clients send what is not set
                data[name] = value
        else:
            raise InvalidRequestError(
                f"there is no field `{name[:64]}` here; fields: file, {', '.join(_READ_AS)}, "
                f"{_LIST}",
                param=name[:64],
            )
    data["filename"] = form.filename
    data["file"] = base64.b64encode(recording).decode()
    return orjson.dumps(data)
