"""Recordings for tests: WAV files of a tone."""

from __future__ import annotations

import io
import math
import struct
import wave

RATE = 8000


def wav(seconds: float = 1.0, tone_hz: float = 440.0) -> bytes:
    """A mono recording of 16 bits a sample."""
    out = io.BytesIO()
    samples = [
        round(9000 * math.sin(2 * math.pi * tone_hz * i / RATE)) for i in range(int(seconds * RATE))
    ]
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return out.getvalue()
