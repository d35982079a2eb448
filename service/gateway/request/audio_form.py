"""Reads a request to transcribe: a form with a recording becomes JSON with the recording in base64.

Inside the service such a request is JSON like any other, so that it is parsed, routed, retried and
counted alike. `service.engine.audio_upload` makes a form of it again. The recording is held in
memory only.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable
from typing import Any

import orjson

from service.errors import InvalidRequestError
from service.http.asgi_helpers import Receive
from service.http.multipart_forms import UploadForm, read_form

_LIST = "timestamp_granularities[]"
# Integers that JSON can hold for every reader of it.
_MOST_INTEGER = 2**63 - 1


def _number(text: str) -> float:
    """Read a number.

    Raises:
        ValueError: It is none, or JSON has no form of it, as of `inf`.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _integer(text: str) -> int:
    """Read an integer.

    Raises:
        ValueError: It is none, or has more than 64 bits.
    """
    value = int(text)
    if abs(value) > _MOST_INTEGER:
        raise ValueError
    return value


_READ_AS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("model", "language", "prompt", "response_format"), str),
    **dict.fromkeys(("hotwords", "to_language"), str),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _number),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _number),
    **dict.fromkeys(("top_k", "seed"), _integer),
}
_KINDS: dict[Callable[[str], Any], str] = {
    _number: "a finite number",
    _integer: "an integer of at most 64 bits",
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
            if text == "":  # as some clients send what is not set
                continue
            try:
                data[name] = read(text)
            except ValueError:
                raise InvalidRequestError(f"`{name}` must be {_KINDS[read]}", param=name) from None
        else:
            raise InvalidRequestError(
                f"there is no field `{name[:64]}` here; fields: file, {', '.join(_READ_AS)}, "
                f"{_LIST}",
                param=name[:64],
            )
    data["filename"] = form.filename
    data["file"] = base64.b64encode(recording).decode()
    return orjson.dumps(data)
