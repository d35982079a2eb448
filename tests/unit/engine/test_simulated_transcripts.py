"""The simulated engine hears a word a second, and refuses what is no recording."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest

from service.engine.simulated_transcripts import transcript
from service.errors import InvalidRequestError
from tests.support.recordings import wav


def heard(data: bytes, **more: Any) -> tuple[bytes, bytes]:
    encoded = base64.b64encode(data).decode()
    return transcript("e", orjson.dumps({"model": "e", "file": encoded, **more}))


def test_transcript_has_a_word_for_each_second_and_tells_them() -> None:
    answer = orjson.loads(heard(wav(2.5))[0])
    assert len(answer["text"].split()) == 1 + 3
    assert answer["usage"] == {"type": "duration", "seconds": 3}
    text, kind = heard(wav(2.5), response_format="text")
    assert (text.decode(), kind) == (answer["text"], b"text/plain; charset=utf-8")
    verbose = orjson.loads(heard(wav(2.5), response_format="verbose_json", language="de")[0])
    assert (verbose["duration"], verbose["language"]) == (2.5, "de")


@pytest.mark.parametrize(
    ("data", "more"), [(b"nonsense", {}), (wav()[:20], {}), (wav(), {"response_format": "srt"})]
)
def test_what_can_t_be_heard_is_refused(data: bytes, more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        heard(data, **more)
