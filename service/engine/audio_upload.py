"""Makes the form that servers take to transcribe, of the JSON that the service uses inside.

Source: https://platform.openai.com/docs/api-reference/audio/createTranscription
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from typing import Any

import orjson

from service.errors import InvalidRequestError

# Fields that form the file's own part.
_OF_FILE = ("file", "filename")


@dataclass(frozen=True, slots=True)
class AudioUpload:
    """A form with a recording.

    Attributes:
        content_type: The value of the header `content-type`.
        body: The form.
    """

    content_type: str
    body: bytes


def audio_upload(body: bytes, model: str) -> AudioUpload:
    """Make the form of a request.

    Args:
        body: The request as JSON, with the recording in base64 in `file`.
        model: The model that the server gets.

    Raises:
        InvalidRequestError: The request is not valid.
    """
    data = parsed(body)
    recording = recording_of(data)
    boundary = secrets.token_hex(16)
    parts = []
    for name, value in {**data, "model": model}.items():
        if name in _OF_FILE:
            continue
        for one in value if isinstance(value, list) else [value]:
            text = one if isinstance(one, str) else orjson.dumps(one).decode()
            parts.append(_part(boundary, f'name="{_quoted(name)}"', text.encode()))
    filename = data.get("filename")
    shown = filename if isinstance(filename, str) else "audio"
    parts.append(_part(boundary, f'name="file"; filename="{_quoted(shown)}"', recording))
    return AudioUpload(
        f"multipart/form-data; boundary={boundary}",
        b"".join(parts) + f"--{boundary}--\r\n".encode(),
    )


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        InvalidRequestError: It is none.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


def recording_of(data: dict[str, Any]) -> bytes:
    """The recording in a request.

    Raises:
        InvalidRequestError: There is none.
    """
    try:
        return base64.b64decode(str(data["file"]), validate=True)
    except (KeyError, ValueError):
        raise InvalidRequestError("`file` must be a recording in base64", param="file") from None


def _part(boundary: str, name: str, value: bytes) -> bytes:
    head = f"--{boundary}\r\ncontent-disposition: form-data; {name}\r\n\r\n"
    return head.encode("utf-8", "replace") + value + b"\r\n"


def _quoted(text: str) -> str:
    """A name as it may stand in quotes of a header."""
    for character, escape in (('"', "%22"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(character, escape)
    return text
