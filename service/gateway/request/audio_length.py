"""Estimates how long a recording is, for what it will cost. Pure.

The engine tells the length afterwards, and that is what counts. Nothing is decoded here: WAV and
FLAC say their length at the beginning, and other formats are taken for speech of few bits.
"""

from __future__ import annotations

import base64
import math
import struct

from service.http.token_usage import AUDIO_TOKENS_PER_S

# Speech in MP3, AAC and Opus seldom has fewer bits: 16 kbit/s.
_BYTES_PER_S = 2000
# The beginning that is looked at, in characters of base64. It is a multiple of four.
_HEAD = 4096
_WAV_HEADER = 44
_FLAC_HEADER = 26
# A header that says less than this contradicts the size of its file: 1536 kbit/s, twice a CD's.
_MOST_BYTES_PER_S = 2 * 176_400


def audio_tokens(encoded: str) -> int:
    """Estimate the tokens that a recording counts as.

    Args:
        encoded: The recording in base64.
    """
    return math.ceil(audio_seconds(encoded) * AUDIO_TOKENS_PER_S)


def audio_seconds(encoded: str) -> float:
    """Estimate the length of a recording in seconds.

    Args:
        encoded: The recording in base64.
    """
    size = len(encoded) * 3 // 4
    try:
        head = base64.b64decode(encoded[:_HEAD])
    except ValueError:
        head = b""
    least, most = size / _MOST_BYTES_PER_S, size / _BYTES_PER_S
    told = _wav_seconds(head, size) or _flac_seconds(head, size)
    return most if told is None else min(max(told, least), most)


def _wav_seconds(head: bytes, size: int) -> float | None:
    if len(head) < _WAV_HEADER or head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at = head.find(b"fmt ")
    if at < 0 or len(head) < at + 22:
        return None
    rate, told, block = struct.unpack_from("<IIH", head, at + 12)
    # Decoders go by the rate and the block, and ignore what is told of the bytes per second. In
    # compressed formats a block holds many samples, so that the smaller one is right.
    bytes_per_s = min(told, rate * block) or told
    return size / bytes_per_s if bytes_per_s else None


def _flac_seconds(head: bytes, size: int) -> float | None:
    if len(head) < _FLAC_HEADER or head[:4] != b"fLaC":
        return None
    # STREAMINFO: 20 bits of sample rate, 3 + 5 bits of format, 36 bits of the number of samples.
    packed = int.from_bytes(head[18:26], "big")
    rate, samples = packed >> 44, packed & (2**36 - 1)
    if not rate or not samples:
        return None
    channels, bits = (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1
    # It is no larger than what it is made from.
    return max(samples / rate, size / (rate * channels * bits / 8))
