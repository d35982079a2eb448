"""The length of a recording is read where its beginning tells it, and never far from its size."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.gateway.request.audio_length import audio_seconds, audio_tokens
from tests.support.recordings import wav


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def flac(rate: int, samples: int, size: int) -> bytes:
    packed = (rate << 44 | 7 << 36 | samples).to_bytes(8, "big")
    return (b"fLaC\x00\x00\x00\x22" + bytes(10) + packed).ljust(size, b"\0")


@pytest.mark.parametrize("seconds", [0.5, 2.0, 7.25])
def test_wav_tells_its_length(seconds: float) -> None:
    assert audio_seconds(encoded(wav(seconds))) == pytest.approx(seconds, rel=0.02)
    assert audio_tokens(encoded(wav(seconds))) >= 50 * seconds


@pytest.mark.parametrize(
    ("at", "lie"),
    [(28, 352_800), (28, 2**32 - 1), (32, 200), (4, 0), (4, 2**32 - 1), (40, 1), (40, 2**32 - 1)],
)
def test_wav_that_lies_about_its_bytes_is_as_long_as_decoders_find_it(at: int, lie: int) -> None:
    data = bytearray(wav(10.0))
    size = 2 if at == 32 else 4
    data[at : at + size] = lie.to_bytes(size, "little")
    assert audio_seconds(encoded(bytes(data))) == pytest.approx(10, rel=0.02)


def test_flac_is_no_larger_than_what_it_is_made_from() -> None:
    # One sample is told; 16,000 of one byte a second are 25 s.
    assert audio_seconds(encoded(flac(16_000, 1, 400_000))) == pytest.approx(25, rel=0.01)


def test_flac_tells_its_length() -> None:
    assert audio_seconds(encoded(flac(16_000, 160_000, 100_000))) == pytest.approx(10)


def test_other_formats_are_taken_for_speech_of_few_bits() -> None:
    assert audio_seconds(encoded(b"ID3" + bytes(19_997))) == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("told", [flac(16_000, 1, 400_000), flac(1, 2**35, 400_000)])
def test_header_that_contradicts_the_size_is_not_believed(told: bytes) -> None:
    assert audio_seconds(encoded(told)) * 1.01 >= 400_000 / 352_800
    assert audio_seconds(encoded(told)) <= 400_000 / 2000 * 1.01


@given(st.binary(max_size=80), st.sampled_from([b"", b"RIFF1234WAVEfmt ", b"fLaC"]))
def test_any_bytes_have_a_length(data: bytes, head: bytes) -> None:
    assert 0 <= audio_seconds(encoded(head + data)) < 1


@pytest.mark.parametrize("text", ["", "?", "AAA", "é"])
def test_text_that_is_no_base64_has_a_length(text: str) -> None:
    assert audio_seconds(text) < 1
