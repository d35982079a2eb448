"""A separate process that runs a sentence encoder for one gateway.

`python -m service.encoder.encoder_worker FOLDER THREADS MAX_TOKENS` reads batches of texts from its
standard input and writes their vectors to its standard output. The process may crash or hang
without harm to the gateway. A batch is four bytes of length and then JSON, a list of texts. A reply
is a kind, four bytes of length, and then float32 numbers or an error as text.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import orjson

READY, VECTORS, FAILED = b"R", b"V", b"F"
HEADER = struct.Struct(">cI")
LENGTH = struct.Struct(">I")


def reply(kind: bytes, body: bytes) -> bytes:
    """Encode one reply."""
    return HEADER.pack(kind, len(body)) + body


def batch(texts: list[str]) -> bytes:
    """Encode one batch. Lone surrogates, which JSON can't have, are replaced."""
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    body = orjson.dumps(clean)
    return LENGTH.pack(len(body)) + body


def serve(folder: Path, threads: int, max_tokens: int, given: BinaryIO, out: BinaryIO) -> int:
    """Answer batches until `given` ends. Returns 1 if the encoder can't be used, else 0."""
    from service.encoder.onnx_encoder import OnnxEncoder
    from service.errors import ArtifactError

    try:
        encoder = OnnxEncoder(folder, threads=threads, max_tokens=max_tokens)
    except ArtifactError as error:
        out.write(reply(FAILED, error.message.encode()))
        out.flush()
        return 1
    out.write(reply(READY, LENGTH.pack(encoder.dims)))
    out.flush()
    while len(head := given.read(LENGTH.size)) == LENGTH.size:
        body = given.read(*LENGTH.unpack(head))
        try:
            found = reply(VECTORS, encoder.encode(orjson.loads(body)).tobytes())
        except ArtifactError as error:
            found = reply(FAILED, error.message.encode())
        out.write(found)
        out.flush()
    return 0


def main() -> int:
    """Serve the parent process until it closes the pipe."""
    folder, threads, max_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # Output of native code is discarded, because it would look like a reply.
    out = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.nice(5)  # requests that need no encoder come first
    return serve(folder, threads, max_tokens, sys.stdin.buffer, out)


if __name__ == "__main__":
    sys.exit(main())
