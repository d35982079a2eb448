"""What the simulated engine hears: words that are drawn by a recording, one for each second.

The shapes are those of OpenAI's API. Like others it refuses what is no recording.
"""

from __future__ import annotations

import hashlib
import io
import math
import wave

import orjson

from service.engine.audio_upload import parsed, recording_of
from service.errors import InvalidRequestError

_WORDS = ("words", "that", "somebody", "said", "into", "a", "machine")
_JSON, _TEXT = b"application/json", b"text/plain; charset=utf-8"
_FORMATS = ("json", "text", "verbose_json")


def transcript(expert: str, body: bytes) -> tuple[bytes, bytes]:
    """Return the answer to a request to transcribe, and its content type.

    Args:
        expert: The name of the expert.
        body: The request as JSON.

    Raises:
        InvalidRequestError: The recording is no WAV file, or there is no such format.
    """
    data = parsed(body)
    recording = recording_of(data)
    seconds = _seconds(recording)
    form = data.get("response_format", "json")
    if form not in _FORMATS:
        raise InvalidRequestError(
            f"`response_format` must be one of {', '.join(_FORMATS)}", param="response_format"
        )
    seed = hashlib.blake2b(recording, digest_size=1).digest()[0]
    count = max(1, math.ceil(seconds))
    words = [f"{expert}:", *(_WORDS[(seed + i) % len(_WORDS)] for i in range(count))]
    text = " ".join(words)
    if form == "text":
        return text.encode(), _TEXT
    usage = {"type": "duration", "seconds": math.ceil(seconds)}
    answer: dict[str, object] = {"text": text, "usage": usage}
    if form == "verbose_json":
        segment = {"id": 0, "start": 0.0, "end": seconds, "text": text}
        language = data.get("language", "en")
        answer |= {"language": language, "duration": seconds, "segments": [segment]}
    return orjson.dumps(answer), _JSON


def _seconds(recording: bytes) -> float:
    try:
        with wave.open(io.BytesIO(recording)) as file:
            return float(file.getnframes() / file.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        raise InvalidRequestError("`file` is no recording that can be read", param="file") from None
